"""What a failed test tells of its machines, and how to get into those that are kept."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pycloudlib.qemu import layers
from pycloudlib.qemu.artifacts import keep_artifacts
from pycloudlib.qemu.instance import QemuInstance


def tell_of(
    machine: QemuInstance, report: pytest.TestReport, error: BaseException, artifacts: Path | None
) -> None:
    """Add to a test's report what is known of a machine.

    Args:
        machine: The machine.
        report: The report of a failure.
        error: What the test failed with.
        artifacts: Where logs go; None for nowhere.
    """
    try:
        # The text of an error of the machine tells it already.
        if getattr(error, "diagnosis", None) is None:
            report.sections.append((f"machine {machine.name}", machine.diagnose().tell()))
        if artifacts is not None:
            kept = keep_artifacts(artifacts / directory_name(report.nodeid), machine.machine, error)
            report.sections.append((f"machine {machine.name}: artifacts", str(kept)))
    except Exception as problem:  # noqa: BLE001 - it is the test's failure that is reported
        text = f"{type(problem).__name__}: {problem}"
        report.sections.append((f"machine {machine.name}: nothing is known", text))


def tell_kept(machine: QemuInstance) -> str:
    """Tell how to get into a machine that is kept."""
    name = f"{layers.cloud_tag(machine.instance_dir.parent)}/{machine.name}"
    key = str(machine.key_pair.private_key_path)
    ssh = ["ssh", "-p", machine.port, "-i", key, f"{machine.username}@127.0.0.1"]
    return (
        f"pycloudlib shell {name}    or: {shlex.join(ssh)}\n"
        f"pycloudlib delete {name}   when it is not needed any more"
    )


def directory_name(nodeid: str) -> str:
    """Make a directory's name of a test's."""
    return re.sub(r"[^A-Za-z0-9_.=,-]+", "-", nodeid).strip("-.")[:150]
