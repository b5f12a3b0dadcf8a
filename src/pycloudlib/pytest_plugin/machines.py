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
class _Turn:
    """One of two machines that take turns.

    Attributes:
        machine: The machine; None until it was needed.
        in_use: Whether a test uses it.
        ahead: What gets it ready for a test that comes next, until the test has it.
    """

    machine: QemuInstance | None = None
    in_use: bool = False
    ahead: MachineAhead | None = None

    @property
    def is_free(self) -> bool:
        """Whether it can be got ready for a test."""
        return not self.in_use and (self.ahead is None or self.ahead.has_ended)


@dataclass(slots=True)
class _Shared:
    """A machine that tests use one after another: two that take turns.

    While a test uses the one, the other returns to the beginning, for the next test.

    Attributes:
        name: What both are called.
        start: The image of the snapshot to which they return.
        turns: The machines.
    """

    name: str
    start: str
    turns: tuple[_Turn, _Turn]

    def find_free(self) -> _Turn | None:
        """Return one that no test has or will have, rather one that exists; None without one."""
        free = [turn for turn in self.turns if turn.is_free]
        return min(free, key=lambda turn: turn.machine is None, default=None)

    def free_one(self) -> _Turn:
        """Return one that no test has; a test that comes next may have to wait for its own."""
        found = self.find_free()
        if found is None:
            found = next(turn for turn in self.turns if not turn.in_use)
            if found.ahead is not None:
                found.ahead.drop()
        return found


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
        turn = next(turn for turn in self._shared[wanted].turns if turn.machine is machine)
        turn.in_use, turn.ahead = True, None
        in_use.ending.callback(self._park, wanted, turn, in_use)
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
            return self._return_ahead(wanted, size)
        if "name" in asked.options:
            return None  # the test before has a machine of that name
        name = name_machine(test.name)
        # Its room is reserved already: it would wait for what it holds itself.
        options = {**asked.options, "name": name, "wait_for_room": False}
        launch = partial(self._launch, wanted, saved, options)
        begin, undo = launching(self._cloud, name, launch)
        return MachineAhead.start(name, self._budget, size, begin, undo)

    def _return_ahead(self, wanted: Wanted, size: Capacity) -> MachineAhead | None:
        """Get a shared machine ready that no test has or will have; return None without one."""
        shared = self._shared.get(wanted)
        turn = None if shared is None else shared.find_free()
        if shared is None or turn is None:
            return None

        def undo() -> None:
            if turn.machine is not None:
                turn.machine.machine.kill()

        begin = partial(self._return_to_start, shared, turn)
        turn.ahead = MachineAhead.start(shared.name, self._budget, size, begin, undo)
        return turn.ahead

    def _return_to_start(self, shared: _Shared, turn: _Turn) -> QemuInstance:
        """Return a shared machine that is at its beginning, and ready."""
        if turn.machine is None:
            turn.machine = self._cloud.stand_in(shared.start)
        else:
            turn.machine.rollback(shared.start)
        turn.machine.wait()
        return turn.machine

    def _dispose(self, machine: QemuInstance, in_use: InUse) -> None:
        if machine in in_use.kept:
            # So that cleaning the cloud does not delete it.
            self._cloud.forget(machine)
        else:
            _delete(machine)

    def _park(self, wanted: Wanted, turn: _Turn, in_use: InUse) -> None:
        turn.in_use = False
        if turn.machine is None:
            return
        if turn.machine in in_use.kept:
            self._cloud.forget(turn.machine)
            turn.machine = None
            self._forget_shared(wanted)
        else:
            # Its next user finds it running: a rollback starts another QEMU in any case.
            turn.machine.machine.kill()

    def _forget_deleted(self, wanted: Wanted) -> None:
        """Forget a shared machine that a test has deleted, and the other one."""
        shared = self._shared.get(wanted)
        machines = [turn.machine for turn in shared.turns] if shared else []
        if not all(machine is None or machine.instance_dir.is_dir() for machine in machines):
            self._forget_shared(wanted)

    def _forget_shared(self, wanted: Wanted) -> None:
        """Delete a shared machine and the other one, also while that is got ready for a test."""
        for turn in self._shared.pop(wanted).turns:
            if turn.ahead is not None:
                turn.ahead.drop()
            if turn.machine is not None:
                _delete(turn.machine)

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
        self._shared[wanted] = _Shared(machine.name, start, (_Turn(machine), _Turn()))
        return machine

    def _roll_back(self, wanted: Wanted) -> QemuInstance | None:
        """Return the shared machine, at its start; None if there is none (any more)."""
        shared = self._shared.get(wanted)
        if shared is None:
            return None
        try:
            return self._return_to_start(shared, shared.free_one())
        except Exception as error:  # noqa: BLE001 - whatever tests have done to it, another is made
            _log.info("%s is made again: %s", shared.name, error)
            self._forget_shared(wanted)
            return None


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
    # A shared machine may be called as another one, in a directory of its own.
    name = f"{layers.cloud_tag(machine.instance_dir.parent)}/{machine.instance_dir.name}"
    return (
        f"pycloudlib shell {name}\n"
        f"pycloudlib delete {name} && pycloudlib prune   when it is not needed any more"
    )


def directory_name(nodeid: str) -> str:
    """Return the name of a directory for a test."""
    return re.sub(r"[^A-Za-z0-9_.=,-]+", "-", nodeid).strip("-.")[:150]
