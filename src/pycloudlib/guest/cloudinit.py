"""cloud-init's own word on how a boot went, parsed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from pycloudlib.documents import parse_json, shown

WAIT_SCRIPT = """
command -v cloud-init >/dev/null 2>&1 || { echo absent; exit 0; }
if [ -n "${BASH_VERSION-}" ]; then
  looks=50
  eval 'exec 9<> <(:)'
  pause() { read -rt 0.1 -u 9 || :; }
else
  looks=10
  pause() { sleep 0.5; }
fi
polls=0
how=finished
until [ -s /run/cloud-init/result.json ]; do
  [ -e /run/cloud-init/disabled ] && { echo disabled; exit 0; }
  if [ $polls = 0 ]; then
    [ -L /run/cloud-init/result.json ] || [ ! -d /run/cloud-init ]
  else
    [ $((polls % looks)) = 0 ]
  fi && case $(systemctl is-active cloud-final.service) in
    failed) how=crashed; break ;;
    active) [ "$(systemctl is-system-running)" = stopping ] || break ;;
    inactive)
      case $(systemctl is-system-running) in running | degraded) echo disabled; exit 0 ;; esac ;;
  esac
  polls=$((polls + 1))
  pause
done
echo $how
cat /run/cloud-init/status.json 2>/dev/null || :
"""
"""Shell script that ends when cloud-init has ended in *this* boot, and prints how.

`result.json` is written when the last stage has ended; /run is empty at the start of each boot.
`cloud-init clean` leaves of it a link that leads nowhere, and others may remove it altogether, so
systemd is asked, too, what has become of the last stage in this boot: now and then, as that takes
time, and at once when what cloud-init wrote is gone. While the guest goes down, that is no answer:
the next boot is the one that is waited for.

`cloud-init status --wait` is not used: older versions (22.4) return as soon as any module has
failed while later stages still run, and its Python start-up and polling slow a small guest down.
The guest offers no event for this that an ordinary user can wait on, so a file is looked for.
bash waits by itself, for input that never comes; a `sleep` each time takes 36 ms of an emulated
processor, a quarter of what cloud-init has at ten a second.
"""

WAIT_COMMAND = (
    "sh",
    "-c",
    'command -v bash >/dev/null 2>&1 && exec bash -c "$0"; exec sh -c "$0"',
    WAIT_SCRIPT,
)
"""Runs the script, by bash where there is one."""


@dataclass(frozen=True, slots=True)
class StageResult:
    """One stage of cloud-init.

    Attributes:
        name: `init-local`, `init`, `modules-config`, `modules-final`.
        started: When it began, in seconds since the epoch by the guest's clock; None if never.
        finished: When it ended; None while it runs.
        errors: What failed in it, in cloud-init's words.
    """

    name: str
    started: float | None
    finished: float | None
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CloudInitStatus:
    """How cloud-init ended.

    Attributes:
        state: `finished`; `crashed` when the last stage's unit failed; `disabled` or `absent`
            when there was nothing to wait for.
        datasource: Where its data came from, in cloud-init's words.
        stages: Its stages in order.
        recoverable_errors: Warnings of cloud-init 23.4 and later.
    """

    state: str
    datasource: str = ""
    stages: tuple[StageResult, ...] = ()
    recoverable_errors: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[str, ...]:
        """All stages' errors."""
        return tuple(error for stage in self.stages for error in stage.errors)

    @property
    def failed(self) -> bool:
        """Whether cloud-init says that something failed."""
        return self.state == "crashed" or bool(self.errors)


_STAGES = ("init-local", "init", "modules-config", "modules-final")


def parse_status(output: str) -> CloudInitStatus:
    """Parse what `WAIT_SCRIPT` printed.

    Raises:
        ValueError: It is not the script's output.
    """
    state, _, document = output.strip().partition("\n")
    if state in ("absent", "disabled"):
        return CloudInitStatus(state)
    if state not in ("finished", "crashed"):
        raise ValueError(f"not a status of cloud-init: {output[:200]!r}")
    try:
        return _parse_document(state, parse_json(document)["v1"] if document.strip() else {})
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a status of cloud-init: {document[:200]!r} ({error})") from error


def _parse_document(state: str, status: dict[str, Any]) -> CloudInitStatus:
    return CloudInitStatus(
        state,
        str(status.get("datasource") or ""),
        tuple(_parse_stage(name, status[name]) for name in _STAGES if name in status),
        _recoverable(status),
    )


def _parse_stage(name: str, stage: dict[str, Any]) -> StageResult:
    return StageResult(
        name,
        _seconds(stage.get("start")),
        _seconds(stage.get("finished")),
        _texts(stage.get("errors")),
    )


def _seconds(value: object) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float):
        raise TypeError(f"{shown(value)} is not a time")
    return float(cast("float", value))


def _texts(value: object) -> tuple[str, ...]:
    """Read a list of what went wrong, which need not be texts."""
    if not isinstance(value, (list, type(None))):
        raise TypeError(f"{shown(value)} is not a list")
    return tuple(map(str, value or ()))


def _recoverable(status: dict[str, Any]) -> tuple[str, ...]:
    """Collect the warnings: in each stage, by level ("WARNING": [texts])."""
    return tuple(
        f"{level}: {text}"
        for name in _STAGES
        for level, texts in status.get(name, {}).get("recoverable_errors", {}).items()
        for text in _texts(texts)
    )
