"""Kept memory, which all copies of a saved machine map: nothing in one of them can change it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib.qemu.host.accelerator import find_features
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching.warmcache import WarmCache
from pycloudlib.qemu.parts.standard import BACKEND
from pycloudlib.qemu.saved import checkpoint
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.vm.memory import KeptMemoryError, check_command, check_machine
from tests.qemu.machines import SMALL, becomes, run, runs, save

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("own_ports")]

# A boot sector that fills 64 KiB from 0x30000 on, then waits for a balloon in slot 0x10. It gives
# the balloon the ports from 0xe000 on, and gives those pages back, as a driver does unasked
# (Virtio 1.1, 4.1.4.8 and 5.5): queue 0 is at 0x10000, its one buffer has the pages' numbers.
INFLATER = (
    "31c08ed8b800308ec031ffb90080b85a5af3abb800108ec030dbe87a0066ed663df41a021075f1b310e86b00"
    "66b800e0000066efb304e85e00b80500ef26c7060000000426c7060200010026c70608004000ba0ce0edc1e0"
    "0489c326c7470201006631ffb8300026678904bd00040000404783ff1075f0ba12e0b003eeba08e066b81000"
    "000066efba12e0b007eeba10e031c0eff4ebfdbaf80c66b80080008088d866efbafc0cc3"
)
BALLOON = {"driver": "virtio-balloon-pci", "id": "balloon", "addr": "0x10"}


@pytest.fixture
def eager(cloud: Qemu, tmp_path: Path) -> QemuInstance:
    """Give a machine whose guest gives memory back as soon as there is a balloon."""
    image = tmp_path / "eager.img"
    sector = bytes.fromhex(INFLATER).ljust(510, b"\0") + b"\x55\xaa"
    image.write_bytes(sector.ljust(1 << 20, b"\0"))
    machine = run(cloud, image)
    assert becomes(lambda: peek(machine, 0x3FFFC) == "0x5a5a5a5a")
    return machine


def peek(machine: QemuInstance, address: int) -> str:
    """Read a word of a guest's memory."""
    command = {"command-line": f"xp /wx {address:#x}"}
    said: str = machine.machine.execute("human-monitor-command", command)
    return said.rsplit(maxsplit=1)[-1]


def facts(file: Path) -> tuple[int, int, str]:
    """Say what a file takes on disk, when it was changed, and what is in it."""
    with file.open("rb") as opened:
        # A file system may change its mind on the blocks until they are written.
        os.fsync(opened.fileno())
        found = os.fstat(opened.fileno())
        return found.st_blocks, found.st_mtime_ns, hashlib.sha256(opened.read()).hexdigest()


def plug_by_others(machine: QemuInstance) -> None:
    """Plug a balloon in as another program does, which talks to QEMU itself."""
    with machine.machine.session() as session:
        session.execute("device_add", BALLOON)
    # The guest has seen to it when the device has what is given to it with the last write.
    assert becomes(lambda: used(machine) == 1)


def used(machine: QemuInstance) -> int:
    """Say how many buffers the balloon has taken."""
    # Behind a queue of 128 places, or of 1024 as from QEMU 10 on.
    return int(peek(machine, 0x11000), 16) >> 16 | int(peek(machine, 0x15000), 16) >> 16


def test_balloon_takes_pages_of_a_machine_that_has_booted(eager: QemuInstance) -> None:
    """As a proof that the guest of these tests does what it is to do."""
    eager.machine.execute("device_add", BALLOON)
    assert becomes(lambda: peek(eager, 0x30000) == "0x00000000")


