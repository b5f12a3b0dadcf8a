"""Errors that say what was going on with the machine, and artifacts that are kept of it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType

from pycloudlib._base.documents import escape_bytes, to_bytes
from pycloudlib._base.files import copy_private, create_directories, moved, write_private
from pycloudlib.diagnosis import UNDIAGNOSED, Diagnosis
from pycloudlib.errors import CloudError, CloudSetupError, GuestRefusedError, PycloudlibException
from pycloudlib.guest.boot import cloudinit
from pycloudlib.qemu.failure import examination
from pycloudlib.qemu.failure.examination import Facts
from pycloudlib.qemu.state.rundir import short_path
from pycloudlib.qemu.vm.guest import Guest
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.qmp import QmpError
from pycloudlib.qemu.vm.running import MachineEndedError, State

_SCREEN_LIMIT = 10.0


_log = logging.getLogger(__name__)
# Seconds that the guest may take to answer when something has failed already.
_ASK_LIMIT = 10.0
_ASK = f"""\
systemctl --failed --no-legend --plain | cut -d' ' -f1
echo --
df -P / | awk 'NR == 2 && $4 < 1024 {{ print "disk of / is full:", $4, "KiB free" }}'
echo --
{cloudinit.REPORT_SCRIPT}"""
_inside: ContextVar[bool] = ContextVar("inside a call that explains its failure", default=False)


def keep_artifacts(
    directory: Path,
    machine: Machine,
    error: BaseException,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write the facts about a failure into a new directory, without secrets.

    `error.txt` has the error with its diagnosis, `machine.json` the machine, `events.json` the QMP
    events, `console.log` and `qemu.log` the output of guest and QEMU, and `screen.png` the screen
    of a machine that has one (`launch_args=["-vga", "std"]`).

    Args:
        directory: The parent of the new directory; made if it is missing. Others may write there.
        machine: The machine.
        error: The error.
        more: Further texts, by the names of their files.

    Returns:
        The new directory, which only its owner can enter.

    Raises:
        OSError: It could not be written.
    """
    target = _make_directory(directory, f"{machine.spec.name}-{time.strftime('%Y%m%dT%H%M%S')}")
    with _holding(target) as place:
        events = [
            {"event": event.name, "data": dict(event.data), "timestamp": event.timestamp}
            for event in machine.events
        ]
        texts = {
            "error.txt": _writable(f"{type(error).__name__}: {error}\n"),
            "machine.json": machine.spec.to_json() + "\n",
            "events.json": json.dumps(events, indent=1, default=str) + "\n",
            **more,
        }
        for name, text in texts.items():
            write_private(place / name, text)
        for log in (machine.rundir.console_log, machine.rundir.qemu_log):
            with contextlib.suppress(FileNotFoundError):
                copy_private(log, place / log.name)
        _take_picture(machine, place / "screen.png")
    return target


def _writable(text: str) -> str:
    """Return a text that can be encoded: escapes of raw bytes stay, others are written out."""
    try:
        to_bytes(text)
    except UnicodeEncodeError:
        return escape_bytes(text)
    return text


