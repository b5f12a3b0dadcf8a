"""The machines of tests: copies of machines that were booted once and saved; reports on them."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pytest

from pycloudlib import Qemu
from pycloudlib.errors import PycloudlibException
from pycloudlib.images import store
from pycloudlib.pytest_plugin.ahead import Ahead, Asked, Case, Wanted
from pycloudlib.qemu.ahead import MachineAhead, launching
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.failure.explaining import keep_artifacts
from pycloudlib.qemu.host.budget import Budget, Capacity
from pycloudlib.qemu.host.ownership import claim
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.parts.standard import InstanceType
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import make_name
from pycloudlib.util import raise_cleanup_errors

_log = logging.getLogger(__name__)


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
        case: The test, until it has asked for its first machine; None for what is no test.
        machines: The machines.
        ending: Cleans up after the test.
        kept: The machines that are not deleted, since the test failed and the user examines them.
    """

    test: str
    case: Case | None = None
    machines: list[QemuInstance] = field(default_factory=list)
    ending: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    kept: list[QemuInstance] = field(default_factory=list)


@dataclass(slots=True)
class _Shared:
    """A machine that tests use one after another, and one that stands in for it in turn.

    While a test uses the one, the other returns to the beginning, for the next test.

    Attributes:
        machine: The one that a test uses, or the last one has used.
        start: The image of the snapshot to which they return.
        other: The other one, once it was needed.
    """

    machine: QemuInstance
    start: str
    other: QemuInstance | None = None

    @property
    def machines(self) -> list[QemuInstance]:
        """Those that there are."""
        return [self.machine] if self.other is None else [self.machine, self.other]