def test_copy_cannot_change_kept_memory_by_what_it_writes(cloud: Qemu, eager: QemuInstance) -> None:
    saved = save(eager)
    before = facts(saved.memory)
    copy = cloud.launch(str(saved.image))
    copy.machine.execute("system_reset")
    assert becomes(lambda: "SeaBIOS" in copy.console_log())
    assert runs(copy)
    assert facts(saved.memory) == before


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("device_add", BALLOON),
        ("device_add", {**BALLOON, "driver": "virtio-balloon-pci-transitional"}),
        ("device_add", {"driver": "virtio-mem-pci", "memdev": "more"}),
        ("device_add", {"driver": "vhost-user-fs-pci", "chardev": "more"}),
        ("netdev_add", {"type": "vhost-user", "id": "more", "chardev": "more"}),
        ("human-monitor-command", {"command-line": "device_add virtio-balloon,addr=0x10"}),
        ("balloon", {"value": 1 << 20}),
    ],
)
def test_copy_is_given_no_balloon_while_it_runs(
    cloud: Qemu, eager: QemuInstance, command: str, arguments: Mapping[str, Any]
) -> None:
    saved = save(eager)
    before = facts(saved.memory)
    copy = cloud.launch(str(saved.image))
    with pytest.raises(KeptMemoryError, match=f"{copy.name} runs on saved memory"):
        copy.machine.execute(command, arguments)
    with pytest.raises(KeptMemoryError):
        cloud.get_instance(copy.id).machine.execute(command, arguments)
    assert runs(copy)
    assert facts(saved.memory) == before


def test_machine_that_was_saved_is_given_one_again(eager: QemuInstance) -> None:
    """What it goes on from is its own: the kept memory is a copy of that."""
    saved = save(eager)
    before = facts(saved.memory)
    eager.machine.execute("device_add", BALLOON)
    assert becomes(lambda: used(eager) == 1)
    assert facts(saved.memory) == before


def test_kept_memory_is_opened_for_reading_alone_where_qemu_can(
    cloud: Qemu, eager: QemuInstance
) -> None:
    """Then not even who talks to QEMU itself can let a copy change it."""
    read_only = find_features(Path(cloud.qemu_binary)).read_only_memory
    saved = save(eager)
    before = facts(saved.memory)
    copy = cloud.launch(str(saved.image))
    assert opened_for(copy, saved.memory) == (os.O_RDONLY if read_only else os.O_RDWR)

    plug_by_others(copy)

    # Before 8.2, QEMU punches the pages out of the file; later copies notice that.
    assert (facts(saved.memory) == before) is read_only
    found = savedmachine.find(saved.image)
    assert found is not None
    assert (found.find_obstacle(saved.host) is None) is read_only


def opened_for(machine: QemuInstance, file: Path) -> int:
    """Say how a machine's QEMU has a file open."""
    process = Path(f"/proc/{machine.machine.pid}")
    (number,) = (
        link.name for link in (process / "fd").iterdir() if str(link.readlink()) == str(file)
    )
    text = (process / "fdinfo" / number).read_text()
    return int(re.findall(r"flags:\s+([0-7]+)", text)[0], 8) & os.O_ACCMODE


WAYS = {
    "alias": (["-device", "virtio-balloon"], "virtio-balloon-pci"),
    "options": (
        ["-device", "virtio-balloon-pci,id=b,free-page-reporting=on,deflate-on-oom=on"],
        "virtio-balloon-pci",
    ),
    "transitional": (
        ["-device", "virtio-balloon-pci-transitional"],
        "virtio-balloon-pci-transitional",
    ),
    "json": (
        ["-device", '{"driver": "virtio-balloon-pci-non-transitional"}'],
        "virtio-balloon-pci-non-transitional",
    ),
    "driver=": (["-device", "driver=virtio-balloon-pci"], "virtio-balloon-pci"),
    "file": (["-readconfig", "machine.cfg"], "virtio-balloon-pci"),
    "behind a bridge": (
        ["-device", "pci-bridge,chassis_nr=1,id=br", "-device", "virtio-balloon,bus=br"],
        "virtio-balloon-pci",
    ),
    "virtio-mem": (
        [
            "-m",
            "65544K,slots=2,maxmem=1G",
            "-object",
            "memory-backend-ram,id=v,size=64M",
            "-device",
            "virtio-mem-pci,memdev=v",
        ],
        "virtio-mem-pci",
    ),
    "shared memory": (
        ["-object", "memory-backend-memfd,id=more,size=4M"],
        r"shared memory beside its own \(more\)",
    ),
}


def in_directory(arguments: list[str], directory: Path) -> list[str]:
    file = directory / "machine.cfg"
    file.write_text('[device "b"]\n  driver = "virtio-balloon-pci"\n')
    return [str(file) if argument == file.name else argument for argument in arguments]


