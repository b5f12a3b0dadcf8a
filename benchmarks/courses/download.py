"""What verification and bookkeeping add to a download: against curl and sha256sum, in turn.

Both get the same file from the same server on the loopback, and both write it to disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.worker import Bench
from pycloudlib.images.source import Stream
from tests.unit.imageserver import new_signing_key, running_image_server

FETCH = r"""
import re, sys
from pathlib import Path
from pycloudlib.images.catalog import find_entry
from pycloudlib.images.releases import fetch_image
from pycloudlib.images.source import ImageSource, Stream
source = ImageSource(sys.argv[1], Path(sys.argv[2]))
fetch_image(find_entry(source, Stream.DAILY, "noble"), source, Path(sys.argv[3]))
print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""


def run(bench: Bench) -> None:
    """Serve an image, kernel and initrd, and get them in both ways."""
    directory = Path(bench.plan.scratch)
    content, plain, images = (directory / name for name in ("content.img", "plain.img", "images"))
    content.write_bytes(os.urandom(bench.plan.mib << 20))
    for beside in ("content-vmlinuz-generic", "content-initrd-generic"):
        (directory / beside).write_bytes(os.urandom(8 << 20))

    def curl() -> int:
        _output("curl", "-sSfo", plain, entry.url)
        _output("sha256sum", plain)
        return 0

    def fetch() -> int:
        """Return the peak of the memory, in kB."""
        return int(_output(sys.executable, "-c", FETCH, server.url, server.keyring, images))

    def clean_up(peak: int) -> None:
        if peak:
            bench.recorder.record("fetch-memory", peak / 1024)
        shutil.rmtree(images, ignore_errors=True)

    with new_signing_key() as key, running_image_server(key, directory) as server:
        entry = server.add_image(Stream.DAILY, "noble", "20240821", built=content)
        content.unlink()
        bench.recorder.take_turns({"curl": curl, "fetch": fetch}, bench.plan.rounds, clean_up)


def _output(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
