"""What a failed test tells of its machines, and how to get into those that are kept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pycloudlib.qemu import layers
from pycloudlib.qemu.artifacts import keep_artifacts
from pycloudlib.qemu.instance import QemuInstance


def tell_of(machine: QemuInstance, report: pytest.TestReport) -> None:
    """Add to a test's report what is going on with a machine."""
    report.sections.append((f"machine {machine.name}", _diagnose(machine)))


def save_artifacts(
    machine: QemuInstance, report: pytest.TestReport, error: BaseException, directory: Path
) -> None:
    """Keep logs and more of a machine, and add to a test's report where.

    Args:
        machine: The machine.
        report: The report of a failure.
        error: What the test failed with.
        directory: Where the test's directory goes.
    """
    try:
        place = directory / directory_name(report.nodeid)
        more = {"diagnosis.txt": _diagnose(machine) + "\n"}
        told = str(keep_artifacts(place, machine.machine, error, more))
    except Exception as problem:  # noqa: BLE001 - it is the test's failure that is reported
        told = f"not all could be kept: {type(problem).__name__}: {problem}"
    report.sections.append((f"machine {machine.name}: artifacts", told))


def _diagnose(machine: QemuInstance) -> str:
    try:
        return machine.diagnose().tell()
    except Exception as problem:  # noqa: BLE001 - it is the test's failure that is reported
        return f"Nothing is known of it: {type(problem).__name__}: {problem}"


def tell_kept(machine: QemuInstance) -> str:
    """Tell how to get into a machine that is kept."""
    name = f"{layers.cloud_tag(machine.instance_dir.parent)}/{machine.name}"
    return (
        f"pycloudlib shell {name}\n"
        f"pycloudlib delete {name} && pycloudlib prune   when it is not needed any more"
    )


def directory_name(nodeid: str) -> str:
    """Make a directory's name of a test's."""
    return re.sub(r"[^A-Za-z0-9_.=,-]+", "-", nodeid).strip("-.")[:150]
