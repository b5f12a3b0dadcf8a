"""The machines of tests: copies of machines that were booted once and saved; reports on them."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest

from pycloudlib import Qemu
from pycloudlib.images import store
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.failure.explaining import keep_artifacts
from pycloudlib.qemu.host.budget import Budget, Capacity
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.parts.standard import InstanceType
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import make_name
from pycloudlib.util import raise_cleanup_errors

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The machine that a test wants.

    Attributes:
        image: The id of its image, or of a saved machine.
        instance_type: Its size; None for the default, or that of the saved machine.
        user_data: For cloud-init.
    """

    image: str
    instance_type: str | None = None
    user_data: str | bytes | None = None


class VmFactory(Protocol):
    """Makes machines for a test; the defaults are those of the test's marker `vm`."""

    def __call__(
        self,
        image: str | None = None,
        instance_type: str | None = None,
        user_data: str | bytes | Path | None = None,
        **options: Any,
    ) -> QemuInstance:
        """Return a machine that is ready; it is deleted after the test.

        Args:
            image: The name of an image (`noble`, `bookworm`, a snapshot of the command line), its
                id, or a path.
            instance_type: `c<cpus>m<MiB of memory>`.
            user_data: For cloud-init; a path is read.
            **options: Further options of `Qemu.launch`. Unless `warm=False` is among them, the
                machine is a copy of one that was launched with the same options once.

        Raises:
            ImageNotFoundError: There is no such image.
            PycloudlibException: The launch failed, or the machine did not get ready; as
                `Qemu.launch` and `QemuInstance.wait`.
        """


class PrepareVm(Protocol):
    """Prepares a machine and saves it, for tests that start from that state."""

    def __call__(
        self,
        prepare: Callable[[QemuInstance], object],
        image: str | None = None,
        instance_type: str | None = None,
        user_data: str | bytes | None = None,
    ) -> str:
        """Return the image of a prepared machine, for `vm_factory`; it lives for the session.

        Args:
            prepare: Called with the machine, to prepare it.
            image: As in `VmFactory`.
            instance_type: As in `VmFactory`.
            user_data: For cloud-init.

        Raises:
            ImageNotFoundError: There is no such image.
            PycloudlibException: The launch failed, or the machine did not get ready or could not
                be saved.
        """


@dataclass
class InUse:
    """The machines that one test uses.

    Attributes:
        test: The name of the test, which begins the names of its machines.
        machines: The machines.
        ending: Cleans up after the test.
        kept: The machines that are not deleted, since the test failed and the user examines them.
    """

    test: str
    machines: list[QemuInstance] = field(default_factory=list)
    ending: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    kept: list[QemuInstance] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Shared:
    """A machine that tests use one after another.

    Attributes:
        machine: The machine.
        start: The image of the snapshot to which it is rolled back.
    """

    machine: QemuInstance
    start: str


