"""Images really built from Debian's packages: needs the network, and root or user namespaces."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pycloudlib.errors import ImageBuildError
from pycloudlib.images import store
from pycloudlib.images.build import build_image
from pycloudlib.images.recipe import BuildRecipe
from pycloudlib.progress import Progress

pytestmark = pytest.mark.build

RECIPE = BuildRecipe(release="bookworm")
SECTOR = 512

DRIVER = """
import sys
from pathlib import Path
from pycloudlib.images.build import BuildRecipe, build_image

def tell(report):
    print("progress:", report.activity, "|", report.detail, flush=True)

print("image:", build_image(BuildRecipe(), Path(sys.argv[1]), on_progress=tell), flush=True)
"""


@dataclass(frozen=True)
class Builder:
    """A build in a process of its own; whatever it starts inherits a token to be known by."""

    process: subprocess.Popen[str]
    token: str
    image_dir: Path

    def wait_for(self, words: str) -> None:
        assert self.process.stdout is not None
        assert any(words in line for line in self.process.stdout), f"{words!r} was never printed"

    def list_processes(self) -> list[str]:
        marker = self.token.encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if marker in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def list_mounts(self) -> list[str]:
        found: set[str] = set()
        for table in Path("/proc").glob("[0-9]*/mountinfo"):
            with contextlib.suppress(OSError):
                lines = table.read_text().splitlines()
                found.update(line for line in lines if str(self.image_dir) in line)
        return sorted(found)

    def list_files(self) -> list[str]:
        return sorted(path.name for path in self.image_dir.iterdir() if path.name != ".build.lock")

    def wait_for_nothing_to_run(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := self.list_processes() + self.list_mounts()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == []


@contextlib.contextmanager
def start_build(image_dir: Path) -> Iterator[Builder]:
    image_dir.mkdir(exist_ok=True)
    # Of the kind that a build passes on to its programs; no locale has such a category.
    token = f"LC_TEST_BUILD={secrets.token_hex(8)}"
    name, _, value = token.partition("=")
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, image_dir],
        env={**os.environ, name: value},
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Builder(process, token, image_dir)
        finally:
            process.kill()


@dataclass(frozen=True)
class TwoBuilds:
    outputs: list[str]
    image_dir: Path

    @property
    def images(self) -> list[Path]:
        lines = [line for output in self.outputs for line in output.splitlines()]
        return [Path(line.split()[1]) for line in lines if line.startswith("image:")]


@pytest.fixture(scope="module")
def two_builds(tmp_path_factory: pytest.TempPathFactory) -> TwoBuilds:
    """Let two processes build the same image at once."""
    image_dir = tmp_path_factory.mktemp("images")
    with start_build(image_dir) as first, start_build(image_dir) as second:
        outputs = [builder.process.communicate(timeout=900)[0] for builder in (first, second)]
    return TwoBuilds(outputs, image_dir)


@pytest.fixture
def built(image: str) -> Path:
    """Give the image of all these tests: built anew whenever its recipe changes."""
    return Path(image)


@pytest.mark.thorough
def test_two_processes_at_once_build_once(two_builds: TwoBuilds) -> None:
    assert len(two_builds.images) == 2, two_builds.outputs
    assert two_builds.images[0] == two_builds.images[1]
    waited = ["progress: waiting for another process" in each for each in two_builds.outputs]
    installed = ["progress: installing packages" in each for each in two_builds.outputs]
    assert sorted(waited) == sorted(installed) == [False, True]


@pytest.mark.thorough
def test_nothing_but_the_image_is_left(two_builds: TwoBuilds) -> None:
    built = two_builds.images[0]
    assert {path.name for path in two_builds.image_dir.iterdir()} == {".build.lock", "bookworm"}
    assert {path.name for path in built.parent.iterdir()} == {
        built.name,
        store.record_path(built).name,
        store.kernel_path(built).name,
        store.initrd_path(built).name,
    }


def test_the_second_call_builds_nothing(built: Path) -> None:
    steps: list[Progress] = []

    # <image_dir>/bookworm/<serial>/<image>
    again = build_image(RECIPE, built.parent.parent.parent, on_progress=steps.append)

    assert again == built
    assert steps == []


def test_the_image_is_a_sound_qcow2(built: Path) -> None:
    subprocess.run(["qemu-img", "check", "-f", "qcow2", built], check=True)
    shown = subprocess.run(
        ["qemu-img", "info", "--output=json", built], capture_output=True, check=True
    )
    info = json.loads(shown.stdout)
    assert info["format"] == "qcow2"
    assert info["virtual-size"] == RECIPE.disk_size_gib * 1024**3
    assert "backing-filename" not in info


def test_its_partitions_are_ubuntus_and_the_file_systems_are_whole(
    built: Path, tmp_path: Path
) -> None:
    raw = tmp_path / "disk.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", built, raw], check=True)
    dumped = subprocess.run(
        ["/usr/sbin/sfdisk", "--json", raw], capture_output=True, check=True
    ).stdout
    partitions = json.loads(dumped)["partitiontable"]["partitions"]
    assert {each["node"].removeprefix(str(raw)): each["start"] for each in partitions} == {
        "1": 227328,
        "14": 2048,
        "15": 10240,
    }
    root = f"{raw}?offset={227328 * SECTOR}"
    subprocess.run(["/usr/sbin/e2fsck", "-f", "-n", root], check=True)
    with raw.open("rb") as disk:
        disk.seek(10240 * SECTOR)
        assert b"FAT32" in disk.read(SECTOR)


def test_kernel_and_initrd_are_beside_it(built: Path) -> None:
    kernel = store.kernel_path(built).read_bytes()
    assert kernel[0x202:0x206] == b"HdrS"  # the Linux boot protocol's magic number
    assert store.initrd_path(built).stat().st_size > 1024**2


@pytest.mark.thorough
def test_ctrl_c_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    with start_build(tmp_path / "images") as builder:
        builder.wait_for("Unpacking")
        assert len(builder.list_processes()) > 1
        builder.process.send_signal(signal.SIGINT)
        output, _ = builder.process.communicate(timeout=60)

        assert output.rstrip().endswith("KeyboardInterrupt")
        assert builder.list_processes() == []
        assert builder.list_mounts() == []
        assert builder.list_files() == []


@pytest.mark.thorough
def test_a_killed_build_leaves_files_only_and_the_next_one_removes_them(tmp_path: Path) -> None:
    with start_build(tmp_path / "images") as builder:
        builder.wait_for("Unpacking")
        if os.geteuid() == 0:  # nobody else sees into the build's namespaces
            assert builder.list_mounts() != []
        builder.process.kill()
        builder.process.wait()

        builder.wait_for_nothing_to_run(10)
        assert [name[:7] for name in builder.list_files()] == [".build-"]

    # The discard port: nobody answers there.
    with pytest.raises(ImageBuildError, match=r"(?s)installing packages \(mmdebstrap\).*127.0.0.1"):
        build_image(BuildRecipe(mirror="http://127.0.0.1:9/debian"), builder.image_dir)
    assert builder.list_files() == []


@pytest.mark.thorough
def test_a_package_that_does_not_exist_is_told_in_apts_words(tmp_path: Path) -> None:
    recipe = BuildRecipe(packages=("no-such-package-anywhere",))

    with pytest.raises(
        ImageBuildError, match=r"(?s)installing packages.*Unable to locate package no-such-package"
    ):
        build_image(recipe, tmp_path)
