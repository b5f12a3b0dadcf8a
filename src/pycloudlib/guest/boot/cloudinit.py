"""cloud-init's own report of a boot, asked for and parsed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from pycloudlib._base.documents import parse_json, safe_repr
from pycloudlib.guest.access import commands

_REPORT = r"""
cat /run/cloud-init/status.json 2>/dev/null || :
[ -n "${brief-}" ] || awk '
  / running .init-local. at / { count = 0; rest = 0 }
  /^[0-9-]+ [0-9:]+,[0-9]+ - / {
    rest = /^[^ ]+ [^ ]+ - [^ ]+\[(WARNING|ERROR|CRITICAL|DEPRECATED)\]: / ? 10 : 0
  }
  /^Traceback / { rest = 0 }
  rest > 0 { rest--; lines[count++] = $0 }
  END {
    if (count) print "\n== log"
    for (i = 0; i < count && i < 500; i++) print lines[i]
  }
' /var/log/cloud-init.log 2>/dev/null || :
"""
# cloud-init's status, and its warnings of this boot, which older versions only log. The log has all
# boots, and only administrators can read it.

_NOTE_SHUTDOWN = r"""
note_shutdown() {
  [ -n "${brief-}" ] && return
  mode=shutdown
  if [ "$(systemctl is-system-running 2>/dev/null)" = stopping ]; then
    jobs=$(systemctl list-jobs --no-legend --plain 2>/dev/null)
    for each in poweroff halt reboot kexec soft-reboot; do
      case $jobs in *" $each.target "*) mode=$each ;; esac
    done
    printf '\n== shutdown\n%s\n' "$mode 0"
  elif [ -r /run/systemd/shutdown/scheduled ]; then
    at=0
    while IFS='=' read -r key value; do
      case $key in USEC) at=${value%??????} ;; MODE) mode=$value ;; esac
    done </run/systemd/shutdown/scheduled
    printf '\n== shutdown\n%s\n' "$mode $((at - $(date +%s)))"
  fi
}
trap note_shutdown EXIT
"""
# Whether the guest shuts down, or is to: how, and in how many seconds.

WAIT_SCRIPT = (
    _NOTE_SHUTDOWN
    + """
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
lingers() {
  for unit in cloud-final cloud-init-main; do
    for list in /sys/fs/cgroup/system.slice/$unit.service/cgroup.procs \\
      /sys/fs/cgroup/systemd/system.slice/$unit.service/cgroup.procs; do
      [ -r "$list" ] || continue
      while read -r pid; do
        name=
        read -r name <"/proc/$pid/comm"
        [ "$name" = cloud-init ] && return 0
      done <"$list"
    done
  done 2>/dev/null
  return 1
}
polls=0
while [ $polls -lt $((looks * 12)) ] && lingers; do
  polls=$((polls + 1))
  pause
done
echo $how
"""
    + _REPORT
    + """
if [ -n "${leave_mark-}" ] && [ -n "${BASH_VERSION-}" ]; then
  trap - EXIT
  noted=$(note_shutdown)
  if [ -n "$noted" ]; then printf '%s\\n' "$noted"; exit 0; fi
"""
    + commands.LEAVE_SHELL
    + "fi\n"
)
"""Shell script that ends when cloud-init has ended in *this* boot, and prints how.

`result.json` is written when the last stage has ended; /run is empty at the start of each boot.
`cloud-init clean` leaves a dangling link of it, and others may remove it altogether, so systemd is
asked, too, for the state of the last stage in this boot: now and then, as that takes time, and at
once when cloud-init's files are gone. While the guest shuts down, this is no answer: then the next
boot is waited for.

`cloud-init status --wait` is not used: older versions (22.4) return as soon as any module has
failed while later stages still run, and its Python start-up and polling slow a small guest down.

cloud-init leaves the very end (`power_state`) to a process that waits for the last stage's
processes: so these are waited for, too, and then it is known whether the guest reboots.

An ordinary user can wait for no event of this kind, so a file is polled. bash waits by itself, for
input that never comes; a `sleep` each time takes 36 ms of an emulated processor, a quarter of what
cloud-init has at ten a second.
"""

_BY_A_SHELL = 'command -v bash >/dev/null 2>&1 && exec bash -c "$0"; exec sh -c "$0"'

WAIT_COMMAND = ("sh", "-c", _BY_A_SHELL, WAIT_SCRIPT)
"""Runs the script, by bash where there is one."""

BRIEF_WAIT_COMMAND = (
    "sh",
    "-c",
    f'[ -s /run/cloud-init/result.json ] || {{ {_BY_A_SHELL}; }}; eval "$0"',
    f"brief=1\n{WAIT_SCRIPT}",
)
"""The same for a guest whose boot was waited for before: without the log, and without asking
whether the guest shuts down, which take 50 ms of an emulated processor each; and where there is
nothing to wait for, by the shell that runs already."""

GOING_DOWN_COMMAND = (
    "sh",
    "-c",
    """
while [ -e /run/systemd/shutdown/scheduled ] ||
  [ "$(systemctl is-system-running 2>/dev/null)" = stopping ]; do
  sleep 1
done
""",
)
"""Ends with the shutdown of the guest, or when that has been cancelled."""

REPORT_SCRIPT = f"echo running{_REPORT}"
"""Shell script that prints cloud-init's report up to now."""

# What its log and the console have: 2026-11-30 03:19:01,327 - util.py[WARNING]: what is wrong
_LOGGED = r"\d[\d-]+ [\d:]+,\d+ - \S+?\[(WARNING|ERROR|CRITICAL|DEPRECATED)\]: (.*)"
_LOGGED_LINE = re.compile(_LOGGED)
_CONSOLE_LINE = re.compile(r"\[ *\d+\.\d+\] cloud-init\[\d+\]: " + _LOGGED)
# Warnings with so many equal characters at the beginning are the same.
_COMPARED = 200

