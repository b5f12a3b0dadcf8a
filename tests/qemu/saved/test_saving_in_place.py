"""A machine that works is saved while it runs: nothing of it changes, and copies go on from it.

The worker finds out itself when its memory or its disk is not what it was, in copies, too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.errors import CloudError
from pycloudlib.qemu.host.processes import ProcessIdentity
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.parts.part import ANONYMOUS
from pycloudlib.qemu.vm.qmp import QmpError
from tests.qemu.conftest import CloudMaker
from tests.qemu.machines import hurry, pauses
from tests.qemu.worker import (
    Console,
    are_in_order,
    copy_worker,
    output_of,
    power_off,
    reboot,
    rounds,
    start_worker,
    type_in,
    typed,
    works,
)

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("own_ports")]

_log = logging.getLogger(__name__)

# Seconds: what takes so long hangs.
HANGS = 30


@pytest.fixture
def worker(cloud: Qemu, tmp_path: Path) -> QemuInstance:
    """Give a machine that works."""
    return start_worker(cloud, tmp_path / "worker.img")


def snapshot(cloud: Qemu, instance: QemuInstance) -> str:
    return cloud.snapshot(instance, memory=True)


def process_of(instance: QemuInstance) -> ProcessIdentity:
    """Return what tells a machine's process from all others."""
    pid = instance.machine.pid
    assert pid is not None
    identity = ProcessIdentity.find(pid)
    assert identity is not None
    return identity


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.thorough)])
def test_nothing_of_a_machine_changes_when_it_is_saved(
    cloud: Qemu, worker: QemuInstance, count: int
) -> None:
    """Its process, its ports, whoever is connected to them, and its memory's kind."""

    def look() -> tuple[object, ...]:
        memory = worker.machine.execute("query-memdev")
        return process_of(worker), worker.id, worker.port, worker.telnet_port, memory

    before = look()
    with (
        Console(worker) as console,
        socket.create_connection(("127.0.0.1", int(worker.port))) as forwarded,
    ):
        console.send("a")
        for number in range(count):
            snapshot(cloud, worker)
            assert look() == before
            assert console.is_open
            assert select.select([forwarded], [], [], 0)[0] == [], "it was closed"
            console.send("b")
            assert console.ask() == "a" + "b" * (number + 1)
        assert works(worker)
        received = rounds(console.received)
    assert are_in_order(received), "the console lost something"
    assert are_in_order(rounds(output_of(worker)))
    found = pauses(worker)
    _log.info("Paused for %s ms", [round(pause * 1000, 1) for pause in found])
    assert len(found) == count
    assert max(found) < HANGS


@pytest.mark.thorough
def test_copies_go_on_from_the_moment_at_which_each_was_saved(
    cloud: Qemu, worker: QemuInstance
) -> None:
    saved = []
    for letter in "fzf":
        type_in(worker, letter)
        before = rounds(output_of(worker))[-1]
        image = snapshot(cloud, worker)
        saved.append((image, before, rounds(output_of(worker))[-1]))
    for number, (image, before, after) in enumerate(saved):
        copy = copy_worker(cloud, image)
        assert before < rounds(output_of(copy))[0] <= after + 2
        assert typed(copy) == "fzf"[: number + 1]
    assert typed(worker) == "fzf"
    assert works(worker)


KINDS = [
    pytest.param("shared", marks=pytest.mark.thorough),
    pytest.param("copy", marks=pytest.mark.thorough),
    "copy of files that are deleted",
    "anonymous",
]


