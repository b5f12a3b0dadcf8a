"""What the tests of the command line share: a run of it, and machines that are only files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from pycloudlib.cli.app import main
from pycloudlib.qemu.disk.diskimage import BaseImage, create_overlay
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.parts.standard import InstanceType
from pycloudlib.qemu.state.rundir import LoginFacts, RunDirectory
from pycloudlib.qemu.state.spec import MachineSpec


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    """Run the command line in this process."""
    capsys.readouterr()
    code = main(arguments)
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


def make_machine(working_dir: Path, name: str, *, tag: str = "cli", base: Path) -> RunDirectory:
    """Make the directory of a machine that is off."""
    rundir = RunDirectory(working_dir / f"pycl-qemu-{tag}" / name)
    rundir.path.mkdir(parents=True)
    create_overlay(BaseImage(base, "qcow2", 1 << 20), rundir.disk, unopened=True)
    rundir.write_spec(
        MachineSpec(
            name=name,
            instance_type=InstanceType(2, 2048),
            accelerator=Accelerator.TCG,
            disk=rundir.disk,
            seed=None,
            ssh_port=18090,
            telnet_port=18091,
            mac="52:54:00:00:00:01",
        )
    )
    rundir.write_login(LoginFacts("ubuntu", None, "/keys/id"))
    return rundir