@pytest.mark.parametrize("way", WAYS)
def test_machine_with_a_balloon_is_not_saved(
    way: str, cloud: Qemu, tiny_image: Path, tmp_path: Path
) -> None:
    arguments, device = WAYS[way]
    given = in_directory(arguments, tmp_path)
    machine = cloud.launch(str(tiny_image), SMALL, launch_args=given)
    with pytest.raises(KeptMemoryError, match=f"^{machine.name} has .*{device}"):
        checkpoint.save(machine.machine, "saved.img", ask_helper=None)
    assert runs(machine)
    assert not (machine.instance_dir.parent / "snapshots").exists()


@pytest.mark.parametrize("way", ["alias", "file"])
def test_copy_with_a_balloon_boots(
    way: str, cloud: Qemu, eager: QemuInstance, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that was saved by an earlier version; its guest would take the memory of all."""
    saved = save(eager)
    given = [
        f"{argument},addr=0x10" if argument == "virtio-balloon" else argument
        for argument in in_directory(WAYS[way][0], tmp_path)
    ]
    add_launch_args(saved, given)
    before = facts(saved.memory)

    copy = cloud.launch(str(saved.image))

    assert "cannot be restored here: " in caplog.text
    assert f"{copy.name} has a device virtio-balloon-pci" in caplog.text
    assert becomes(lambda: "Booting from Hard Disk" in copy.console_log())
    assert facts(saved.memory) == before


def add_launch_args(saved: SavedMachine, arguments: list[str]) -> None:
    file = saved.directory / "saved.json"
    kept = json.loads(file.read_text())
    kept["spec"]["launch_args"] = arguments
    file.write_text(json.dumps(kept))


@pytest.mark.usefixtures("emptied")
def test_machine_with_a_balloon_is_not_kept_ready(
    cloud: Qemu, tiny_image: Path, cache: WarmCache, caplog: pytest.LogCaptureFixture
) -> None:
    """It boots at each launch, and nobody waits for it to be ready first."""
    arguments = ["-device", "virtio-balloon"]
    machines = [
        cloud.launch(str(tiny_image), SMALL, launch_args=arguments, warm=True) for _ in range(2)
    ]
    assert cache.entries() == []
    assert f"{machines[0].name} is not kept for later launches: " in caplog.text
    assert "Nothing is kept ready: " in caplog.text
    assert all(map(runs, machines))


class FakeQemu:
    """A QEMU that has a device or a network which needs another process.

    Attributes:
        device: The device's type.
        networks: What HMP tells of its networks.
    """

    def __init__(self, device: str = "scsi-hd", networks: str = "") -> None:
        self.device = device
        self.networks = networks

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Answer as QEMU 7.2 does."""
        if command == "qom-list":
            return [
                {"name": "type", "type": "string"},
                {"name": "device[0]", "type": f"child<{self.device}>"},
            ]
        if command == "human-monitor-command":
            return self.networks
        assert command == "query-memdev"
        return [{"id": BACKEND, "share": True}, {"share": False}]


@pytest.mark.parametrize(
    ("qemu", "told"),
    [
        (FakeQemu("vhost-user-fs-pci"), "a device vhost-user-fs-pci"),
        (FakeQemu("vhost-user-blk-pci-non-transitional"), "vhost-user-blk-pci-non-transitional"),
        (FakeQemu("x-pci-proxy-dev"), "a device x-pci-proxy-dev"),
        (
            FakeQemu(networks="net9: index=0,type=vhost-user,chardev=more\r\n"),
            "a network of type vhost-user",
        ),
    ],
)
def test_process_that_is_handed_the_memory_is_told(qemu: FakeQemu, told: str) -> None:
    """It maps the file as it likes, and writes into it."""
    with pytest.raises(KeptMemoryError, match=f"^vm has .*{told}"):
        check_machine("vm", qemu)


def test_devices_that_leave_memory_alone_are_not_told() -> None:
    check_machine("vm", FakeQemu(networks="net0: index=0,type=user,net=10.0.2.0\r\n"))
    check_command("vm", FakeQemu(), "device_add", {"driver": "virtio-net-pci"})
