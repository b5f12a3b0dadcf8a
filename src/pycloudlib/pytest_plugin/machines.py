"""The machines that tests get: copies of machines that were made once and saved."""

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
from pycloudlib.pytest_plugin.budget import Budget, Room
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.failure.artifacts import keep_artifacts
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import InstanceType, make_name
from pycloudlib.util import raise_cleanup_errors

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What machine a test wants.

    Attributes:
        image: The id of its image, or of a saved machine.
        instance_type: Its size; None for the usual one, or that of the saved machine.
        user_data: For cloud-init.
    """

    image: str
    instance_type: str | None = None
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
            PycloudlibException: It could not be launched, or did not get ready; as `Qemu.launch`
                and `QemuInstance.wait`.
        """


class PrepareVm(Protocol):
    """Prepares a machine and saves it, for tests that start from there."""

    def __call__(
        self,
        prepare: Callable[[QemuInstance], object],
        image: str | None = None,
        instance_type: str | None = None,
        user_data: str | bytes | None = None,
    ) -> str:
        """Give the image of a machine that was prepared, for `vm_factory`; kept for the session.

        Args:
            prepare: Does with the machine what is to be done.
            image: As of `VmFactory`.
            instance_type: As of `VmFactory`.
            user_data: For cloud-init.

        Raises:
            ImageNotFoundError: There is no such image.
            PycloudlibException: It could not be launched, or did not get ready, or could not be
                saved.
        """


@dataclass
class InUse:
    """What one test uses.

    Attributes:
        test: Its name, which its machines are called after.
        machines: The machines.
        ending: What is done when it has ended, the last first.
        kept: The machines that live on, since it failed and they are to be looked at.
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
        start: The saved machine that it is taken back to.
    """

    machine: QemuInstance
    start: str


class Machines:
    """Gives machines to tests, within a budget, and takes them back.

    Args:
        cloud: Where they live.
        budget: What all test processes may use at once.
        instance_type: The usual size.
        on_wait: Told that there is no room for a machine yet, and who has it.
        kept_mib: How much memory the machines that are kept may have.
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

    def give(self, wanted: Wanted, in_use: InUse, options: dict[str, Any]) -> QemuInstance:
        """Give a test a machine of its own.

        One that does not get ready is there until the test has ended, too: it is told of.

        Args:
            wanted: What machine.
            in_use: What the test uses.
            options: Further options of the launch.
        """
        saved = self._find_saved(wanted)
        in_use.ending.enter_context(self._taking_room(wanted, saved))
        options = {"name": _name_after(in_use.test), **options}
        machine = self._launch(wanted, saved, in_use, options)
        in_use.ending.callback(self._take, machine, in_use)
        machine.wait()
        return machine

    def share(self, wanted: Wanted, in_use: InUse) -> QemuInstance:
        """Give a test the machine of all that want the same, as it was at its beginning.

        Between tests it is off, and takes nothing of the budget.
        """
        saved = self._find_saved(wanted)
        in_use.ending.enter_context(self._taking_room(wanted, saved))
        shared = self._take_back(wanted) or self._make_shared(wanted, saved, in_use)
        in_use.ending.callback(self._put_by, wanted, in_use)
        if shared.machine not in in_use.machines:
            in_use.machines.append(shared.machine)
        return shared.machine

    def prepare(self, wanted: Wanted, prepare: Callable[[QemuInstance], object]) -> str:
        """Prepare a machine, save it, and give the image."""
        in_use = InUse(getattr(prepare, "__name__", "prepared"))
        with in_use.ending:
            machine = self.give(wanted, in_use, {})
            prepare(machine)
            return self._cloud.snapshot(machine, memory=True)

    def keep(self, machine: QemuInstance, in_use: InUse) -> bool:
        """Let a machine live on when the tests have ended; False where too many do already."""
        size = machine.machine.spec.instance_type.memory_mib
        if size > self._kept_mib:
            return False
        self._kept_mib -= size
        in_use.kept.append(machine)
        return True

    def _take(self, machine: QemuInstance, in_use: InUse) -> None:
        if machine in in_use.kept:
            # It lives on when the cloud is cleaned.
            self._cloud.forget(machine)
        else:
            _delete(machine)

    def _put_by(self, wanted: Wanted, in_use: InUse) -> None:
        machine = self._shared[wanted].machine
        if machine in in_use.kept:
            del self._shared[wanted]
            self._cloud.forget(machine)
        else:
            # Its next user finds it running: going back begins with another QEMU in any case.
            machine.machine.kill()

    def _taking_room(
        self, wanted: Wanted, saved: SavedMachine | None
    ) -> contextlib.AbstractContextManager[None]:
        given = wanted.instance_type or self._instance_type
        size = saved.spec.instance_type if saved else InstanceType.parse(given)
        return self._budget.taking(Room.of_machine(size), self._on_wait)

    def _find_saved(self, wanted: Wanted) -> SavedMachine | None:
        return savedmachine.find(store.resolve(wanted.image, self._cloud.image_dir))

    def _launch(
        self,
        wanted: Wanted,
        saved: SavedMachine | None,
        in_use: InUse,
        options: dict[str, Any],
    ) -> QemuInstance:
        """Launch a copy of a saved machine; which is made first, if need be."""
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
        machine = self._launch(wanted, saved, in_use, {"name": _name_after("shared")})
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
        except Exception as error:  # noqa: BLE001 - whatever tests have done to it, there is another
            _log.info("%s is made anew: %s", shared.machine.name, error)
            del self._shared[wanted]
            _delete(shared.machine)
            return None
        return shared


def _name_after(words: str) -> str:
    """Make the name of a machine, which nothing else has, of words such as a test's name."""
    return make_name(re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "vm")


def _delete(machine: QemuInstance) -> None:
    raise_cleanup_errors(machine.delete(), None)


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
