"""Saved machines with the QEMU that is installed and, where it can be had, with a newer one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.qemu.state.settings import DEFAULT_BINARY
from tests.qemu.conftest import UNSTARTED, CloudMaker
from tests.qemu.machines import SMALL, hurry, runs, save
from tests.qemu.reader import prints

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("own_ports")]


def test_copy_of_a_copy_reboots(cloud_of_each_qemu: Qemu, reader_image: Path) -> None:
    """A QEMU that is given a state has its firmware from there: without it, none boots again."""
    cloud = cloud_of_each_qemu
    machine = hurry(cloud.launch(str(reader_image), SMALL, user_data="mine"))
    assert prints(machine, "mine")
    copy = hurry(cloud.launch(str(save(machine).image)))
    assert runs(machine)
    copy_of_copy = hurry(cloud.launch(str(save(copy).image)))
    for each in (machine, copy, copy_of_copy):
        assert runs(each)
        printed = each.machine.rundir.console_log.read_bytes().count(b">mine\n")
        each.machine.execute("system_reset")
        assert prints(each, "mine", printed + 1)


@pytest.mark.thorough
def test_newest_qemu_is_newer_than_the_installed_one(
    make_cloud: CloudMaker, tiny_image: Path, newest_qemu: Path
) -> None:
    def version(binary: object) -> tuple[int, int, int]:
        cloud = make_cloud(more=f'accelerator = "tcg"\nqemu_binary = "{binary}"\n')
        machine = cloud.launch(str(tiny_image), SMALL, launch_args=UNSTARTED).machine
        said = machine.execute("query-version")["qemu"]
        return said["major"], said["minor"], said["micro"]

    assert version(newest_qemu) > version(DEFAULT_BINARY)