_STAGES = ("init-local", "init", "modules-config", "modules-final")


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
class Shutdown:
    """A shutdown of the guest, under way or planned.

    Attributes:
        mode: `reboot`, `kexec`, `soft-reboot`, `poweroff`, `halt`; `shutdown` if unknown.
        seconds: In how many seconds; 0 when it is under way.
    """

    mode: str
    seconds: float

    @property
    def under_way(self) -> bool:
        """Whether it has begun."""
        return self.seconds <= 0

    @property
    def boots_again(self) -> bool:
        """Whether the guest is to boot again."""
        return self.mode in ("reboot", "kexec", "soft-reboot")


@dataclass(frozen=True, slots=True)
class CloudInitStatus:
    """How cloud-init ended.

    Attributes:
        state: `finished`; `crashed` when the last stage's unit failed; `disabled` or `absent`
            when there was nothing to wait for; `running` when it has not been waited for.
        datasource: Where its data comes from, in cloud-init's words.
        stages: Its stages in order.
        recoverable_errors: Warnings of cloud-init 23.4 and later, each once.
        logged: Warnings in its log, of all versions.
        shutdown: The guest's shutdown, if one is under way or planned.
    """

    state: str
    datasource: str = ""
    stages: tuple[StageResult, ...] = ()
    recoverable_errors: tuple[str, ...] = ()
    logged: tuple[str, ...] = ()
    shutdown: Shutdown | None = None

    @property
    def errors(self) -> tuple[str, ...]:
        """All stages' errors."""
        return tuple(error for stage in self.stages for error in stage.errors)

    @property
    def failed(self) -> bool:
        """Whether cloud-init reports a failure."""
        return self.state == "crashed" or bool(self.errors)

    @property
    def failure(self) -> str:
        """What failed, in its words."""
        return "; ".join(self.errors) or self.state

    @property
    def warnings(self) -> tuple[str, ...]:
        """Its warnings, each once, as "WARNING: what is wrong"."""
        return merge_warnings(self.recoverable_errors, self.logged)


def describe_stages(status: CloudInitStatus) -> Iterator[str]:
    """Describe each stage that has begun: how far it is, and what failed in it."""
    for stage in status.stages:
        if stage.started:
            yield f"{stage.name} {'ended' if stage.finished else 'runs'}"
            for error in stage.errors:
                yield f"{stage.name} failed: {error}"


def find_console_warning(line: str) -> str | None:
    """Find a warning of cloud-init in a line of the console, as "WARNING: what is wrong"."""
    found = _CONSOLE_LINE.search(line)
    return None if found is None else f"{found[1]}: {found[2].strip()}"


def merge_warnings(*sources: Iterable[str]) -> tuple[str, ...]:
    """Merge warnings, each once.

    The console has only the first line of each, and cloud-init's log not all: so they are compared
    by their beginning, and the first one is kept.
    """
    merged: dict[str, str] = {}
    for warning in (warning for source in sources for warning in source):
        begins = " ".join(warning.partition("\n")[0].split())[:_COMPARED]
        merged.setdefault(begins, warning)
    return tuple(merged.values())


def parse_status(output: str) -> CloudInitStatus:
    """Parse what `WAIT_SCRIPT` printed.

    Raises:
        ValueError: It is not the script's output.
    """
    # The document has no such line, as a text in JSON has no line ends; and the script prints the
    # shutdown last.
    printed, mark, shutdown = f"{output}\n".rpartition("\n== shutdown\n")
    state, _, rest = (printed if mark else output).strip().partition("\n")
    document, _, log = rest.partition("\n== log\n")
    if state not in ("absent", "disabled", "finished", "crashed", "running"):
        raise ValueError(f"not a status of cloud-init: {output[:200]!r}")
    try:
        status = parse_json(document)["v1"] if document.strip() else {}
        return CloudInitStatus(
            state,
            str(status.get("datasource") or ""),
            tuple(_parse_stage(name, status[name]) for name in _STAGES if name in status),
            merge_warnings(_recoverable(status)),
            merge_warnings(_parse_log(log)),
            _parse_shutdown(shutdown if mark else ""),
        )
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a status of cloud-init: {document[:200]!r} ({error})") from error


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
        raise TypeError(f"{safe_repr(value)} is not a time")
    return float(cast("float", value))


def _texts(value: object) -> tuple[str, ...]:
    """Read a list of messages, which need not be texts."""
    if not isinstance(value, (list, type(None))):
        raise TypeError(f"{safe_repr(value)} is not a list")
    return tuple(map(str, value or ()))


def _parse_log(log: str) -> Iterator[str]:
    """Read warnings of the log, which may have several lines."""
    warning = ""
    for line in log.splitlines():
        found = _LOGGED_LINE.match(line)
        if found is not None:
            if warning:
                yield warning
            warning = f"{found[1]}: {found[2]}"
        elif warning:
            warning += f"\n{line}"
    if warning:
        yield warning


def _parse_shutdown(printed: str) -> Shutdown | None:
    """Read how the guest shuts down, and in how many seconds; None if it does not."""
    # `shutdown -k` only announces one.
    if not printed.strip() or printed.startswith("dry-"):
        return None
    mode, seconds = printed.split()
    return Shutdown(mode, float(seconds))


def _recoverable(status: dict[str, Any]) -> tuple[str, ...]:
    """Collect the warnings: in each stage, by level ("WARNING": [texts]).

    A stage repeats those of the one before it, if both ran in one process.
    """
    return tuple(
        f"{level}: {text}"
        for name in _STAGES
        for level, texts in status.get(name, {}).get("recoverable_errors", {}).items()
        for text in _texts(texts)
    )
