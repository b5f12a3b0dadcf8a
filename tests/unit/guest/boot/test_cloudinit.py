from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pycloudlib.guest.boot.cloudinit import (
    BRIEF_WAIT_COMMAND,
    GOING_DOWN_COMMAND,
    WAIT_COMMAND,
    WAIT_SCRIPT,
    Shutdown,
    find_console_warning,
    merge_warnings,
    parse_status,
)

# Of Debian 12's cloud-init 22.4.2, whose status knows no warnings.
OLD_LOG = """\
2026-11-29 10:00:00,000 - util.py[DEBUG]: Cloud-init v. 22.4.2 running 'init-local' at Sun
2026-11-29 10:00:01,000 - __init__.py[WARNING]: of the boot before
2026-11-30 03:20:44,055 - util.py[DEBUG]: Cloud-init v. 22.4.2 running 'init-local' at Mon
2026-11-30 03:20:49,200 - util.py[DEBUG]: Attempting to load yaml from string of length 56
2026-11-30 03:20:49,289 - util.py[WARNING]: Failed loading yaml blob. Invalid format at line 4 \
column 1: "while scanning for the next token
found character '\\t' that cannot start any token
  in "<unicode string>", line 4, column 1:
    \t- path: /a
    ^"
2026-11-30 03:20:49,362 - util.py[WARNING]: Failed loading yaml blob. Invalid format at line 4 \
column 1: "while scanning for the next token
found character '\\t' that cannot start any token
2026-11-30 03:20:49,365 - cloud_config.py[WARNING]: Failed at merging in cloud config part from \
part-001: empty cloud config
2026-11-30 03:21:01,000 - util.py[WARNING]: Running module runcmd failed
2026-11-30 03:21:01,001 - util.py[DEBUG]: Running module runcmd failed
Traceback (most recent call last):
  File "/usr/lib/python3/dist-packages/cloudinit/config/modules.py", line 246, in _run_modules
2026-11-30 03:28:04,505 - schema.py[WARNING]: Deprecated cloud-config provided:
users.0.sudo: DEPRECATED: The value ``false`` will be dropped after April 2027.
2026-11-30 03:28:05,000 - util.py[DEBUG]: Cloud-init v. 22.4.2 finished at Mon, 30 Nov 2026
"""
OLD_WARNINGS = (
    "WARNING: Failed loading yaml blob. Invalid format at line 4 column 1: "
    "\"while scanning for the next token\nfound character '\\t' that cannot start any token\n"
    '  in "<unicode string>", line 4, column 1:\n    \t- path: /a\n    ^"',
    "WARNING: Failed at merging in cloud config part from part-001: empty cloud config",
    "WARNING: Running module runcmd failed",
    "WARNING: Deprecated cloud-config provided:\n"
    "users.0.sudo: DEPRECATED: The value ``false`` will be dropped after April 2027.",
)
# On the console, of Debian 12's and of Debian 13's (25.1.4).
OLD_CONSOLE = (
    "[   46.517380] cloud-init[353]: 2026-11-30 03:19:01,327 - __init__.py[WARNING]: "
    "Unhandled non-multipart (text/x-not-multipart) userdata: 'b'# cloud-config'...'"
)
NEW_CONSOLE = (
    "[   81.082589] cloud-init[412]: 2026-11-30 03:16:54,708 - handlers[WARNING]: "
    "Unhandled non-multipart (text/x-not-multipart) userdata: 'b'# cloud-config'...'"
)
UNHANDLED = "Unhandled non-multipart (text/x-not-multipart) userdata: 'b'# cloud-config'...'"


def stage(errors: list[str] | None = None, **more: Any) -> dict[str, Any]:
    return {"errors": errors or [], "start": 1700000000.5, "finished": 1700000002.0, **more}


def make_output(state: str = "finished", **stages: dict[str, Any]) -> str:
    v1: dict[str, Any] = {
        "datasource": "DataSourceNoCloud [seed=/dev/vda]",
        "init-local": stage(),
        "init": stage(),
        "modules-config": stage(),
        "modules-final": stage(),
        "stage": None,
    }
    v1.update({name.replace("_", "-"): value for name, value in stages.items()})
    return f"{state}\n{json.dumps({'v1': v1}, indent=1)}\n"


def test_boot_that_went_well() -> None:
    status = parse_status(make_output())

    assert status.state == "finished"
    assert not status.failed
    assert status.errors == ()
    assert status.recoverable_errors == ()
    assert status.datasource == "DataSourceNoCloud [seed=/dev/vda]"


