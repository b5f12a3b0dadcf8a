"""The machines that tests get: copies of machines that were made once and saved."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pycloudlib import Qemu
from pycloudlib.errors import CleanupError, PycloudlibError
from pycloudlib.images import store
from pycloudlib.pytest_plugin.budget import Budget, Room
from pycloudlib.qemu import savedmachine
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.machine import State
from pycloudlib.qemu.spec import InstanceType

_log = logging.getLogger(__name__)

# Of 63 characters that a host name has, some are to tell machines apart.
_LONGEST_STEM = 50


@dataclass(frozen=True, slots=True)
class Wanted:
    """What machine a test wants.

    Attributes:
        image: The id of its image, or of a saved machine.
        instance_type: Its size; a saved machine has its own.
        user_data: For cloud-init.
    """

    image: str
    instance_type: str
    user_data: str | bytes | None = None


class VmFactory(Protocol):
    """Makes machines for a test; what is left out is as the test's marker `vm` says."""

    def __call__(
        self,
        image: str | None = None,
        instance_type: str | None = None,
        user_data: str | bytes | Path | None = None,
        **options: Any,
    ) -> QemuInstance:
        """Give a machine that is ready; it is deleted when the test has ended.

        Args:
            image: An image as people call it (`noble`, `bookworm`, a snapshot of the command
                line), an id, or a path.
            instance_type: `c<cpus>m<MiB of memory>`.
            user_data: For cloud-init; a path is read.
            **options: Further options of `Qemu.launch`. Unless `warm=False` is among them, the
                machine is a copy of one that was launched with just these options once.

        Raises:
            ImageNotFoundError: There is no such image.
            PycloudlibError: It could not be launched, or did not get ready; as `Qemu.launch` and
                `QemuInstance.wait`.
        """


@dataclass
class InUse:
    """What one test uses.

    Attributes:
        test: Its name, which its machines are called after.
        machines: The machines.
        ending: What is done when it has ended, the last first.
        kept: Whether it failed and its machines are to be looked at.
    """

    test: str
    machines: list[QemuInstance] = field(default_factory=list)
    ending: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    kept: bool = False


@dataclass(frozen=True, slots=True)
class _Shared:
    """A machine that tests use one after another.

    Attributes:
        machine: The machine.
        start: The saved machine that it is taken back to.
    """

    machine: QemuInstance
    start: str


class Machines:
    """Gives machines to tests, within a budget, and takes them back.

    Args:
        cloud: Where they live.
        budget: What all test processes may use at once.
    """

    def __init__(self, cloud: Qemu, budget: Budget) -> None:
        self._cloud = cloud
        self._budget = budget
        self._shared: dict[Wanted, _Shared] = {}

    def give(self, wanted: Wanted, in_use: InUse, options: dict[str, Any]) -> QemuInstance:
        """Give a test a machine of its own.

        One that does not get ready is there until the test has ended, too: it is told of.

        Args:
            wanted: What machine.
            in_use: What the test uses.
            options: Further options of the launch.
        """
        in_use.ending.enter_context(self._taking_room(wanted))
        machine = self._launch(wanted, in_use, {"name": make_name(in_use.test), **options})
        in_use.ending.callback(self._take, machine, in_use)
        machine.wait()
        return machine

    def share(self, wanted: Wanted, in_use: InUse) -> QemuInstance:
        """Give a test the machine of all that want the same, as it was at its beginning.

        Between tests it stands still, and takes nothing of the budget.
        """
        in_use.ending.enter_context(self._taking_room(wanted))
        shared = self._take_back(wanted) or self._make_shared(wanted, in_use)
        in_use.ending.callback(self._put_by, wanted, in_use)
        if shared.machine not in in_use.machines:
            in_use.machines.append(shared.machine)
        return shared.machine

    def _take(self, machine: QemuInstance, in_use: InUse) -> None:
        if in_use.kept:
            # It lives on when the cloud is cleaned.
            self._cloud.forget(machine)
        else:
            _delete(machine)

    def _put_by(self, wanted: Wanted, in_use: InUse) -> None:
        if in_use.kept:
            self._cloud.forget(self._shared.pop(wanted).machine)
            return
        machine = self._shared[wanted].machine.machine
        if machine.state is State.RUNNING:
            machine.execute("stop")

    def _taking_room(self, wanted: Wanted) -> contextlib.AbstractContextManager[None]:
        saved = self._find_saved(wanted)
        size = saved.spec.instance_type if saved else InstanceType.parse(wanted.instance_type)
        return self._budget.taking(Room.of_machine(size), _tell_waiting)

    def _find_saved(self, wanted: Wanted) -> savedmachine.SavedMachine | None:
        return savedmachine.find(store.resolve(wanted.image, self._cloud.image_dir))

    def _launch(self, wanted: Wanted, in_use: InUse, options: dict[str, Any]) -> QemuInstance:
        """Launch a copy of a saved machine; which is made first, if need be."""
        if self._find_saved(wanted):
            given = {"fresh_identity": True, **options}
        else:
            given = {"warm": True, "fast_boot": True, **options}
            given["instance_type"] = wanted.instance_type
        machine = self._cloud.launch(wanted.image, user_data=wanted.user_data, **given)
        in_use.machines.append(machine)
        return machine

    def _make_shared(self, wanted: Wanted, in_use: InUse) -> _Shared:
        machine = self._launch(wanted, in_use, {"name": make_name("shared")})
        with contextlib.ExitStack() as undo:
            undo.callback(in_use.ending.callback, self._take, machine, in_use)
            machine.wait()
            start = self._cloud.snapshot(machine, memory=True)
            undo.pop_all()
        shared = self._shared[wanted] = _Shared(machine, start)
        return shared

    def _take_back(self, wanted: Wanted) -> _Shared | None:
        """Take the shared machine back to its beginning; None where there is none (any more)."""
        shared = self._shared.get(wanted)
        if shared is None:
            return None
        try:
            shared.machine.rollback(shared.start)
            shared.machine.wait()
        except PycloudlibError as error:
            # A test may have deleted it.
            _log.info("%s is made anew: %s", shared.machine.name, error)
            del self._shared[wanted]
            _delete(shared.machine)
            return None
        return shared


def make_name(words: str) -> str:
    """Make the name of a machine, which nothing else has, of words such as a test's name."""
    stem = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:_LONGEST_STEM].rstrip("-")
    return f"{stem or 'vm'}-{secrets.token_hex(3)}"


def _delete(machine: QemuInstance) -> None:
    errors = machine.delete()
    if errors:
        raise CleanupError(errors)


def _tell_waiting() -> None:
    _log.info("Waiting until other test processes leave processors and memory for a machine")
