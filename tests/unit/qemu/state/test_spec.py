from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.parts.standard import InstanceType, KernelBoot
from pycloudlib.qemu.state.spec import (
    LAYERS,
    SNAPSHOTS,
    MachineSpec,
    check_name,
    complete_cmdline,
    make_mac,
    make_name,
    may_be_machine,
)

HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@pytest.mark.parametrize(
    ("text", "cpus", "memory_mib"),
    [("c1m1500", 1, 1500), ("c2m2048", 2, 2048), ("c16m65536", 16, 65536), ("c1m1", 1, 1)],
)
def test_instance_type_is_read(text: str, cpus: int, memory_mib: int) -> None:
    instance_type = InstanceType.parse(text)

    assert instance_type == InstanceType(cpus, memory_mib)
    assert str(instance_type) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "c1",
        "m1500",
        "c1m",
        "cm1500",
        "c0m1500",
        "c1m0",
        "c-1m1500",
        "c1m-5",
        "c1.5m1500",
        "c1m1500M",
        "C1M1500",
        "c1 m1500",
        " c1m1500",
        "c1m1500\n",
        "c٣m1500",
        "t2.micro",
        "m1500c1",
    ],
)
def test_instance_type_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="instance_type") as caught:
        InstanceType.parse(text)

    assert repr(text) in str(caught.value)
    assert "c<cpus>m<MiB" in str(caught.value), "what is expected is not told"


@pytest.mark.parametrize("value", [5, b"c1m1500", ["c1m1500"]])
def test_instance_type_that_is_no_text_is_refused(value: object) -> None:
    with pytest.raises((ValueError, TypeError), match="instance_type"):
        InstanceType.parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tag", ["a", "my-tests", "x" * 63, "x" * 53 + "-" + "y" * 9, "a" + "-" * 61 + "b", "24"]
)
def test_name_is_a_host_name_for_every_tag(tag: str) -> None:
    name = make_name(tag)

    assert len(name) <= 63
    assert HOST_NAME.fullmatch(name), name
    assert name.startswith(tag[:20].rstrip("-"))


@pytest.mark.parametrize("name", ["a", "web-1", "24", "x" * 63])
def test_host_names_can_be_chosen(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "../a", "a\n", "x" * 64, "ä", "a b"]
)
def test_name_that_is_no_host_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected a host name"):
        check_name(name)


@pytest.mark.parametrize("name", ["layers", "snapshots"])
def test_name_of_a_cloud_s_own_directory_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="directory of theirs"):
        check_name(name)


@pytest.mark.parametrize(
    "directory",
    [LAYERS, SNAPSHOTS, ".keys-0123abcd", ".web.17-4.new", "keys-1", "warm", "24"],
)
def test_name_is_refused_or_found(directory: str) -> None:
    """What a machine may be called is what is taken for one, and the other way round."""
    try:
        check_name(directory)
    except ValueError:
        refused = True
    else:
        refused = False
    assert may_be_machine(directory) is not refused


def test_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(TypeError, match="name must be a text"):
        check_name(5)  # type: ignore[arg-type]


def test_names_of_one_tag_differ() -> None:
    assert len({make_name("x" * 63) for _ in range(100)}) == 100


def test_network_address_is_a_local_unicast_one() -> None:
    addresses = {make_mac() for _ in range(100)}

    assert len(addresses) == 100
    assert all(re.fullmatch(r"52:54:00(:[0-9a-f]{2}){3}", address) for address in addresses)


@pytest.mark.parametrize(
    "cmdline", ["", "quiet splash", "rootflags=ro", "consoleblank=0 netroot=x"]
)
def test_kernel_command_line_gets_what_it_lacks(cmdline: str) -> None:
    words = complete_cmdline(cmdline).split()

    assert words[: len(cmdline.split())] == cmdline.split()
    assert [word for word in words if word.startswith("root=")] == ["root=LABEL=cloudimg-rootfs"]
    assert any(word.startswith("console=ttyS0") for word in words)


def test_own_root_is_left_alone() -> None:
    words = complete_cmdline("root=/dev/sda1").split()

    assert [word for word in words if word.startswith("root=")] == ["root=/dev/sda1"]
    assert any(word.startswith("console=") for word in words)


def test_own_console_is_left_alone() -> None:
    words = complete_cmdline("console=hvc0").split()

    assert [word for word in words if word.startswith("console=")] == ["console=hvc0"]
    assert any(word.startswith("root=") for word in words)


def test_complete_command_line_stays_as_it_is() -> None:
    cmdline = 'root=UUID=1-2 console=ttyS0,115200 systemd.log_level="debug"'

    assert complete_cmdline(cmdline) == cmdline


def make_spec(
    *,
    accelerator: Accelerator = Accelerator.TCG,
    seed: Path | None = None,
    kernel_boot: KernelBoot | None = None,
    launch_args: tuple[str, ...] = (),
) -> MachineSpec:
    return MachineSpec(
        name="vm-1",
        instance_type=InstanceType(2, 2048),
        accelerator=accelerator,
        disk=Path("/run/vm-1/grüß, disk.qcow2"),
        seed=seed,
        ssh_port=18000,
        telnet_port=18001,
        mac="52:54:00:00:00:01",
        kernel_boot=kernel_boot,
        launch_args=launch_args,
    )


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(),
        make_spec(accelerator=Accelerator.KVM),
        make_spec(seed=Path("/run/vm-1/seed.iso")),
        make_spec(kernel_boot=KernelBoot(Path("/vmlinuz"), None, "root=/dev/sda1")),
        make_spec(kernel_boot=KernelBoot(Path("/vmlinuz"), Path("/initrd"), 'a="b c"')),
        make_spec(launch_args=("-device", "pvpanic", "", "ü")),
    ],
)
def test_description_survives_being_written_down(spec: MachineSpec) -> None:
    text = spec.to_json()

    assert isinstance(json.loads(text), dict)
    assert MachineSpec.from_json(text) == spec