def test_stages_come_in_their_order_with_their_times() -> None:
    stages = parse_status(make_output()).stages

    assert [s.name for s in stages] == ["init-local", "init", "modules-config", "modules-final"]
    assert all((s.started, s.finished) == (1700000000.5, 1700000002.0) for s in stages)


def test_errors_are_given_in_cloud_inits_own_words() -> None:
    status = parse_status(
        make_output(
            init=stage(["Failed loading yaml blob"]),
            modules_final=stage(["('scripts_user', RuntimeError('Runparts: 1 failures'))"]),
        )
    )

    assert status.failed
    assert status.errors == (
        "Failed loading yaml blob",
        "('scripts_user', RuntimeError('Runparts: 1 failures'))",
    )


def test_recoverable_errors_of_several_stages_are_told_once() -> None:
    first = stage(recoverable_errors={"WARNING": ["one"]})
    second = stage(recoverable_errors={"WARNING": ["two", "one"], "ERROR": ["one"]})

    status = parse_status(make_output(modules_config=second, init=first))

    assert status.recoverable_errors == ("WARNING: one", "WARNING: two", "ERROR: one")


def test_recoverable_errors_are_told_and_are_no_failure() -> None:
    warning = {"WARNING": ["Unhandled non-multipart userdata"], "DEPRECATED": ["use x"]}
    status = parse_status(make_output(init=stage(recoverable_errors=warning)))

    assert not status.failed
    text = "\n".join(status.recoverable_errors)
    assert "Unhandled non-multipart userdata" in text
    assert "use x" in text
    assert "WARNING" in text


def test_warning_that_each_stage_repeats_is_told_once() -> None:
    # As of cloud-init 25.1, one process for all stages.
    warning = {"WARNING": [UNHANDLED, UNHANDLED]}
    status = parse_status(
        make_output(
            init=stage(recoverable_errors=warning), modules_config=stage(recoverable_errors=warning)
        )
    )
    assert status.warnings == (f"WARNING: {UNHANDLED}",)


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        (OLD_CONSOLE, f"WARNING: {UNHANDLED}"),
        (NEW_CONSOLE, f"WARNING: {UNHANDLED}"),
        (f"vm-1 login: {NEW_CONSOLE}", f"WARNING: {UNHANDLED}"),
        (
            "[   50.1] cloud-init[4]: 2026-11-30 03:25:31,987 - loggers.py[DEPRECATED]: Deprecated "
            "cloud-config provided: apt_update:  Deprecated in 22.2.",
            "DEPRECATED: Deprecated cloud-config provided: apt_update:  Deprecated in 22.2.",
        ),
        (
            "[   50.1] cloud-init[4]: 2026-11-30 03:27:53,392 - main.py[ERROR]: failed stage init",
            "ERROR: failed stage init",
        ),
        ("[   46.5] cloud-init[353]: 2026-11-30 03:19:01,327 - util.py[DEBUG]: x", None),
        ("[   46.5] cloud-init[353]: ci-info: | Device |  Up  |", None),
        ("[   46.5] systemd[1]: 2026-11-30 03:19:01,327 - util.py[WARNING]: x", None),
        ("", None),
    ],
)
def test_warning_is_found_on_the_console(line: str, warning: str | None) -> None:
    assert find_console_warning(line) == warning


def test_warning_of_several_sources_is_told_once_and_whole() -> None:
    whole = "WARNING: Failed  loading:\nfound character '\\t'"
    merged = merge_warnings([whole], ["WARNING: Failed loading:", "WARNING: other"], [whole])
    assert merged == (whole, "WARNING: other")


