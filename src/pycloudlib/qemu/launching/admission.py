"""Launches that wait until their machine fits: what machines that boot hold, and for how long.

The processors of a machine are reserved until it has booted, its memory until it is deleted. Nobody
has to wait for the machine: a thread looks at its console, whose end of cloud-init decides. Other
users of this host can write there; all that they reach is that the next machine boots sooner.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.deadline import Deadline
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest.access import ssh
from pycloudlib.guest.boot.bootlines import ORDER, Phase
from pycloudlib.qemu.host.budget import Admission, Budget, Capacity
from pycloudlib.qemu.host.resources import LOOPBACK
from pycloudlib.qemu.parts.standard import InstanceType
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.running import MachineEndedError

_log = logging.getLogger(__name__)

_BANNER_LIMIT = 1.0

# Of the machines of this process, by their directories. Each step with it is atomic.
_admissions: dict[Path, Admission] = {}
_rooms: dict[Path, contextlib.ExitStack] = {}


def parse_wait(wait_for_room: bool | Callable[[str], None]) -> Callable[[str], None] | None:
    """Return what is called when a machine does not fit yet; None if that is not waited for.

    Raises:
        TypeError: It is something else than a boolean or a function.
    """
    if callable(wait_for_room):
        return wait_for_room
    if not isinstance(wait_for_room, bool):
        raise TypeError(f"wait_for_room is {wait_for_room!r}, expected a boolean or a function")
    return _report_wait if wait_for_room else None


def _report_wait(holders: str) -> None:
    _log.info("Waiting until a machine fits: %s", holders)


@dataclass(frozen=True, slots=True)
class Pace:
    """How a console is followed.

    Attributes:
        look: Seconds between two looks at it.
        quiet: Seconds without a word after which its guest is asked: one without cloud-init says on
            no console that it has booted.
    """

    look: float = 0.25
    quiet: float = 5.0


_PACE = Pace()


@contextlib.contextmanager
def admitting(
    budget: Budget, size: InstanceType, on_wait: Callable[[str], None], pace: Pace = _PACE
) -> Iterator[Callable[[Machine, float], None]]:
    """Wait until a machine fits; it is launched in the block, which gets what to call with it then.

    That takes the machine and the minutes that it may boot for. Where it is not called, all is
    given back when the block ends.

    Args:
        budget: What all machines may use.
        size: The size of the machine.
        on_wait: Called if it does not fit yet, with who has reserved the rest.
        pace: How its console is followed.

    Raises:
        PycloudlibTimeoutError: It did not fit in time.
    """
    admission = budget.admit(Capacity.of_machine(size), on_wait)
    with contextlib.ExitStack() as stack:
        stack.callback(admission.release)

        def follow(machine: Machine, minutes: float) -> None:
            directory = machine.rundir.path
            _admissions[directory] = admission
            stack.pop_all()
            if not directory.exists():  # another thread has deleted it already
                release(directory)
            elif has_booted(machine):
                admission.end_boot()
            else:
                arguments = (machine, admission, Deadline.after(minutes * 60), pace)
                threading.Thread(
                    target=_follow_boot, args=arguments, name="admission", daemon=True
                ).start()

        yield follow


def end_boot(directory: Path) -> None:
    """Let others boot, since a machine of this process is ready, if it was admitted."""
    admission = _admissions.get(directory)
    if admission is not None:
        admission.end_boot()


def hold(directory: Path, room: contextlib.ExitStack) -> None:
    """Have a machine of this process hold its room in the budget until it is deleted."""
    _rooms[directory] = room


def release(directory: Path) -> None:
    """Give back what a machine of this process holds, since it is deleted, if it was admitted."""
    room = _rooms.pop(directory, None)
    if room is not None:
        room.close()
    admission = _admissions.pop(directory, None)
    if admission is not None:
        admission.release()


def has_booted(machine: Machine) -> bool:
    """Whether a guest has booted, as its console has it; one that was restored is never booting."""
    # The helper comes with a machine that was ready when it was saved.
    if machine.rundir.helper_mark.exists():
        return True
    return machine.console.look().phase is Phase.CLOUD_INIT_DONE


def _follow_boot(machine: Machine, admission: Admission, deadline: Deadline, pace: Pace) -> None:
    """Wait for the end of a machine's boot, and end that of its admission."""
    name = machine.spec.name
    try:
        seen, since = -1, time.monotonic()
        while admission.boots and not has_booted(machine):
            machine.check_on()
            machine.check_pause()
            if deadline.expired:
                _log.warning(
                    "%s has not booted within %.0f s; others do not wait for it any more",
                    name,
                    deadline.limit,
                )
                break
            position = machine.console.look().position
            if position != seen:
                seen, since = position, time.monotonic()
            elif time.monotonic() - since >= pace.quiet:
                if _is_at_its_end(machine):
                    break
                since = time.monotonic()
            time.sleep(pace.look)
    except (MachineEndedError, PycloudlibTimeoutError) as error:
        _log.info("%s does not boot: %s", name, error)
    except Exception:  # noqa: BLE001 - nobody is there to get it, and others wait
        _log.exception("The boot of %s cannot be followed", name)
    finally:
        admission.end_boot()


def _is_at_its_end(machine: Machine) -> bool:
    """Whether a guest whose console is quiet boots no further: it is stuck, or has booted."""
    seen = machine.console.look()
    if seen.find_dead_end() is not None:
        return True
    if seen.phase is not None and ORDER[seen.phase] >= ORDER[Phase.CLOUD_INIT_LOCAL]:
        return False  # its end will be on the console
    try:
        ssh.open_with_banner(LOOPBACK, machine.spec.ssh_port, _BANNER_LIMIT).close()
    except OSError:
        return False
    return True
