"""The machines that exist, which of them a name means, and the values that options take.

Listing machines neither asks QEMU nor loads heavy modules, so that it is quick.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from pycloudlib import Qemu
from pycloudlib._base.deadline import positive
from pycloudlib._base.documents import nearest
from pycloudlib.cli.common import Session
from pycloudlib.cli.names import find_working_dir
from pycloudlib.errors import CloudError, InstanceNotFoundError
from pycloudlib.qemu import imagenames
from pycloudlib.qemu.cloud import Disk
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.host.ownership import Ownership
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.settings import COMMAND_LINE_TAG
from pycloudlib.qemu.state.spec import MachineSpec, check_name, may_be_machine
from pycloudlib.qemu.vm import livedisk

if TYPE_CHECKING:
    _Integer = click.ParamType[int]
    _Number = click.ParamType[float]
    _Text = click.ParamType[str]
    _Disk = click.ParamType[Disk]
else:  # older versions of click are not generic
    _Integer = _Number = _Text = _Disk = click.ParamType

_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}
_DISK_OPTION = re.compile(r"(?P<what>.*),(?:serial=(?P<serial>[^,]+)|write)")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT])(?:i?B)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class MachineEntry:
    """A machine in the list of machines.

    Attributes:
        tag: The tag of its cloud.
        rundir: Its directory.
        spec: Its specification; None while it is launched, or if its launch was interrupted or its
            specification is damaged.
        problem: Why it cannot be used; empty if it can.
    """

    tag: str
    rundir: RunDirectory
    spec: MachineSpec | None
    problem: str = ""

    @property
    def name(self) -> str:
        """Its name in its cloud."""
        return self.rundir.path.name

    @property
    def full_name(self) -> str:
        """Its name on the command line; with the cloud of a machine of another program."""
        return self.name if self.tag == COMMAND_LINE_TAG else f"{self.tag}/{self.name}"

    @property
    def id(self) -> str:
        """Its id for `Qemu.get_instance`; empty if it cannot be used."""
        return "" if self.spec is None else self.rundir.instance_id(self.spec)

    @property
    def pid(self) -> int | None:
        """The process id of its QEMU; None if it is off."""
        process = livedisk.find_process(self.rundir)
        return None if process is None else process.pid

    @property
    def place(self) -> str:
        """Where it runs, or may run, if that cannot be seen from here; else empty."""
        process = livedisk.find_elsewhere(self.rundir)
        return "" if process is None else process.place

    @property
    def state(self) -> str:
        """`running`, `off`, `starting`, `elsewhere` or `broken`, without asking QEMU."""
        if self.problem:
            return "broken"
        if self.spec is None:
            return "starting"
        if self.pid is not None:
            return "running"
        return "elsewhere" if self.place else "off"


def list_machines(working_dir: Path, *, everywhere: bool = False) -> list[MachineEntry]:
    """List the machines of the command line, or those of all clouds, sorted by name."""
    found = []
    for parent in layers.cloud_directories(working_dir):
        tag = layers.cloud_tag(parent)
        if everywhere or tag == COMMAND_LINE_TAG:
            found += [_describe(tag, path) for path in _directories(parent)]
    return sorted(found, key=lambda entry: (entry.tag != COMMAND_LINE_TAG, entry.tag, entry.name))


def _directories(parent: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):  # its cloud has just cleaned up
        for path in parent.iterdir():
            if path.is_dir() and may_be_machine(path.name):
                yield path


def _describe(tag: str, path: Path) -> MachineEntry:
    rundir = RunDirectory(path)
    try:
        livedisk.recover_abandoned(rundir)
        return MachineEntry(tag, rundir, rundir.read_spec())
    except InstanceNotFoundError as error:
        owner = Ownership.find(path)
        begins = owner is not None and owner.process.alive
        return MachineEntry(tag, rundir, None, "" if begins else str(error))


def find_machine(working_dir: Path, name: str) -> MachineEntry:
    """Return the machine that a name means: one of the command line's, or `CLOUD/NAME`.

    Raises:
        InstanceNotFoundError: No machine has that name; suggests the nearest.
    """
    machines = list_machines(working_dir, everywhere=True)
    for machine in machines:
        if name in (machine.full_name, f"{machine.tag}/{machine.name}"):
            return machine
    names = [machine.full_name for machine in machines]
    others = [machine.full_name for machine in machines if machine.name == name]
    raise InstanceNotFoundError(
        resource_name=name, message=f"There is no machine {name!r}{_hint(name, names, others)}"
    )


def _hint(name: str, names: Sequence[str], others: Sequence[str]) -> str:
    if others:
        return f"; another program's is called {others[0]!r}"
    near = nearest(name, names)
    if near:
        return f"; did you mean {near!r}?"
    own = [known for known in names if "/" not in known]
    return f"; there are: {', '.join(own)}" if own else "; there are none ('pycloudlib launch')"


def open_machine(cloud: Qemu, name: str) -> QemuInstance:
    """Return the instance of the machine that a name means.

    Raises:
        InstanceNotFoundError: No machine has that name; suggests the nearest.
        CloudError: The machine cannot be used; says why.
    """
    found = find_machine(cloud.working_dir, name)
    if found.problem:
        raise CloudError(
            f"{name} is broken: {found.problem}. 'pycloudlib delete {name}' removes it"
        )
    if found.spec is None:
        raise CloudError(f"{name} is being launched by another process")
    if found.tag != cloud.tag:
        # So that its snapshots and copies belong to its own cloud.
        cloud = Qemu(found.tag, timestamp_suffix=False, orphans="keep")
    instance = cloud.get_instance(found.id)
    instance.keep_connection()
    return instance


def open_running(session: Session, name: str) -> QemuInstance:
    """Return the instance of a machine that is about to be used; a copy is fixed up before.

    Errors are those of `open_machine`.
    """
    instance = open_machine(session.cloud, name)
    instance.machine.refresh()
    instance.guest.fixes.fix_up_soon()
    return instance


def delete_machine(cloud: Qemu, name: str) -> list[Exception]:
    """Delete the machine that a name means, even a broken one; return the errors.

    Raises:
        InstanceNotFoundError: No machine has that name; suggests the nearest.
    """
    found = find_machine(cloud.working_dir, name)
    if not found.problem:
        errors = open_machine(cloud, name).delete()
        with contextlib.suppress(OSError):  # it has other files
            found.rundir.path.parent.rmdir()
        return errors
    try:
        with found.rundir.lock():
            livedisk.end_process(found.rundir)
            found.rundir.remove()
    except InstanceNotFoundError:
        pass  # another process was quicker
    except (OSError, CloudError) as error:
        return [error]
    return []


def free_names(working_dir: Path, prefix: str) -> Iterator[str]:
    """Yield the names `PREFIX-1`, `PREFIX-2` … that no machine of the command line has."""
    taken = {machine.name for machine in list_machines(working_dir)}
    names = (f"{prefix[:55]}-{number}" for number in itertools.count(1))
    return (name for name in names if name not in taken)


class Size(_Integer):
    """A size of memory or disk, converted to a whole number of a unit.

    Args:
        unit: `M` for MiB, `G` for GiB.
    """

    name = "size"

    def __init__(self, unit: str) -> None:
        self._unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert it."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(
                f"{value!r} is no size: expected a number with K, M, G or T, such as 2G or 512M",
                param,
                ctx,
            )
        size = float(match[1]) * (1 << _UNITS[match[2].upper()])
        whole = size / (1 << _UNITS[self._unit])
        if whole != int(whole) or whole < 1:
            self.fail(f"{value!r} is not a whole number of {self._unit}iB, 1 at least", param, ctx)
        return int(whole)


class AddedDisk(_Disk):
    """A further disk: a size or the path of an image, then `,serial=NAME` and `,write`."""

    name = "size|path[,serial=NAME][,write]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Disk:
        """Convert it."""
        if isinstance(value, Disk):
            return value
        what, serial, write = str(value), None, False
        # From the end, as a path may have commas.
        while (match := _DISK_OPTION.fullmatch(what)) is not None:
            what = match["what"]
            write = write or match["serial"] is None
            serial = match["serial"] or serial
        if _SIZE.fullmatch(what.strip()):
            return Disk(Size("G").convert(what, param, ctx), serial, write=write)
        if not what:
            self.fail(f"{value!r} is no disk: expected a size such as 20G, or a path", param, ctx)
        return Disk(serial=serial, path=what, write=write)


class Minutes(_Number):
    """A limit of time."""

    name = "minutes"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Convert it."""
        try:
            return positive("it", float(value), self.name)
        except ValueError:
            self.fail(f"{value!r} is no time: expected a positive number of minutes", param, ctx)


class NewName(_Text):
    """The name of a new machine."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Convert it."""
        try:
            return check_name(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ImageName(_Text):
    """A release, a snapshot, or the path of an image."""

    name = "image"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete it; the shell completes paths."""
        names = [*imagenames.known_releases(), *_snapshots()]
        fitting = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return fitting or [CompletionItem(incomplete, type="file")]


def _snapshots() -> list[str]:
    working_dir = find_working_dir()
    return [] if working_dir is None else imagenames.snapshot_names(working_dir)