@pytest.mark.parametrize(
    ("printed", "shutdown"),
    [
        ("reboot 0", Shutdown("reboot", 0)),
        ("kexec 59", Shutdown("kexec", 59)),
        ("poweroff -3", Shutdown("poweroff", -3)),
        ("dry-reboot 60", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("output", ["absent\n", "disabled\n", make_output()])
def test_shutdown_is_told(output: str, printed: str, shutdown: Shutdown | None) -> None:
    assert parse_status(f"{output}\n== shutdown\n{printed}\n").shutdown == shutdown


def test_what_user_data_has_in_a_warning_is_no_word_of_the_script() -> None:
    error = 'no such thing: "\n== log\n== shutdown\npoweroff 0"'
    log = "2026-11-30 03:20:49,289 - util.py[WARNING]: no\n== shutdown\nreboot 0\n"
    printed = f"{make_output(init=stage([error]))}\n== log\n{log}\n== shutdown\nkexec 7\n"
    status = parse_status(printed)
    assert status.errors == (error,)
    assert status.logged == ("WARNING: no\n== shutdown\nreboot 0",)
    assert status.shutdown == Shutdown("kexec", 7)


def test_crash_is_a_failure_even_without_errors() -> None:
    status = parse_status(make_output("crashed"))

    assert status.state == "crashed"
    assert status.failed


@pytest.mark.parametrize("output", ["crashed", "crashed\n", "finished\n"])
def test_status_may_be_missing(output: str) -> None:
    status = parse_status(output)

    assert status.state == output.strip()
    assert status.stages == ()


@pytest.mark.parametrize("state", ["absent", "disabled"])
def test_nothing_to_wait_for_is_no_failure(state: str) -> None:
    status = parse_status(f"{state}\n")

    assert status.state == state
    assert not status.failed


def test_stage_that_never_ran_has_no_times() -> None:
    status = parse_status(make_output(modules_final={"errors": [], "start": None}))

    assert (status.stages[-1].started, status.stages[-1].finished) == (None, None)


def test_stages_of_other_versions_are_no_obstacle() -> None:
    status = parse_status(make_output(new_stage=stage(), boot_status_code={"a": 1}))

    assert len(status.stages) == 4


@pytest.mark.parametrize(
    "output",
    [
        "",
        "\n\n",
        "sh: 1: cloud-init: not found",
        "status: done\n",
        "finished\nnot JSON",
        'finished\n{"v1": {"init": ',
        "finished\n{}",
        "finished\n[]",
        "finished\nnull",
        'finished\n{"v1": []}',
        'finished\n{"v1": {"init": null}}',
        'finished\n{"v1": {"init": {"errors": null}}}',
        'finished\n{"v1": {"init": {"recoverable_errors": ["x"]}}}',
    ],
)
def test_rubbish_is_refused_or_read_but_never_something_else(output: str) -> None:
    try:
        status = parse_status(output)
    except ValueError:
        return
    assert status.state == "finished"


@pytest.mark.parametrize("output", ["", "status: done\n", "finished\nnot JSON", "finished\n[]"])
def test_what_is_no_status_is_refused(output: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_status(output)


def test_script_is_one_that_a_shell_reads() -> None:
    subprocess.run(["sh", "-n"], input=WAIT_SCRIPT.encode(), check=True)


@dataclass
class FakeGuest:
    """A directory in place of what the script looks at, and what it finds in its PATH."""

    directory: Path
    shells: tuple[str, ...]

    def __post_init__(self) -> None:
        (self.directory / "run").mkdir()
        tools = self.directory / "bin"
        tools.mkdir()
        for name in (*self.shells, "awk", "cat", "date"):
            (tools / name).symlink_to(shutil.which(name) or "")
        sleep = f"#!/bin/sh\necho sleep >>{self.directory}/slept\nexec /bin/sleep $1\n"
        for name, text in {"sleep": sleep, "systemctl": "#!/bin/sh\nexit 1\n"}.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)

    def set_systemd(self, last_stage: str, system: str, jobs: str = "") -> None:
        """Let systemd say what the last stage's unit is, and the system, and what it does."""
        (self.directory / "jobs").write_text(jobs)
        systemctl = self.directory / "bin" / "systemctl"
        systemctl.with_suffix(".new").write_text(
            "#!/bin/sh\n"
            f"case $1 in is-active) echo {last_stage};; is-system-running) echo {system};;"
            f" list-jobs) cat {self.directory}/jobs;; esac\n"
        )
        systemctl.with_suffix(".new").chmod(0o755)
        systemctl.with_suffix(".new").replace(systemctl)

    def schedule(self, text: str) -> Path:
        """Announce a shutdown as systemd-logind does."""
        scheduled = self.directory / "systemd" / "shutdown" / "scheduled"
        scheduled.parent.mkdir(parents=True)
        scheduled.write_text(text)
        return scheduled

    def add_process(self, unit: str, name: str, *, old_hierarchy: bool = False) -> Path:
        """Let a process of a unit run; give the list of the unit's processes."""
        base = self.directory / "cgroup" / ("systemd" if old_hierarchy else "")
        processes = base / "system.slice" / f"{unit}.service" / "cgroup.procs"
        processes.parent.mkdir(parents=True)
        processes.write_text("76\n77\n")  # the first has ended meanwhile
        comm = self.directory / "proc" / "77" / "comm"
        comm.parent.mkdir(parents=True)
        comm.write_text(f"{name}\n")
        return processes

    def forget(self, cleaned: bool) -> None:
        """Remove what cloud-init wrote: as its own `clean` does, or all of it."""
        run = self.directory / "run"
        if cleaned:
            for name in ("result.json", "status.json"):
                (run / name).symlink_to(self.directory / "removed" / name)
        else:
            run.rmdir()

    def add_cloud_init(self) -> None:
        (self.directory / "bin" / "cloud-init").symlink_to("/bin/true")

    def write(self, name: str, text: str) -> None:
        (self.directory / "run" / name).write_text(text)

    def end(self, **files: str) -> tuple[str, str]:
        """Make sure that the script waits, write what it waits for, and give what it printed."""
        self.add_cloud_init()
        with self.wait() as waiting:
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(timeout=0.7)
            for name, text in files.items():
                self.write(name, text)
            return waiting.communicate(timeout=10)

    def wait(self, command: Sequence[str] = WAIT_COMMAND) -> subprocess.Popen[str]:
        places = {
            "/run/cloud-init": "run",
            "/run/systemd": "systemd",
            "/sys/fs/cgroup": "cgroup",
            "/proc": "proc",
            "/var/log": "log",
        }

        def move(text: str) -> str:
            for place, moved in places.items():
                text = text.replace(place, f"{self.directory}/{moved}")
            return text

        return subprocess.Popen(
            [move(part) for part in command],
            executable="/bin/sh",
            env={"PATH": str(self.directory / "bin")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def slept(self) -> bool:
        return (self.directory / "slept").exists()


@pytest.fixture(params=[("sh", "bash"), ("sh",)], ids=["bash", "sh"])
def guest(request: pytest.FixtureRequest, tmp_path: Path) -> FakeGuest:
    return FakeGuest(tmp_path, request.param)


def test_wait_ends_when_cloud_init_has_ended(guest: FakeGuest) -> None:
    assert guest.end(**{"status.json": "{}", "result.json": "{}"}) == ("finished\n{}", "")


def test_waiting_starts_no_programs_where_there_is_bash(guest: FakeGuest) -> None:
    assert guest.end(disabled="") == ("disabled\n", "")
    assert guest.slept == ("bash" not in guest.shells)


def test_guest_without_cloud_init_is_not_waited_for(guest: FakeGuest) -> None:
    with guest.wait() as waiting:
        assert waiting.communicate(timeout=10) == ("absent\n", "")


@pytest.mark.parametrize("cleaned", [True, False], ids=["cloud-init clean", "rm -rf"])
@pytest.mark.parametrize("system", ["running", "degraded", "starting"])
def test_end_is_known_when_what_cloud_init_wrote_is_gone(
    cleaned: bool, system: str, guest: FakeGuest
) -> None:
    guest.add_cloud_init()
    guest.set_systemd("active", system)
    guest.forget(cleaned)
    with guest.wait() as waiting:
        output, errors = waiting.communicate(timeout=10)
    assert (output, errors) == ("finished\n", "")
    assert parse_status(output).state == "finished"


@pytest.mark.parametrize("cleaned", [True, False], ids=["cloud-init clean", "rm -rf"])
def test_guest_that_was_cleaned_and_goes_down_is_not_taken_for_ready(
    cleaned: bool, guest: FakeGuest
) -> None:
    guest.add_cloud_init()
    guest.set_systemd("active", "stopping")
    guest.forget(cleaned)
    with guest.wait() as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=0.7)
        waiting.kill()


@pytest.mark.parametrize(
    ("last_stage", "system", "printed"),
    [
        ("failed", "degraded", "crashed\n"),
        ("inactive", "running", "disabled\n"),
        ("inactive", "degraded", "disabled\n"),
    ],
)
def test_last_stage_that_never_ends_is_not_waited_for(
    last_stage: str, system: str, printed: str, guest: FakeGuest
) -> None:
    guest.add_cloud_init()
    guest.set_systemd(last_stage, system)
    guest.forget(cleaned=False)
    with guest.wait() as waiting:
        assert waiting.communicate(timeout=10) == (printed, "")


@pytest.mark.parametrize("last_stage", ["inactive", "activating"])
def test_boot_that_has_not_come_to_cloud_init_is_waited_for(
    last_stage: str, guest: FakeGuest
) -> None:
    guest.add_cloud_init()
    guest.set_systemd(last_stage, "starting")
    guest.forget(cleaned=False)
    with guest.wait() as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=0.7)
        waiting.kill()


def ended(guest: FakeGuest) -> None:
    """Let cloud-init have ended."""
    guest.add_cloud_init()
    guest.write("result.json", "{}")
    guest.write("status.json", json.dumps({"v1": {"init": stage()}}))


def answer(guest: FakeGuest) -> str:
    with guest.wait() as waiting:
        output, errors = waiting.communicate(timeout=10)
    assert errors == ""
    return output


def test_what_the_log_of_this_boot_warns_of_is_told(guest: FakeGuest) -> None:
    ended(guest)
    log = guest.directory / "log" / "cloud-init.log"
    log.parent.mkdir()
    log.write_text(OLD_LOG)
    assert parse_status(answer(guest)).warnings == OLD_WARNINGS


def test_brief_wait_starts_no_programs(guest: FakeGuest) -> None:
    ended(guest)
    for name in ("awk", "systemctl"):
        (guest.directory / "bin" / name).unlink()
    guest.schedule("USEC=1\nMODE=reboot\n")
    with guest.wait(BRIEF_WAIT_COMMAND) as waiting:
        output, errors = waiting.communicate(timeout=10)
    assert errors == ""
    assert parse_status(output).state == "finished"
    assert parse_status(output).shutdown is None


def test_log_that_may_not_be_read_is_no_obstacle(guest: FakeGuest) -> None:
    ended(guest)
    (guest.directory / "log" / "cloud-init.log").mkdir(parents=True)
    status = parse_status(answer(guest))
    assert (status.state, status.warnings) == ("finished", ())


@pytest.mark.parametrize("old_hierarchy", [False, True], ids=["cgroup 2", "cgroup 1"])
@pytest.mark.parametrize("unit", ["cloud-final", "cloud-init-main"])
def test_what_cloud_init_leaves_to_a_process_is_waited_for(
    unit: str, old_hierarchy: bool, guest: FakeGuest
) -> None:
    ended(guest)
    processes = guest.add_process(unit, "cloud-init", old_hierarchy=old_hierarchy)
    with guest.wait() as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=0.7)
        guest.set_systemd("active", "stopping", "1 reboot.target start waiting\n")
        processes.unlink()
        output, errors = waiting.communicate(timeout=10)
    assert errors == ""
    assert parse_status(output).shutdown == Shutdown("reboot", 0)


def test_what_user_data_leaves_running_is_not_waited_for(guest: FakeGuest) -> None:
    ended(guest)
    guest.add_process("cloud-final", "my-daemon")
    assert parse_status(answer(guest)).shutdown is None


@pytest.mark.parametrize(
    ("jobs", "mode"),
    [
        ("12 systemd-reboot.service start waiting\n13 reboot.target start waiting\n", "reboot"),
        ("12 kexec.target start waiting\n", "kexec"),
        ("12 poweroff.target start waiting\n", "poweroff"),
        ("12 halt.target start waiting\n", "halt"),
        ("12 soft-reboot.target start waiting\n", "soft-reboot"),
        ("", "shutdown"),
    ],
)
def test_guest_that_goes_down_says_how(jobs: str, mode: str, guest: FakeGuest) -> None:
    ended(guest)
    guest.set_systemd("active", "stopping", jobs)
    shutdown = parse_status(answer(guest)).shutdown
    assert shutdown == Shutdown(mode, 0)
    assert shutdown.under_way


@pytest.mark.parametrize("cloud_init", ["ended", "absent"])
def test_shutdown_that_is_announced_is_told(cloud_init: str, guest: FakeGuest) -> None:
    if cloud_init == "ended":
        ended(guest)
    guest.set_systemd("active", "running")
    at = int((time.time() + 60) * 1e6)
    guest.schedule(f"USEC={at}\nWARN_WALL=1\nMODE=reboot\nWALL_MESSAGE=a\\x20=b; exit\n")
    shutdown = parse_status(answer(guest)).shutdown
    assert shutdown is not None
    assert (shutdown.mode, shutdown.under_way, shutdown.boots_again) == ("reboot", False, True)
    assert 30 < shutdown.seconds <= 60


def test_shutdown_is_waited_for_until_it_is_called_off(guest: FakeGuest) -> None:
    guest.set_systemd("active", "running")
    scheduled = guest.schedule("USEC=1\nMODE=reboot\n")
    with guest.wait(GOING_DOWN_COMMAND) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=0.7)
        scheduled.unlink()
        assert waiting.wait(timeout=10) == 0
    guest.set_systemd("active", "stopping")
    with guest.wait(GOING_DOWN_COMMAND) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=0.7)
        waiting.kill()
