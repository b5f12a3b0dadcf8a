from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest

from pycloudlib.qemu.host.accelerator import Accelerator, Features
from pycloudlib.qemu.parts.part import Channels, Memory, Origin
from pycloudlib.qemu.parts.standard import InstanceType, KernelBoot
from pycloudlib.qemu.state.spec import MachineSpec
from pycloudlib.qemu.vm.process import build_command

CHANNELS = Channels(
    control=5, listeners={"attach": 8, "qmp": 6, "console": 7, "helper": 9}, memory=10
)
SPEC = MachineSpec(
    name="vm-1",
    instance_type=InstanceType(2, 2048),
    accelerator=Accelerator.TCG,
    disk=Path("/run/vm/vm.qcow2"),
    seed=Path("/run/vm/seed.iso"),
    ssh_port=18004,
    telnet_port=18005,
    mac="52:54:00:01:02:03",
    without=Accelerator.TCG.slow_features,
)
FULL = dataclasses.replace(
    SPEC,
    kernel_boot=KernelBoot(
        Path("/images/vmlinuz"), Path("/images/initrd"), "root=/dev/sda1 console=ttyS0"
    ),
    launch_args=("-device", "pvpanic"),
)

# fmt: off
GOLDEN = [
    "/usr/bin/qemu-system-x86_64",
    "-name", "guest=vm-1",
    "-no-user-config", "-nodefaults",
    "-machine", "pc,graphics=off,memory-backend=ram0",
    "-accel", "tcg,thread=multi,tb-size=256",
    "-cpu", "max,-erms,-fsrm,-fzrm,-fsrs,-fsrc",
    "-smp", "2",
    "-m", "2097160K",
    "-object", "memory-backend-file,id=ram0,size=2097160K,share=on,mem-path=/proc/self/fd/10",
    "-display", "none",
    "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    "-chardev", "socket,id=control,fd=5",
    "-mon", "chardev=control,mode=control",
    "-chardev", "socket,id=attach,fd=8,server=on,wait=off",
    "-mon", "chardev=attach,mode=control",
    "-chardev", "socket,id=qmp,fd=6,server=on,wait=off",
    "-mon", "chardev=qmp,mode=control",
    "-chardev", ("socket,id=console,fd=7,telnet=on,server=on,wait=off,"
                 "logfile=/run/vm/console.log,logappend=on"),
    "-serial", "chardev:console",
    "-device", "virtio-rng-pci",
    "-device", "vmgenid,guid=auto",
    "-device", "virtio-scsi-pci,id=scsi0",
    "-drive", ("if=none,id=root,format=qcow2,cache=unsafe,discard=unmap,"
               "file=/run/vm/vm.qcow2"),
    "-device", "scsi-hd,drive=root,bus=scsi0.0,bootindex=1",
    "-drive", "if=none,id=seed,format=raw,readonly=on,file=/run/vm/seed.iso",
    "-device", "virtio-blk-pci,drive=seed",
    "-netdev", "user,id=net0,hostfwd=tcp:127.0.0.1:18004-:22",
    "-device", "virtio-net-pci,netdev=net0,mac=52:54:00:01:02:03,romfile=",
    "-device", "virtio-serial-pci",
    "-chardev", "socket,id=helper,fd=9,server=on,wait=off",
    "-device", "virtserialport,chardev=helper,name=org.pycloudlib.helper.0",
    "-kernel", "/images/vmlinuz",
    "-initrd", "/images/initrd",
    "-append", "root=/dev/sda1 console=ttyS0",
    "-device", "pvpanic",
]
# fmt: on


def build(spec: MachineSpec = SPEC, *, sandbox: bool = True) -> list[str]:
    return build_command("/usr/bin/qemu-system-x86_64", spec, CHANNELS, Features(sandbox=sandbox))


def values_of(argv: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(argv) if name == option]


def properties_of(value: str) -> dict[str, str]:
    """Read `a=b,c=d` as QEMU does, a doubled comma being one comma."""
    parts = re.split(r"(?<!,),(?!,)|(?<=,,),(?!,)", value)
    pairs = (part.replace(",,", ",").partition("=") for part in parts)
    return {key: text for key, _, text in pairs}


def test_whole_command_line() -> None:
    assert build(FULL) == GOLDEN


@pytest.mark.parametrize("read_only", [True, False])
def test_kept_memory_is_opened_for_reading_alone_where_qemu_can(read_only: bool) -> None:
    origin = Origin(Memory(file=Path("/a,b/memory")), state=12)
    features = Features(read_only_memory=read_only)
    argv = build_command("/usr/bin/qemu-system-x86_64", SPEC, CHANNELS, features, origin)
    (backend,) = values_of(argv, "-object")
    kept = properties_of(backend)
    assert (kept["share"], kept["mem-path"]) == ("off", "/a,b/memory")
    assert (kept.get("readonly"), kept.get("rom")) == (("on", "off") if read_only else (None, None))


def test_machine_that_stops_at_its_seed_has_the_same_devices() -> None:
    binary, ordinary = "/usr/bin/qemu-system-x86_64", build()
    stopping = build_command(binary, SPEC, CHANNELS, Features(), Origin(stops_at=112))
    (seed,) = values_of(stopping, "-blockdev")
    assert properties_of(seed) == {
        "driver": "blkdebug",
        "node-name": "seed",
        "read-only": "on",
        "image.driver": "file",
        "image.read-only": "on",
        "image.filename": "/run/vm/seed.iso",
        "inject-error.0.event": "none",
        "inject-error.0.iotype": "read",
        "inject-error.0.sector": "112",
        "inject-error.0.once": "on",
        "inject-error.0.errno": "5",
    }

    def devices(argv: list[str]) -> list[str]:
        return [value.removesuffix(",rerror=stop") for value in values_of(argv, "-device")]

    assert devices(stopping) == devices(ordinary)
    assert "virtio-blk-pci,drive=seed,rerror=stop" in stopping


