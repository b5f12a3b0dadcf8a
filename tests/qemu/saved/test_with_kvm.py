"""Machines with KVM, whose KVM is emulation: all ways that only they take, without a guest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.errors import CloudError
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.instance import QemuInstance
from tests.pretendedkvm import NEVER, kind_of_memory, pretended_kvm
from tests.qemu.conftest import UNSTARTED, CloudMaker
from tests.qemu.machines import SMALL, hurry
from tests.qemu.reader import begins_there, launch, prints, starts
from tests.qemu.worker import copy_worker, power_off, reboot, start_worker, type_in, typed, works

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("own_ports")]

ADVISE = "always within_size [advise] never deny force"
KEPT = "memory-backend-file, private"
HUGE = 2 << 20


@pytest.fixture
def huge_shared() -> str:
    return NEVER


@pytest.fixture
def cloud(make_cloud: CloudMaker, tmp_path: Path, huge_shared: str) -> Iterator[Qemu]:
    """Give a cloud for which KVM works."""
    directory = tmp_path / "kvm"
    directory.mkdir()
    with pretended_kvm(directory, huge_shared) as settings:
        yield make_cloud("kvm", more=settings)


def has_kvm(instance: QemuInstance) -> bool:
    """Whether a machine has KVM, as far as it knows: in truth it is emulated."""
    words = Path(f"/proc/{instance.machine.pid}/cmdline").read_text().split("\0")
    # As QEMU got it from the wrapper.
    assert words[words.index("-accel") + 1].startswith("tcg,")
    assert words[words.index("-cpu") + 1].split(",")[0] == "max"
    is_kvm = instance.machine.spec.accelerator is Accelerator.KVM
    # In emulation a guest has a little more memory than it was given.
    memory = instance.machine.execute("query-memory-size-summary")["base-memory"]
    assert (memory % (1 << 20) == 0) == is_kvm
    return is_kvm


def address_of_memory(instance: QemuInstance) -> int:
    """Return where QEMU has a guest's memory."""
    command = {"command-line": "gpa2hva 0"}
    said = instance.machine.execute("human-monitor-command", command)
    return int(said.split()[-1], 16)


@pytest.mark.parametrize("huge_shared", [NEVER, ADVISE], ids=["anonymous", "shared"])
def test_memory_begins_where_a_huge_page_can(cloud: Qemu, tiny_image: Path) -> None:
    machine = cloud.launch(str(tiny_image), SMALL, launch_args=UNSTARTED)
    assert address_of_memory(machine) % HUGE == 0


@pytest.mark.parametrize(
    ("huge_shared", "memory"),
    [
        pytest.param(NEVER, "memory-backend-ram, private", id="anonymous"),
        pytest.param(
            ADVISE, "memory-backend-file, shared", id="shared", marks=pytest.mark.thorough
        ),
    ],
)
def test_machine_is_saved_copied_and_rolled_back(memory: str, cloud: Qemu, tmp_path: Path) -> None:
    worker = start_worker(cloud, tmp_path / "worker.img")
    assert has_kvm(worker)
    assert kind_of_memory(worker) == memory
    type_in(worker, "f")
    pid = worker.machine.pid
    image = cloud.snapshot(worker, memory=True)
    assert worker.machine.pid == pid
    type_in(worker, "z")

    copy = copy_worker(cloud, image)
    assert has_kvm(copy)
    assert kind_of_memory(copy) == KEPT
    assert typed(copy) == "f"
    reboot(copy)
    (fork,) = worker.fork(1)
    assert typed(hurry(fork)) == "fz"
    assert has_kvm(fork)

    worker.rollback(image)
    assert kind_of_memory(worker) == KEPT
    assert typed(worker) == "f"
    assert works(worker)
    again = cloud.snapshot(worker, memory=True)
    assert typed(copy_worker(cloud, again)) == "f"
    power_off(worker)
    worker.start(wait=False)
    assert works(worker)
    assert kind_of_memory(worker) == memory, "as from the first power on"


def test_copy_that_cannot_be_restored_boots_with_the_accelerator_of_this_host(
    cloud: Qemu, make_cloud: CloudMaker, tmp_path: Path
) -> None:
    """One that was saved with KVM would not start without, and the other way it would be slow."""
    emulated = make_cloud("emulated")
    for source, target in ((cloud, emulated), (emulated, cloud)):
        worker = start_worker(source, tmp_path / f"{source.tag}.img")
        image = source.snapshot(worker, memory=True)
        booted = hurry(target.launch(image))
        assert works(booted)
        assert "SeaBIOS" in booted.console_log()
        assert has_kvm(booted) == (target is cloud)
        spec = booted.machine.spec
        assert spec.without == spec.accelerator.slow_features
        with pytest.raises(CloudError, match=r"restored here: .* another accelerator"):
            booted.rollback(image)
        assert works(booted)
        assert booted.delete() == []


@pytest.mark.usefixtures("emptied")
def test_first_boot_begins_at_the_seed(cloud: Qemu, reader_image: Path) -> None:
    first = launch(cloud, reader_image, "one")
    second = launch(cloud, reader_image, "two")
    (start,) = starts(cloud)
    for instance, line in ((first, "one"), (second, "two")):
        assert prints(instance, line)
        assert begins_there(instance, start)
        assert has_kvm(instance)
        assert kind_of_memory(instance) == KEPT