def _make_directory(directory: Path, stem: str) -> Path:
    create_directories(directory)
    for number in itertools.count(1):
        target = directory / (stem if number == 1 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            target.mkdir(mode=0o700)
            return target
    raise AssertionError("unreachable: a name is free")


@contextlib.contextmanager
def _holding(directory: Path) -> Iterator[Path]:
    """Yield another path of a new directory, which leads to it even if others replace its own.

    Raises:
        PermissionError: Another user has replaced it already.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = moved(os.open(directory, flags))
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(errno.EPERM, "another user has replaced it", directory)
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _take_picture(machine: Machine, target: Path) -> None:
    """Save a picture of the machine's screen; most machines have none."""
    if machine.state is State.OFF:
        return
    target.touch(mode=0o600)
    try:
        with short_path(target) as name:
            # QEMU 7.1 and later write PNG.
            arguments = {"filename": name, "format": "png"}
            machine.execute("screendump", arguments, timeout=_SCREEN_LIMIT)
    except (QmpError, MachineEndedError):
        target.unlink()


@dataclasses.dataclass(slots=True)
class Explainer:
    """Explains the failures of one machine.

    Attributes:
        guest: Its guest.
        artifacts_dir: The directory for artifacts of failures; None for none.
    """

    guest: Guest
    artifacts_dir: Path | None = None

    def diagnose(self) -> Diagnosis:
        """Return the diagnosis of the machine: the facts, and a cause if there is any.

        It includes the guest's own report if the guest is connected.
        """
        machine = self.guest.machine
        machine.refresh()
        return self._ask_guest(examination.diagnose(Facts.collect(machine)))

    @contextlib.contextmanager
    def explaining(self, waiting_for: str, limit: str = "", *, ask: bool = False) -> Iterator[None]:
        """Add the diagnosis of the machine to an error that leaves the block, and to its text.

        It is the error's attribute `diagnosis`. Of nested blocks only the outermost does that.

        Args:
            waiting_for: What the block waits for.
            limit: The limit of the wait, and where it comes from.
            ask: Whether to ask the guest for a report, which may take some seconds.
        """
        if _inside.get():
            yield
            return
        begun = time.monotonic()
        token = _inside.set(True)
        try:
            yield
        except Exception as error:
            if is_failure(error) and getattr(error, "diagnosis", None) is None:
                self._explain(error, waiting_for, time.monotonic() - begun, limit, ask=ask)
            raise
        finally:
            _inside.reset(token)

    def _explain(
        self, error: Exception, waiting_for: str, waited: float, limit: str, *, ask: bool
    ) -> None:
        """Add a diagnosis to an error, and save artifacts; errors here are only logged."""
        machine, name = self.guest.machine, self.guest.name
        try:
            facts = Facts.collect(machine)
            diagnosis = examination.diagnose(facts, error)
            # A guest whose QEMU does not answer does not answer either.
            if ask and facts.status == "running":
                diagnosis = self._ask_guest(diagnosis)
            explain(
                error,
                dataclasses.replace(diagnosis, waiting_for=waiting_for, waited=waited, limit=limit),
            )
            if self.artifacts_dir is not None:
                kept = keep_artifacts(self.artifacts_dir, machine, error)
                _log.warning("What is known of the failure of %s is in %s", name, kept)
        except Exception as problem:  # noqa: BLE001 - it is the first error that is raised
            text = f"{type(problem).__name__}: {problem}"
            _log.warning("The failure of %s is not wholly recorded: %s", name, text)

    def _ask_guest(self, diagnosis: Diagnosis) -> Diagnosis:
        """Add the guest's own report, if the guest is connected."""
        guest = self.guest
        if guest.machine.state is not State.RUNNING or not guest.is_reachable:
            return diagnosis
        try:
            answer = guest.execute(_ASK, timeout=_ASK_LIMIT, no_log=True)
        except Exception as error:  # noqa: BLE001 - it is another error that is explained
            _log.debug("%s cannot be asked: %s", guest.name, error)
            return diagnosis
        units, _, rest = answer.stdout.partition("--\n")
        words, _, report = rest.partition("--\n")
        try:
            status = cloudinit.parse_status(report)
        except ValueError as error:
            _log.debug("cloud-init's status on %s cannot be read: %s", guest.name, error)
            status = cloudinit.CloudInitStatus("")
        return examination.with_guest_words(
            diagnosis,
            [*_lines(words), *cloudinit.describe_stages(status)],
            _lines(units),
            status.warnings,
        )


@contextlib.contextmanager
def explaining_launch() -> Iterator[None]:
    """Add a diagnosis to an error of a launch, whose machine does not exist any more."""
    try:
        yield
    except (CloudError, CloudSetupError) as error:
        diagnosis = examination.diagnose_launch(error) if error.diagnosis is None else None
        if diagnosis is not None:
            explain(error, diagnosis)
        raise


def explain(error: Exception, diagnosis: Diagnosis) -> None:
    """Add a diagnosis to an error and to its text, for programmers.

    Its text without the diagnosis stays in an attribute, for other audiences.
    """
    setattr(error, UNDIAGNOSED, str(error))
    error.diagnosis = diagnosis  # type: ignore[attr-defined]
    # One of several arguments is the text; the others are numbers, keys, other errors.
    texts = [place for place, value in enumerate(error.args) if isinstance(value, str)]
    if not error.args:
        error.args = (f"\n{diagnosis}",)
    elif texts:
        arguments = list(error.args)
        text = arguments[texts[0]]
        arguments[texts[0]] = f"{text}\n{diagnosis.tell(beside=text)}"
        error.args = tuple(arguments)


def is_failure(error: Exception) -> bool:
    """Whether the machine failed: not the caller's arguments, and not a command in the guest."""
    if isinstance(error, GuestRefusedError):
        return False
    # paramiko is heavy to load; whoever raises its errors has done so.
    return isinstance(error, PycloudlibException) or type(error).__module__.startswith("paramiko")


def _lines(text: str) -> Sequence[str]:
    return [line for line in map(str.strip, text.splitlines()) if line]