@pytest.mark.parametrize("spec", [SPEC, FULL, dataclasses.replace(SPEC, seed=None)])
def test_nothing_listens_beyond_the_loopback(spec: MachineSpec) -> None:
    argv = build(spec)

    forwards = [property_ for value in values_of(argv, "-netdev") for property_ in value.split(",")]
    forwards = [forward for forward in forwards if forward.startswith("hostfwd=")]
    assert forwards == ["hostfwd=tcp:127.0.0.1:18004-:22"]
    for value in values_of(argv, "-chardev"):
        properties = properties_of(value)
        assert {"host", "port", "ipv4", "ipv6"}.isdisjoint(properties), value
        assert "fd" in properties, value
    assert not {"-monitor", "-qmp", "-vnc", "-spice", "-gdb", "-s"} & set(argv)


def test_no_human_monitor_is_offered() -> None:
    argv = build(FULL)

    assert values_of(argv, "-mon")
    assert all("mode=control" in value for value in values_of(argv, "-mon"))
    assert "-nodefaults" in argv


def test_every_drive_names_its_format() -> None:
    drives = values_of(build(FULL), "-drive")

    assert len(drives) == 2
    assert all(properties_of(drive).get("format") in ("qcow2", "raw") for drive in drives)


def test_root_disk_is_a_scsi_disk_and_the_seed_a_virtio_one() -> None:
    devices = values_of(build(SPEC), "-device")

    assert any(d.startswith("scsi-hd,") and "drive=root" in d for d in devices)
    assert any(d.startswith("virtio-blk-pci,") and "drive=seed" in d for d in devices)


def test_seed_is_read_only() -> None:
    (seed,) = (d for d in values_of(build(SPEC), "-drive") if "id=seed" in d)

    assert properties_of(seed)["readonly"] == "on"


def test_machine_without_a_seed_has_one_drive() -> None:
    argv = build(dataclasses.replace(SPEC, seed=None))

    assert [properties_of(d)["id"] for d in values_of(argv, "-drive")] == ["root"]
    assert "seed" not in " ".join(argv)


def test_commas_in_paths_are_escaped() -> None:
    directory = Path("/run/a,b,,c/vm")
    spec = dataclasses.replace(SPEC, disk=directory / "d,.qcow2", seed=directory / "s.iso")
    argv = build(spec)

    for option, end in (
        ("-drive", "file=/run/a,,b,,,,c/vm/d,,.qcow2"),
        ("-drive", "file=/run/a,,b,,,,c/vm/s.iso"),
        ("-chardev", "logfile=/run/a,,b,,,,c/vm/console.log,logappend=on"),
    ):
        assert any(value.endswith(end) for value in values_of(argv, option)), end


def test_emulation_uses_all_host_threads() -> None:
    argv = build(SPEC)

    (accel,) = values_of(argv, "-accel")
    assert accel.startswith("tcg")
    assert "thread=multi" in accel


def cpu_of(spec: MachineSpec, features: Features) -> list[str]:
    return values_of(build_command("/usr/bin/qemu", spec, CHANNELS, features), "-cpu")


def test_only_features_that_qemu_knows_are_left_out() -> None:
    """QEMU does not start with the name of a feature that it does not know."""
    older = Features(slow_features=("erms", "fsrm"))
    assert cpu_of(SPEC, older) == ["max,-erms,-fsrm"]


def test_machine_of_before_keeps_its_processor() -> None:
    """A guest that was saved with a feature uses it when it is restored."""
    described = json.loads(SPEC.to_json())
    del described["without"]
    before = MachineSpec.from_json(json.dumps(described))
    assert cpu_of(before, Features()) == ["max"]


def test_kvm_gets_the_hosts_processor() -> None:
    argv = build(
        dataclasses.replace(
            SPEC, accelerator=Accelerator.KVM, without=Accelerator.KVM.slow_features
        )
    )

    assert values_of(argv, "-accel") == ["kvm"]
    assert values_of(argv, "-cpu") == ["host"]


def test_sandbox_is_left_out_where_qemu_has_none() -> None:
    with_sandbox, without = build(FULL), build(FULL, sandbox=False)

    assert "-sandbox" not in without
    position = with_sandbox.index("-sandbox")
    assert without == with_sandbox[:position] + with_sandbox[position + 2 :]


def test_machine_boots_from_its_disk_unless_a_kernel_is_given() -> None:
    assert not {"-kernel", "-initrd", "-append"} & set(build(SPEC))


def test_kernel_may_come_without_an_initrd() -> None:
    boot = KernelBoot(Path("/images/vmlinuz"), None, "root=/dev/sda1")
    argv = build(dataclasses.replace(SPEC, kernel_boot=boot))

    assert values_of(argv, "-kernel") == ["/images/vmlinuz"]
    assert values_of(argv, "-append") == ["root=/dev/sda1"]
    assert "-initrd" not in argv


def test_callers_arguments_come_last() -> None:
    assert build(FULL)[-2:] == ["-device", "pvpanic"]