class Machines:
    """Makes machines for tests, within a budget, and deletes them afterwards.

    Args:
        cloud: The cloud of the machines.
        budget: What the machines of all test processes may use at once.
        instance_type: The default size.
        on_wait: Called if a machine does not fit yet, with who has reserved the budget.
        kept_mib: Memory, in MiB, that the kept machines may have together.
    """

    def __init__(
        self,
        cloud: Qemu,
        budget: Budget,
        instance_type: str,
        on_wait: Callable[[str], None],
        kept_mib: int,
    ) -> None:
        self._cloud = cloud
        self._budget = budget
        self._instance_type = instance_type
        self._on_wait = on_wait
        self._kept_mib = kept_mib
        self._shared: dict[Wanted, _Shared] = {}

    def make(self, wanted: Wanted, in_use: InUse, options: dict[str, Any]) -> QemuInstance:
        """Return a new machine for a test.

        One that does not get ready lives until the end of the test, too, for the report.

        Args:
            wanted: Which machine.
            in_use: The machines of the test.
            options: Further options of the launch.
        """
        saved = self._find_saved(wanted)
        in_use.ending.enter_context(self._reserving(wanted, saved))
        options = {"name": name_machine(in_use.test), **options}
        machine = self._launch(wanted, saved, in_use, options)
        in_use.ending.callback(self._dispose, machine, in_use)
        machine.wait()
        return machine

    def share(self, wanted: Wanted, in_use: InUse) -> QemuInstance:
        """Return the machine that tests with the same wishes share, rolled back to its start.

        Between tests it is off, and not part of the budget.
        """
        saved = self._find_saved(wanted)
        in_use.ending.enter_context(self._reserving(wanted, saved))
        shared = self._roll_back(wanted) or self._make_shared(wanted, saved, in_use)
        in_use.ending.callback(self._park, wanted, in_use)
        if shared.machine not in in_use.machines:
            in_use.machines.append(shared.machine)
        return shared.machine

    def prepare(self, wanted: Wanted, prepare: Callable[[QemuInstance], object]) -> str:
        """Prepare a machine, save it, and return the image."""
        in_use = InUse(getattr(prepare, "__name__", "prepared"))
        with in_use.ending:
            machine = self.make(wanted, in_use, {})
            prepare(machine)
            return self._cloud.snapshot(machine, memory=True)

    def keep(self, machine: QemuInstance, in_use: InUse) -> bool:
        """Keep a machine after the tests; return False if too many are kept already."""
        size = machine.machine.spec.instance_type.memory_mib
        if size > self._kept_mib:
            return False
        self._kept_mib -= size
        in_use.kept.append(machine)
        return True

    def _dispose(self, machine: QemuInstance, in_use: InUse) -> None:
        if machine in in_use.kept:
            # So that cleaning the cloud does not delete it.
            self._cloud.forget(machine)
        else:
            _delete(machine)

    def _park(self, wanted: Wanted, in_use: InUse) -> None:
        machine = self._shared[wanted].machine
        if machine in in_use.kept:
            del self._shared[wanted]
            self._cloud.forget(machine)
        else:
            # Its next user finds it running: a rollback starts another QEMU in any case.
            machine.machine.kill()

    def _reserving(
        self, wanted: Wanted, saved: SavedMachine | None
    ) -> contextlib.AbstractContextManager[None]:
        given = wanted.instance_type or self._instance_type
        size = saved.spec.instance_type if saved else InstanceType.parse(given)
        return self._budget.reserving(Capacity.of_machine(size), self._on_wait)

    def _find_saved(self, wanted: Wanted) -> SavedMachine | None:
        return savedmachine.find(store.resolve(wanted.image, self._cloud.image_dir))

    def _launch(
        self,
        wanted: Wanted,
        saved: SavedMachine | None,
        in_use: InUse,
        options: dict[str, Any],
    ) -> QemuInstance:
        """Launch a copy of a saved machine, which is made first if it does not exist."""
        if saved:
            given: dict[str, Any] = {"fresh_identity": True, **options}
            if wanted.instance_type is not None:
                given["instance_type"] = wanted.instance_type
        else:
            given = {"warm": True, "fast_boot": True, **options}
            given["instance_type"] = wanted.instance_type or self._instance_type
        machine = self._cloud.launch(wanted.image, user_data=wanted.user_data, **given)
        in_use.machines.append(machine)
        return machine

    def _make_shared(self, wanted: Wanted, saved: SavedMachine | None, in_use: InUse) -> _Shared:
        machine = self._launch(wanted, saved, in_use, {"name": name_machine("shared")})
        with contextlib.ExitStack() as undo:
            undo.callback(in_use.ending.callback, self._dispose, machine, in_use)
            machine.wait()
            start = self._cloud.snapshot(machine, memory=True)
            undo.pop_all()
        shared = self._shared[wanted] = _Shared(machine, start)
        return shared

    def _roll_back(self, wanted: Wanted) -> _Shared | None:
        """Roll the shared machine back to its start; return None if there is none (any more)."""
        shared = self._shared.get(wanted)
        if shared is None:
            return None
        try:
            shared.machine.rollback(shared.start)
            shared.machine.wait()
        except Exception as error:  # noqa: BLE001 - whatever tests have done to it, another is made
            _log.info("%s is made again: %s", shared.machine.name, error)
            del self._shared[wanted]
            _delete(shared.machine)
            return None
        return shared


def name_machine(words: str) -> str:
    """Return a unique name for a machine that begins with words such as a test's name."""
    return make_name(re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "vm")


def _delete(machine: QemuInstance) -> None:
    raise_cleanup_errors(machine.delete(), None)


def add_diagnosis(machine: QemuInstance, report: pytest.TestReport) -> None:
    """Add the diagnosis of a machine to a test's report."""
    report.sections.append((f"machine {machine.name}", _diagnose(machine)))


def save_artifacts(
    machine: QemuInstance, report: pytest.TestReport, error: BaseException, directory: Path
) -> None:
    """Save logs and more of a machine, and add their place to a test's report.

    Args:
        machine: The machine.
        report: The report of a failure.
        error: The error of the test.
        directory: Where the directory of the test is made.
    """
    try:
        place = directory / directory_name(report.nodeid)
        more = {"diagnosis.txt": _diagnose(machine) + "\n"}
        outcome = str(keep_artifacts(place, machine.machine, error, more))
    except Exception as problem:  # noqa: BLE001 - it is the test's failure that is reported
        outcome = f"not all could be kept: {type(problem).__name__}: {problem}"
    report.sections.append((f"machine {machine.name}: artifacts", outcome))


def _diagnose(machine: QemuInstance) -> str:
    try:
        return machine.diagnose().tell()
    except Exception as problem:  # noqa: BLE001 - it is the test's failure that is reported
        return f"It cannot be diagnosed: {type(problem).__name__}: {problem}"


def commands_for(machine: QemuInstance) -> str:
    """Return the commands that log in to a kept machine, and delete it."""
    name = f"{layers.cloud_tag(machine.instance_dir.parent)}/{machine.name}"
    return (
        f"pycloudlib shell {name}\n"
        f"pycloudlib delete {name} && pycloudlib prune   when it is not needed any more"
    )


def directory_name(nodeid: str) -> str:
    """Return the name of a directory for a test."""
    return re.sub(r"[^A-Za-z0-9_.=,-]+", "-", nodeid).strip("-.")[:150]
