from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pycloudlib.guest.cloudinit import WAIT_COMMAND, WAIT_SCRIPT, parse_status


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


def test_recoverable_errors_are_told_and_are_no_failure() -> None:
    warning = {"WARNING": ["Unhandled non-multipart userdata"], "DEPRECATED": ["use x"]}
    status = parse_status(make_output(init=stage(recoverable_errors=warning)))

    assert not status.failed
    text = "\n".join(status.recoverable_errors)
    assert "Unhandled non-multipart userdata" in text
    assert "use x" in text
    assert "WARNING" in text


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
    """A directory in place of /run/cloud-init, and what the script finds in its PATH."""

    directory: Path
    shells: tuple[str, ...]

    def __post_init__(self) -> None:
        (self.directory / "run").mkdir()
        tools = self.directory / "bin"
        tools.mkdir()
        for name in (*self.shells, "cat"):
            (tools / name).symlink_to(shutil.which(name) or "")
        sleep = f"#!/bin/sh\necho sleep >>{self.directory}/slept\nexec /bin/sleep $1\n"
        for name, text in {"sleep": sleep, "systemctl": "#!/bin/sh\nexit 1\n"}.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)

    def set_systemd(self, last_stage: str, system: str) -> None:
        """Let systemd say what the last stage's unit is, and the system."""
        systemctl = self.directory / "bin" / "systemctl"
        systemctl.write_text(
            "#!/bin/sh\n"
            f"case $1 in is-active) echo {last_stage};; is-system-running) echo {system};; esac\n"
        )

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

    def wait(self) -> subprocess.Popen[str]:
        run = str(self.directory / "run")
        return subprocess.Popen(
            [part.replace("/run/cloud-init", run) for part in WAIT_COMMAND],
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