class Machines:
    """Makes machines for tests, within a budget, and deletes them afterwards.

    Args:
        cloud: The cloud of the machines.
        budget: What the machines of all test processes may use at once.
        instance_type: The default size.
        on_wait: Called if a machine does not fit yet, with who has reserved the budget.
        kept_mib: Memory, in MiB, that the kept machines may have together.
        ahead: For how many of the next tests machines are started ahead.

    Attributes:
        ahead: The machines for the next tests.
    """

    def __init__(
        self,
        cloud: Qemu,
        budget: Budget,
        instance_type: str,
        on_wait: Callable[[str], None],
        kept_mib: int,
        ahead: int,
    ) -> None:
        self._cloud = cloud
        self._budget = budget
        self._instance_type = instance_type
        self._on_wait = on_wait
        self._kept_mib = kept_mib
        self._shared: dict[Wanted, _Shared] = {}
        self._in_use: set[Wanted] = set()
        self.ahead = Ahead(self._start_ahead, ahead)

    def make(self, wanted: Wanted, in_use: InUse, options: dict[str, Any]) -> QemuInstance:
        """Return a new machine for a test.

        One that does not get ready lives until the end of the test, too, for the report.

        Args:
            wanted: Which machine.
            in_use: The machines of the test.
            options: Further options of the launch.
        """
        machine = self._take_ahead(Asked(wanted, options), in_use)
        if machine is not None:
            claim(machine.instance_dir, self._cloud.orphans)
            in_use.machines.append(machine)
            in_use.ending.callback(self._dispose, machine, in_use)
            return machine
        saved = self._find_saved(wanted)
        in_use.ending.enter_context(self._budget.reserving(self._size(wanted), self._on_wait))
        options = {"name": name_machine(in_use.test), **options}
        machine = self._launch(wanted, saved, options)
        in_use.machines.append(machine)
        in_use.ending.callback(self._dispose, machine, in_use)
        machine.wait()
        return machine

    def share(self, wanted: Wanted, in_use: InUse) -> QemuInstance:
        """Return the machine that tests with the same wishes share, as it was at its beginning.

        Between tests it is off, and not part of the budget.
        """
        self._forget_deleted(wanted)
        machine = self._take_ahead(Asked(wanted, shared=True), in_use)
        if machine is None:
            in_use.ending.enter_context(self._budget.reserving(self._size(wanted), self._on_wait))
            machine = self._roll_back(wanted) or self._make_shared(wanted, in_use)
        elif (shared := self._shared[wanted]).other is machine:
            shared.machine, shared.other = machine, shared.machine
        self._in_use.add(wanted)
        in_use.ending.callback(self._park, wanted, in_use)
        if machine not in in_use.machines:
            in_use.machines.append(machine)
        return machine

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

    def _take_ahead(self, asked: Asked, in_use: InUse) -> QemuInstance | None:
        """Return the machine that was started for a test, if it has asked for that; else None."""
        case, in_use.case = in_use.case, None
        taken = None if case is None else self.ahead.take(asked, case)
        if taken is None:
            return None
        machine, room = taken
        in_use.ending.callback(room.close)
        return machine

    def _start_ahead(self, asked: Asked, test: Case) -> MachineAhead | None:
        """Start what a test is expected to ask for; return None if there is no room for it."""
        wanted = asked.wanted
        try:
            size, saved = self._size(wanted), self._find_saved(wanted)
        except (PycloudlibException, ValueError) as error:
            _log.debug("Nothing is started ahead for %s: %s", test.name, error)
            return None  # the test hears of it, if it asks for that
        if asked.shared:
            shared = self._shared.get(wanted)
            if shared is None:
                return None
            begin, undo = self._returning(shared, in_use=wanted in self._in_use)
            return MachineAhead.start(shared.machine.name, self._budget, size, begin, undo)
        if "name" in asked.options:
            return None  # the test before has a machine of that name
        name = name_machine(test.name)
        options = {**asked.options, "name": name}
        launch = partial(self._launch, wanted, saved, options)
        begin, undo = launching(self._cloud, name, launch)
        return MachineAhead.start(name, self._budget, size, begin, undo)

    def _returning(
        self, shared: _Shared, *, in_use: bool
    ) -> tuple[Callable[[], QemuInstance], Callable[[], None]]:
        """Return what gets a shared machine ready again, and what switches it off instead.

        Args:
            shared: The machine.
            in_use: Whether a test uses it now, so that the other one is needed.
        """
        chosen = shared.other if in_use else shared.machine

        def begin() -> QemuInstance:
            nonlocal chosen
            if chosen is None:
                chosen = shared.other = self._cloud.stand_in(shared.start)
            else:
                chosen.rollback(shared.start)
            chosen.wait()
            return chosen

        def undo() -> None:
            if chosen is not None:
                chosen.machine.kill()

        return begin, undo

    def _dispose(self, machine: QemuInstance, in_use: InUse) -> None:
        if machine in in_use.kept:
            # So that cleaning the cloud does not delete it.
            self._cloud.forget(machine)
        else:
            _delete(machine)

    def _park(self, wanted: Wanted, in_use: InUse) -> None:
        self._in_use.discard(wanted)
        shared = self._shared[wanted]
        if shared.machine in in_use.kept:
            del self._shared[wanted]
            self._cloud.forget(shared.machine)
            if shared.other is not None:
                _delete(shared.other)
        else:
            # Its next user finds it running: a rollback starts another QEMU in any case.
            shared.machine.machine.kill()

    def _forget_deleted(self, wanted: Wanted) -> None:
        """Forget a shared machine that a test has deleted, and what stands in for it."""
        shared = self._shared.get(wanted)
        if shared is not None and not shared.machine.instance_dir.is_dir():
            self._forget_shared(wanted)

    def _forget_shared(self, wanted: Wanted) -> None:
        for machine in self._shared.pop(wanted).machines:
            _delete(machine)

    def _size(self, wanted: Wanted) -> Capacity:
        """Return what a machine uses.

        Raises:
            ValueError: Its size is malformed.
        """
        saved = self._find_saved(wanted)
        given = wanted.instance_type or self._instance_type
        return Capacity.of_machine(saved.spec.instance_type if saved else InstanceType.parse(given))

    def _find_saved(self, wanted: Wanted) -> SavedMachine | None:
        return savedmachine.find(store.resolve(wanted.image, self._cloud.image_dir))

    def _launch(
        self, wanted: Wanted, saved: SavedMachine | None, options: dict[str, Any]
    ) -> QemuInstance:
        """Launch a copy of a saved machine, which is made first if it does not exist."""
        if saved:
            given: dict[str, Any] = {"fresh_identity": True, **options}
            if wanted.instance_type is not None:
                given["instance_type"] = wanted.instance_type
        else:
            given = {"warm": True, "fast_boot": True, **options}
            given["instance_type"] = wanted.instance_type or self._instance_type
        return self._cloud.launch(wanted.image, user_data=wanted.user_data, **given)

    def _make_shared(self, wanted: Wanted, in_use: InUse) -> QemuInstance:
        saved = self._find_saved(wanted)
        machine = self._launch(wanted, saved, {"name": name_machine("shared")})
        in_use.machines.append(machine)
        with contextlib.ExitStack() as undo:
            undo.callback(in_use.ending.callback, self._dispose, machine, in_use)
            machine.wait()
            start = self._cloud.snapshot(machine, memory=True)
            undo.pop_all()
        self._shared[wanted] = _Shared(machine, start)
        return machine

    def _roll_back(self, wanted: Wanted) -> QemuInstance | None:
        """Roll the shared machine back to its start; return None if there is none (any more)."""
        shared = self._shared.get(wanted)
        if shared is None:
            return None
        try:
            shared.machine.rollback(shared.start)
            shared.machine.wait()
        except Exception as error:  # noqa: BLE001 - whatever tests have done to it, another is made
            _log.info("%s is made again: %s", shared.machine.name, error)
            self._forget_shared(wanted)
            return None
        return shared.machine


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