def start_kind(
    kind: str, cloud: Qemu, worker: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> QemuInstance:
    """Give a worker whose memory is of a kind; "f" was typed in it."""
    if kind == "anonymous":
        power_off(worker)
        monkeypatch.setattr("pycloudlib.qemu.vm.machine.choose_memory", lambda _: ANONYMOUS)
        worker.start(wait=False)
        assert works(worker)
    type_in(worker, "f")
    if kind == "copy":
        return copy_worker(cloud, snapshot(cloud, worker))
    if kind.startswith("copy"):
        (copy,) = worker.fork(1)
        assert all(not file.exists() for file in mapped_files(copy))
        return hurry(copy)
    return worker


def mapped_files(instance: QemuInstance) -> set[Path]:
    """List the files of a saved machine that a copy maps, which may be deleted by now."""
    maps = Path(f"/proc/{instance.machine.pid}/maps").read_text().splitlines()
    names = {line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) == 6}
    found = {Path(name) for name in names if "/snapshots/" in name}
    assert found, "it does not map the kept memory"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_machine_with_memory_of_any_kind_is_saved_where_it_is(
    kind: str, cloud: Qemu, worker: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what was in a page when it was kept, is nothing any more, and the other way."""
    source = start_kind(kind, cloud, worker, monkeypatch)
    process, memory = process_of(source), source.machine.execute("query-memdev")
    saved = [snapshot(cloud, source)]
    for letter in "zf":
        type_in(source, letter)
        saved.append(snapshot(cloud, source))
    assert process_of(source) == process
    assert source.machine.execute("query-memdev") == memory
    assert works(source)
    for number, image in enumerate(saved):
        copy = copy_worker(cloud, image)
        assert typed(copy) == "fzf"[: number + 1]
        reboot(copy)
        assert copy.delete() == []
    assert typed(source) == "fzf"
    assert works(source)


@pytest.mark.parametrize("depth", [3, pytest.param(8, marks=pytest.mark.thorough)])
def test_saves_of_saves_go_on_as_each_was(cloud: Qemu, worker: QemuInstance, depth: int) -> None:
    text = ""
    generations = [(worker, text)]
    for number in range(depth):
        source, text = generations[-1]
        letter = "fz"[number % 2]
        type_in(source, letter)
        generations[-1] = (source, text + letter)
        process = process_of(source)
        copy = copy_worker(cloud, snapshot(cloud, source))
        assert process_of(source) == process
        assert typed(copy) == text + letter
        generations.append((copy, text + letter))
    for generation, text in generations:
        assert typed(generation) == text
        assert works(generation)


@pytest.mark.parametrize("times", [2, pytest.param(8, marks=pytest.mark.thorough)])
def test_machines_that_work_are_saved_in_two_threads(
    cloud: Qemu, worker: QemuInstance, tmp_path: Path, times: int
) -> None:
    other = start_worker(cloud, tmp_path / "other.img")
    pair = {"a": worker, "b": other}
    processes = [process_of(each) for each in pair.values()]
    for letter, each in pair.items():
        type_in(each, letter)

    def save_often(each: QemuInstance) -> list[str]:
        return [snapshot(cloud, each) for _ in range(times)]

    with ThreadPoolExecutor(2) as threads:
        images = list(threads.map(save_often, pair.values()))
    assert [process_of(each) for each in pair.values()] == processes
    for letter, of_one in zip(pair, images, strict=True):
        for image in of_one:
            copy = copy_worker(cloud, image)
            assert typed(copy) == letter
            assert copy.delete() == []
    assert works(worker)
    assert works(other)


# What a copy needs to boot again is not only the guest's memory.


@pytest.mark.parametrize(
    "launch_args",
    [
        pytest.param([], id="ordinary"),
        pytest.param(
            ["-device", "e1000,romfile=pxe-e1000.rom"],
            id="ROM of a network card",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_copy_boots_again_powers_off_and_on_and_is_saved_in_turn(
    cloud: Qemu, tmp_path: Path, launch_args: list[str]
) -> None:
    worker = start_worker(cloud, tmp_path / "worker.img", launch_args)
    type_in(worker, "f")
    copy = copy_worker(cloud, snapshot(cloud, worker))
    firmware = reboot(worker)
    assert worker.delete() == []
    for _ in range(2):
        assert reboot(copy) == firmware
        power_off(copy)
        copy.start(wait=False)
        assert works(copy)
        assert reboot(copy) == firmware
        type_in(copy, "g")
        again = copy_worker(cloud, snapshot(cloud, copy))
        assert copy.delete() == []
        copy = again
        assert typed(copy) == "g"
    assert reboot(copy) == firmware
    power_off(copy)


DISPLAYS = {
    "VGA": ["-device", "VGA"],
    "-vga std": ["-vga", "std"],
    "cirrus-vga": ["-device", "cirrus-vga"],
    "bochs-display": ["-device", "bochs-display"],
    "memory that can be unplugged": [
        *["-m", "65544K,slots=2,maxmem=1G", "-object", "memory-backend-ram,id=more,size=16M"],
        *["-device", "pc-dimm,memdev=more,id=dimm"],
    ],
}


@pytest.mark.parametrize(
    "device",
    [
        device if device == "VGA" else pytest.param(device, marks=pytest.mark.thorough)
        for device in DISPLAYS
    ],
)
def test_machine_with_more_memory_of_devices_is_saved_whole_or_refused(
    device: str, cloud: Qemu, tmp_path: Path
) -> None:
    worker = start_worker(cloud, tmp_path / "worker.img", DISPLAYS[device])
    type_in(worker, "f")
    process = process_of(worker)
    image, refusal = "", ""
    try:
        image = snapshot(cloud, worker)
    except CloudError as error:
        refusal = str(error)
        _log.info("Refused: %s", error)
    assert process_of(worker) == process
    assert works(worker)
    assert typed(worker) == "f"
    if refusal:
        assert any(name in refusal.lower() for name in ("vga", "display", "dimm", "more"))
        assert pauses(worker) == []
        assert list(cloud.parent_dir.glob("snapshots/*")) == []
        return
    copy = copy_worker(cloud, image)
    assert typed(copy) == "f"
    assert screen(copy, tmp_path) == screen(worker, tmp_path)
    assert reboot(copy) == reboot(worker)
    assert screen(copy, tmp_path) == screen(worker, tmp_path)
    power_off(copy)


def screen(instance: QemuInstance, directory: Path) -> bytes:
    """Return what a machine's display shows, if it has one."""
    file = directory / "screen.ppm"
    with contextlib.suppress(QmpError):
        file.unlink(missing_ok=True)
        instance.machine.execute("screendump", {"filename": str(file)})
    return file.read_bytes() if file.exists() else b""


# A host that has no more space.


@pytest.fixture
def small_cloud(small_host: Path) -> Iterator[Qemu]:
    """Give a cloud that works on a small file system."""
    config = f'[qemu]\nworking_dir = "{small_host}"\naccelerator = "tcg"\n'
    with Qemu("full", config_file=io.StringIO(config)) as cloud:
        yield cloud


@pytest.mark.parametrize("small_host", ["200m"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_save_that_finds_no_space_is_refused_before_the_machine_is_paused(
    kind: str,
    small_cloud: Qemu,
    small_host: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The guest has 8 MiB that are not empty."""
    worker = start_worker(small_cloud, tmp_path / "worker.img")
    worker = start_kind(kind, small_cloud, worker, monkeypatch)
    left = shutil.disk_usage(small_host).used + (4 << 20)
    resize(small_host, left)

    def look() -> tuple[object, ...]:
        there = small_cloud.parent_dir.rglob("*")
        files = {file for file in there if not file.is_dir() and file.suffix != ".lock"}
        return process_of(worker), files, list(small_cloud.created_images)

    before, paused = look(), len(pauses(worker))
    with pytest.raises(CloudError, match=r"(?i)\bspace\b|\bno room\b") as caught:
        snapshot(small_cloud, worker)
    _log.info("Refused: %s", caught.value)
    assert str(small_host) in str(caught.value)
    assert len(pauses(worker)) == paused
    assert look() == before
    assert works(worker)

    resize(small_host, left + (100 << 20))
    copy = copy_worker(small_cloud, snapshot(small_cloud, worker))
    assert typed(copy) == typed(worker)
    assert works(worker)
    for instance in (copy, worker):
        assert instance.delete() == []


def resize(file_system: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", file_system], check=True)


# What is done with such saves.


def test_machine_goes_back_to_where_it_was_saved(cloud: Qemu, worker: QemuInstance) -> None:
    type_in(worker, "f")
    first = snapshot(cloud, worker)
    type_in(worker, "z")
    second = snapshot(cloud, worker)
    type_in(worker, "a")
    for image, text in [(first, "f"), (second, "fz"), (first, "f")]:
        worker.rollback(image)
        assert works(worker)
        assert typed(worker) == text
    type_in(worker, "b")
    process = process_of(worker)
    third = snapshot(cloud, worker)
    assert process_of(worker) == process
    worker.rollback(second)
    assert typed(worker) == "fz"
    worker.rollback(third)
    assert typed(worker) == "fb"
    reboot(worker)


def test_forks_leave_the_machine_in_its_process(cloud: Qemu, worker: QemuInstance) -> None:
    type_in(worker, "f")
    process = process_of(worker)
    with Console(worker) as console:
        forks = worker.fork(3, fresh_identity=True)
        assert console.ask() == "f"
        assert are_in_order(rounds(console.received))
    assert process_of(worker) == process
    for fork in map(hurry, forks):
        assert works(fork)
        assert typed(fork) == "f"
    type_in(forks[0], "a")
    (grandchild,) = map(hurry, forks[0].fork(1))
    assert typed(grandchild) == "fa"
    assert works(worker)


def test_saved_machine_that_is_exported_needs_nothing_else(
    make_cloud: CloudMaker, tmp_path: Path
) -> None:
    first = make_cloud("first")
    worker = start_worker(first, tmp_path / "worker.img")
    type_in(worker, "f")
    again = copy_worker(first, snapshot(first, worker))
    type_in(again, "z")
    image = snapshot(first, again)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first.export_image(image, elsewhere / "kept.img")
    assert works(again)
    assert first.clean() == []
    (tmp_path / "worker.img").unlink()
    moved = tmp_path / "moved"
    elsewhere.rename(moved)
    second = make_cloud("second")
    copy = copy_worker(second, str(moved / "kept.img"))
    assert typed(copy) == "fz"
    reboot(copy)
    type_in(copy, "a")
    grandchild = copy_worker(second, snapshot(second, copy))
    assert typed(grandchild) == "a"


def test_saves_that_are_deleted_leave_nothing_to_the_machine(
    cloud: Qemu, worker: QemuInstance
) -> None:
    """Neither files, nor space on the disk, nor space of files that have no name any more."""

    def look() -> tuple[object, ...]:
        files = {file for file in worker.instance_dir.iterdir() if file.suffix != ".lock"}
        return process_of(worker), files, list(cloud.parent_dir.glob("snapshots/*"))

    cloud.delete_image(snapshot(cloud, worker))
    before, used = look(), space(cloud.parent_dir)
    with Console(worker) as console:
        for _ in range(3):
            image = snapshot(cloud, worker)
            assert works(worker)
            cloud.delete_image(image)
            assert works(worker)
            assert look() == before
        assert console.is_open
    # Layers below the machine's disk remain until they are merged, of 64 sectors each.
    log = worker.machine.rundir.console_log.stat().st_size
    assert space(cloud.parent_dir) <= used + log + 3 * (1 << 20)
    assert not [file for file in opened_by(worker) if "/snapshots/" in file]


def opened_by(instance: QemuInstance) -> list[str]:
    """List what a machine's process has open, by the kernel's word of it."""
    names = []
    for link in Path(f"/proc/{instance.machine.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(str(link.readlink()))
    return names


def space(directory: Path) -> int:
    """Return how many bytes of the disk a directory's files take."""
    files = [file.lstat() for file in directory.rglob("*")]
    return 512 * sum({facts.st_ino: facts.st_blocks for facts in files}.values())


def test_saved_machine_is_saved_and_copied_by_another_program(
    cloud: Qemu, working_dir: Path, worker: QemuInstance
) -> None:
    """Who has started it hears that it was paused and goes on, and stays connected."""
    program = (
        "import io, sys\n"
        "from pycloudlib import Qemu\n"
        "cloud = Qemu('t', timestamp_suffix=False, config_file=io.StringIO(sys.argv[1]))\n"
        "vm = cloud.get_instance(sys.argv[2])\n"
        "vm.banner_timeout = 0.2\n"
        "print(cloud.snapshot(vm, memory=True))\n"
    )
    config = f'[qemu]\nworking_dir = "{working_dir}"\naccelerator = "tcg"\n'
    type_in(worker, "f")
    process = process_of(worker)
    with Console(worker) as console:
        done = subprocess.run(
            [sys.executable, "-c", program, config, worker.id],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert process_of(worker) == process
        assert console.ask() == "f"
        assert are_in_order(rounds(console.received))
    assert len(pauses(worker)) == 1
    image = done.stdout.strip()
    copy = copy_worker(cloud, image)
    assert typed(copy) == "f"
    assert copy.delete() == []
    cloud.delete_image(image)
    assert works(worker)
