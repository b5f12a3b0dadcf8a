"""Errors that explain themselves: with the diagnosis of the machine that failed."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

from pycloudlib.diagnosis import UNDIAGNOSED, Diagnosis
from pycloudlib.errors import CloudError, CloudSetupError, GuestRefusedError, PycloudlibException
from pycloudlib.guest.boot import cloudinit
from pycloudlib.qemu.failure import examination
from pycloudlib.qemu.failure.artifacts import keep_artifacts
from pycloudlib.qemu.failure.examination import Facts
from pycloudlib.qemu.vm.guest import Guest
from pycloudlib.qemu.vm.running import State

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
