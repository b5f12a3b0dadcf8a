"""Downloads in processes of their own: killed at any moment, and many at once."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pycloudlib.images import releases, store
from pycloudlib.images.catalog import CatalogEntry
from pycloudlib.images.source import Stream
from tests.unit.imageserver import (
    ImageServer,
)

# Forks for each download, as a start of Python would take most of the time.
DRIVER = """
import os, sys
from pathlib import Path
import httpx
from pycloudlib.images.catalog import ImageSource, Stream, find_entry
from pycloudlib.images.releases import fetch_image
source = ImageSource(sys.argv[1], Path(sys.argv[2]))
entry = find_entry(source, Stream.RELEASED, "noble")
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        fetch_image(entry, source, Path(sys.argv[3]))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture
def entry(server: ImageServer) -> CatalogEntry:
    return server.add_image(Stream.RELEASED, "noble", "20240821")


class Driver:
    """A process that downloads in children."""

    def __init__(self, server: ImageServer, image_dir: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, server.url, server.keyring, image_dir],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.communicate(timeout=60)

    def download(self, kill_after: float | None = None) -> bool:
        """Download; say whether that came to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        child = int(self._process.stdout.readline())
        timer = threading.Timer(kill_after or 0, os.kill, (child, signal.SIGKILL))
        if kill_after is not None:
            timer.start()
        status = int(self._process.stdout.readline())
        timer.cancel()
        assert status in (0, signal.SIGKILL)
        return status == 0


@pytest.mark.parametrize("kills", [8, pytest.param(200, marks=pytest.mark.thorough)])
def test_killed_at_any_moment_it_never_leaves_a_wrong_image(
    kills: int, server: ImageServer, entry: CatalogEntry, tmp_path: Path
) -> None:
    image_dir = tmp_path / "images"
    image = releases.image_path(entry, image_dir)
    path, content = server.path_of(entry.url), server.files[server.path_of(entry.url)]
    chance = random.Random(7)
    killed = 0
    with Driver(server, image_dir) as driver:
        started = time.monotonic()
        assert driver.download()
        whole = time.monotonic() - started
        while killed < kills:
            store.delete(image, image_dir)
            before = len(server.requests)
            tries = 0
            while not driver.download(kill_after=chance.uniform(0, whole)):
                killed += 1
                tries += 1
                if image.exists():
                    # The image is named before its record is written.
                    assert hashlib.sha256(image.read_bytes()).hexdigest() == entry.sha256
                if tries == 5:
                    assert driver.download()
                    break
            assert image.read_bytes() == content
            assert store.kernel_path(image).is_file()
            assert not list(image_dir.rglob("*.part"))
            asked = server.requests[before:].count(path)
            assert asked <= tries + 1
    asked_for = server.ranges.get(path, [])
    begun = [int(each.removeprefix("bytes=").removesuffix("-")) for each in asked_for]
    # Few kills may all have come before the image or after it.
    assert kills < 100 or any(0 < start < entry.size for start in begun)
    assert sorted(file.name for file in image_dir.iterdir()) == ["24.04"]


def test_sixteen_processes_that_ask_at_once_make_one_transfer(
    server: ImageServer, entry: CatalogEntry, tmp_path: Path
) -> None:
    image_dir = tmp_path / "images"
    drivers = [Driver(server, image_dir) for _ in range(16)]
    threads = [threading.Thread(target=driver.download) for driver in drivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for driver in drivers:
        with driver:
            pass
    assert server.requests.count(server.path_of(entry.url)) == 1
    assert releases.image_path(entry, image_dir).is_file()
    assert sorted(file.name for file in image_dir.iterdir()) == ["24.04"]
