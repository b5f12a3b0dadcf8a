"""The command line: what is given, what is printed, how it ends; without a machine that runs."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete

from pycloudlib.cli import lifecycle
from pycloudlib.cli.app import application, main
from pycloudlib.cli.common import (
    MEANINGS,
    ExitCode,
    Session,
    colour_choice,
    exit_code_of,
    print_error,
)
from pycloudlib.cli.machines import AddedDisk
from pycloudlib.diagnosis import Audience, Cause, Diagnosis
from pycloudlib.errors import (
    CleanupError,
    CloudError,
    ImageNotFoundError,
    InstanceNotFoundError,
    MissingPrerequisiteError,
    PycloudlibTimeoutError,
)
from pycloudlib.qemu.cloud import Disk
from pycloudlib.qemu.failure.explaining import explain
from pycloudlib.qemu.state.rundir import RunDirectory
from tests.unit.clirun import make_machine, run

Capture = pytest.CaptureFixture[str]

SLOW = ("paramiko", "cryptography", "httpx", "rich", "yaml", "pycdlib", "qemu.qmp", "asyncio")


@pytest.fixture
def working_dir(home: Path) -> Path:
    return home / ".local/state/pycloudlib/instances"


@pytest.fixture
def web(working_dir: Path, tiny_image: Path) -> RunDirectory:
    return make_machine(working_dir, "web", base=tiny_image)


def all_commands(group: click.Group = application, prefix: str = "") -> list[str]:
    names = []
    for name, command in group.commands.items():
        names.append(f"{prefix}{name}")
        if isinstance(command, click.Group):
            names += all_commands(command, f"{prefix}{name} ")
    return names


@pytest.mark.parametrize("name", all_commands())
def test_every_command_explains_itself(capsys: Capture, name: str) -> None:
    done = run(capsys, *name.split(), "--help")

    assert done.code == 0
    assert f"Usage: pycloudlib {name}" in done.out


def test_help_lists_every_command_with_a_line(capsys: Capture) -> None:
    done = run(capsys, "--help")

    assert done.code == 0
    for name, command in application.commands.items():
        assert command.short_help, name
        assert f"  {name} " in done.out


def test_version_is_told(capsys: Capture) -> None:
    assert run(capsys, "--version").out.startswith("pycloudlib, version 1!11")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lunch"], "No such command 'lunch'. Did you mean 'launch'?"),
        (["images", "lst"], "Did you mean 'list'?"),
        (["xyzzy"], "No such command 'xyzzy'."),
        (["launch"], "Missing argument 'IMAGE'"),
        (["launch", "noble", "--cpu", "2"], "--cpus"),
        (["launch", "noble", "--cpus", "0"], "0 is not in the range"),
        (["launch", "noble", "--memory", "2"], "'2' is no size"),
        (["launch", "noble", "--memory", "1.3M"], "not a whole number of MiB"),
        (["launch", "noble", "--disk", "500M"], "not a whole number of GiB"),
        (["launch", "noble", "--add-disk", "500M"], "not a whole number of GiB"),
        (["launch", "noble", "--add-disk", ",serial=a"], "expected a size such as 20G, or a path"),
        (["launch", "noble", "--name", "My_VM"], "expected a host name"),
        (["launch", "noble", "--name", "layers"], "directory of theirs"),
        (["launch", "noble", "--user-data", "/no/such"], "does not exist"),
        (["launch", "noble", "--timeout", "5"], "--timeout is for --wait"),
        (["launch", "noble", "-w", "--timeout", "0"], "'0' is no time"),
        (["launch", "noble", "-u", "-", "--network-config", "-"], "Standard input can be one file"),
        (["launch", "noble", "-u", "/dev/stdin", "--network-config", "-"], "Standard input can"),
        (["start", "web", "-w", "--timeout", "-1"], "'-1' is no time: expected a positive number"),
        (["wait", "web", "--timeout", "nan"], "'nan' is no time"),
        (["wait", "web", "--timeout", "soon"], "'soon' is no time"),
        (["exec", "web"], "Missing argument 'COMMAND...'"),
        (["exec", "web", "--"], "Missing argument 'COMMAND...'"),
        (["copy", "a", "b"], "Neither is in a machine"),
        (["copy", "web:a", "web:b"], "Both are in a machine"),
        (["console", "web"], "console needs a terminal"),
        (["start"], "Name machines, or give --all"),
        (["delete", "web", "--all"], "Name machines, or give --all"),
        (["images", "lock"], "Name a RELEASE, or give --update"),
        (["images", "pull", "bookworm"], "pycloudlib images build bookworm"),
        (["images", "build", "noble"], "'noble' is not one of"),
        (["completion", "tcsh"], "'tcsh' is not one of"),
    ],
)
def test_wrong_input_explains_itself(capsys: Capture, arguments: list[str], words: str) -> None:
    done = run(capsys, *arguments)

    assert done.code == ExitCode.USAGE
    assert words in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("20G", Disk(20)),
        ("2T,serial=a.b", Disk(2048, serial="a.b")),
        ("data.img", Disk(path="data.img")),
        ("a,b.img,serial=x", Disk(path="a,b.img", serial="x")),
        ("./20G", Disk(path="./20G")),
        ("/a.img,write", Disk(path="/a.img", write=True)),
        ("/a.img,serial=x,write", Disk(path="/a.img", serial="x", write=True)),
        ("/a.img,write,serial=x", Disk(path="/a.img", serial="x", write=True)),
    ],
)
def test_added_disks_are_read(text: str, disk: Disk) -> None:
    assert AddedDisk().convert(text, None, None) == disk


@pytest.mark.parametrize(
    "command",
    ["info", "start", "stop", "restart", "wait", "delete", "shell", "logs", "diagnose", "snapshot"],
)
def test_unknown_machine_is_not_found_and_the_nearest_named(
    capsys: Capture, web: RunDirectory, command: str
) -> None:
    done = run(capsys, command, "wbe")

    assert done.code == ExitCode.NOT_FOUND
    assert done.err.strip() == "Error: There is no machine 'wbe'; did you mean 'web'?"


def test_unknown_machine_where_there_are_none_says_so(capsys: Capture) -> None:
    assert "there are none ('pycloudlib launch')" in run(capsys, "info", "web").err


def test_unknown_machine_that_is_like_none_lists_what_there_is(
    capsys: Capture, web: RunDirectory
) -> None:
    assert "there are: web" in run(capsys, "info", "database").err


def test_machine_of_another_program_is_named_with_its_cloud(
    capsys: Capture, working_dir: Path, tiny_image: Path
) -> None:
    make_machine(working_dir, "job-1", tag="job", base=tiny_image)

    done = run(capsys, "info", "job-1")

    assert done.code == ExitCode.NOT_FOUND
    assert "another program's is called 'job/job-1'" in done.err
    assert "job/job-1" not in run(capsys, "list").out
    assert "job/job-1" in run(capsys, "list", "--all").out
    assert "State:     off" in run(capsys, "info", "job/job-1").out


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("jamy", "did you mean 'jammy'?"),
        ("bookwrm", "did you mean 'bookworm'?"),
        ("/no/such.img", "neither a release, nor a snapshot, nor a file"),
        ("Noble!", "did you mean 'noble'?"),
    ],
)
def test_unknown_image_is_not_found(capsys: Capture, image: str, words: str) -> None:
    for arguments in (["launch", image], ["images", "export", image, "x.img"]):
        done = run(capsys, *arguments)

        assert done.code == ExitCode.NOT_FOUND
        assert words in done.err


def test_name_in_use_says_by_what(capsys: Capture, web: RunDirectory, tiny_image: Path) -> None:
    done = run(capsys, "launch", str(tiny_image), "--name", "web")

    assert done.code == ExitCode.FAILURE
    assert "'web' is in use by a machine of tiny.img (off, launched" in done.err
    assert "'pycloudlib delete web' removes it" in done.err


def test_list_is_a_table(capsys: Capture, web: RunDirectory) -> None:
    done = run(capsys, "list")

    heads, line = done.out.splitlines()
    assert heads.split() == [
        *("NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "DISK", "SSH", "CONSOLE", "ACCEL", "AGE")
    ]
    assert line.startswith("web   off    tiny.img  2     2 GiB   10 GiB  18090  18091    tcg")


def test_list_of_nothing_says_how_to_begin(capsys: Capture) -> None:
    done = run(capsys, "list")

    assert (done.code, done.out) == (0, "")
    assert "pycloudlib launch" in done.err


@pytest.mark.parametrize("command", [["list"], ["info", "web"]])
def test_json_has_the_documented_keys(
    capsys: Capture, web: RunDirectory, command: list[str], tiny_image: Path
) -> None:
    (told,) = json.loads(run(capsys, *command, "--json").out)

    assert told == {
        "name": "web",
        "cloud": "cli",
        "id": f"{web.disk}::18090::18091",
        "state": "off",
        "problem": "",
        "image": str(tiny_image),
        "cpus": 2,
        "memory_mib": 2048,
        "disk_bytes": 10 << 30,
        "disk_used_bytes": told["disk_used_bytes"],
        "ssh_port": 18090,
        "telnet_port": 18091,
        "accelerator": "tcg",
        "username": "ubuntu",
        "private_key": "/keys/id",
        "public_key": "",
        "pid": None,
        "created": told["created"],
        "directory": str(web.path),
        "place": "",
        "disks": [],
    }


def test_json_of_nothing_is_an_empty_list(capsys: Capture) -> None:
    assert json.loads(run(capsys, "list", "--json").out) == []


def test_damaged_machine_is_listed_as_broken_and_can_be_deleted(
    capsys: Capture, web: RunDirectory
) -> None:
    (web.path / "machine.json").write_text("{")

    assert "broken" in run(capsys, "list").out
    assert "machine.json is damaged" in run(capsys, "info", "web").out
    refused = run(capsys, "start", "web")
    assert refused.code == ExitCode.FAILURE
    assert "'pycloudlib delete web' removes it" in refused.err
    assert run(capsys, "delete", "web").code == 0
    assert not web.path.exists()


def test_launch_that_was_cut_off_is_listed_as_broken(capsys: Capture, working_dir: Path) -> None:
    (working_dir / "pycl-qemu-cli" / "half").mkdir(parents=True)

    assert "broken" in run(capsys, "list").out
    assert run(capsys, "delete", "half").code == 0
    assert run(capsys, "list", "--json").out.strip() == "[]"


def test_one_that_fails_does_not_keep_the_others(capsys: Capture, web: RunDirectory) -> None:
    done = run(capsys, "delete", "nobody", "web")

    assert done.code == ExitCode.NOT_FOUND
    assert "There is no machine 'nobody'" in done.err
    assert not web.path.exists()


def test_logs_are_printed_as_they_are(capsys: Capture, web: RunDirectory) -> None:
    web.console_log.write_bytes(b"one\r\ntwo\nthree")
    web.qemu_log.write_text("QEMU's word\n")

    assert run(capsys, "logs", "web").out == "one\r\ntwo\nthree"
    assert run(capsys, "logs", "web", "-n", "2").out == "two\nthree"
    assert run(capsys, "logs", "web", "-n", "0").out == ""
    assert run(capsys, "logs", "web", "-n", "9").out == "one\r\ntwo\nthree"
    assert run(capsys, "logs", "web", "--qemu").out == "QEMU's word\n"
    # Nothing comes any more of a machine that is off.
    assert run(capsys, "logs", "web", "--follow").out == "one\r\ntwo\nthree"


def test_log_that_is_not_there_yet_is_empty(capsys: Capture, web: RunDirectory) -> None:
    done = run(capsys, "logs", "web")

    assert (done.code, done.out) == (0, "")


def test_deleting_what_is_off_is_asked_for(
    capsys: Capture, web: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _prompt: "n")

    done = run(capsys, "prune", "--stopped")

    assert done.code == ExitCode.FAILURE
    assert "Nothing was done" in done.err
    assert web.path.exists()


def test_wrong_configuration_is_a_usage_error(
    capsys: Capture, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = home / "broken.toml"
    file.write_text("[qemu]\nimage_dir = 5\n")
    monkeypatch.setenv("PYCLOUDLIB_CONFIG", str(file))

    done = run(capsys, "list")

    assert done.code == ExitCode.USAGE
    assert "image_dir in [qemu] of" in done.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InstanceNotFoundError("x"), ExitCode.NOT_FOUND),
        (ImageNotFoundError("x"), ExitCode.NOT_FOUND),
        (PycloudlibTimeoutError("x"), ExitCode.TIMEOUT),
        (CloudError("x"), ExitCode.FAILURE),
        (MissingPrerequisiteError("x"), ExitCode.FAILURE),
        (OSError(2, "No such file", "x"), ExitCode.FAILURE),
        (ValueError("x"), ExitCode.USAGE),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
        (RuntimeError("x"), ExitCode.FAILURE),
    ],
)
def test_every_error_is_one_message_and_a_code(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: ExitCode
) -> None:
    def fail(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr(lifecycle, "delete_machine", fail)

    done = run(capsys, "delete", "web")

    assert done.code == code == exit_code_of(error)
    assert len([line for line in done.err.splitlines() if line]) == 1
    assert "Traceback" not in done.err


def test_twice_verbose_shows_the_traceback(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise CloudError("it did not work")

    monkeypatch.setattr(lifecycle, "delete_machine", fail)

    for arguments in (["-vv", "delete", "web"], ["delete", "web", "-vv"]):
        done = run(capsys, *arguments)
        assert "Traceback" in done.err
        assert done.err.splitlines()[-1] == "Error: it did not work"


def test_interrupted_question_ends_as_ctrl_c(capsys: Capture) -> None:
    error = click.Abort()
    error.__cause__ = KeyboardInterrupt()

    assert exit_code_of(error) is ExitCode.INTERRUPTED
    print_error(error, with_traceback=False)
    assert capsys.readouterr().err == "Interrupted\n"


def test_every_exit_code_has_a_meaning() -> None:
    assert set(MEANINGS) == set(ExitCode)


def test_quiet_says_nothing_beside_the_result(capsys: Capture, web: RunDirectory) -> None:
    assert run(capsys, "-q", "list", "--all").err == ""
    assert run(capsys, "prune", "--quiet").err == ""


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colour_choice() is None  # click looks for a terminal
    monkeypatch.setenv("NO_COLOR", "1")
    assert colour_choice() is False


def test_log_is_left_as_it_was(capsys: Capture) -> None:
    logger = logging.getLogger("pycloudlib")
    before = (logger.level, list(logger.handlers))

    run(capsys, "-vv", "list")

    assert (logger.level, list(logger.handlers)) == before


def test_as_much_of_the_log_is_printed_as_is_asked_for(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell(*_arguments: object) -> list[Exception]:
        for level in ("debug", "info", "warning", "error"):
            getattr(logging.getLogger("pycloudlib.some"), level)("a %s", level)
        return []

    monkeypatch.setattr(lifecycle, "delete_machine", tell)

    def told(*options: str) -> list[str]:
        return run(capsys, "delete", "web", *options).err.splitlines()

    everything = ["a debug", "a info", "Warning: a warning", "Error: a error"]
    assert told("-vv")[-4:] == everything
    assert told("-v") == everything[1:]
    assert told() == everything[2:]
    assert told("-q") == everything[3:]


def complete(*words: str) -> list[str]:
    completer = BashComplete(application, {"obj": Session()}, "pycloudlib", "_PYCLOUDLIB_COMPLETE")
    return [item.value for item in completer.get_completions(list(words[:-1]), words[-1])]


def test_commands_options_and_names_are_completed(web: RunDirectory) -> None:
    assert complete("la") == ["launch"]
    assert complete("images", "pu") == ["pull"]
    assert "--memory" in complete("launch", "--m")
    assert complete("info", "") == ["web"]
    assert complete("delete", "web", "w") == ["web"]
    assert complete("exec", "w") == ["web"]
    assert complete("copy", "we")[0] == "web:"
    assert complete("launch", "nob") == ["noble"]
    assert complete("launch", "./x") == ["./x"]


def test_what_is_no_command_is_no_error_while_it_is_typed() -> None:
    assert "launch" in complete("nonsense", "")


def test_defect_of_our_own_is_called_one(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(lifecycle, "delete_machine", fail)

    done = run(capsys, "delete", "a", "b")

    assert done.code == ExitCode.FAILURE
    assert done.err == "Error: this is a defect of pycloudlib: KeyError: 'x' (-vv tells more)\n"


def test_wrong_configuration_is_no_obstacle_to_completion(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYCLOUDLIB_CONFIG", str(home / "none.toml"))

    assert complete("info", "") == []
    assert complete("launch", "nob") == ["noble"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(capsys: Capture, shell: str) -> None:
    done = run(capsys, "completion", shell)

    assert done.code == 0
    assert "_PYCLOUDLIB_COMPLETE" in done.out


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--json"], ["info", "web"]])
def test_quick_commands_load_nothing_heavy(web: RunDirectory, arguments: list[str]) -> None:
    program = (
        "import sys; from pycloudlib.cli.app import main\n"
        f"code = main({arguments!r})\n"
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert not set(done.stderr.split()) & set(SLOW)


def test_module_is_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pycloudlib", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("pycloudlib, version")


def test_main_reads_this_process_s_arguments(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pycloudlib", "--version"])

    assert main() == 0
    assert "version" in capsys.readouterr().out


@pytest.mark.parametrize("cause", Cause)
def test_hints_are_those_of_the_command_line(cause: Cause, capsys: Capture) -> None:
    others = "start() of instance_type, which says: start() switches it on"
    error = CloudError(others)
    explain(error, Diagnosis(cause, state="running"))

    print_error(error, with_traceback=False)

    told = capsys.readouterr().err
    assert told.startswith(f"Error: {others}\n  Cause: "), "others' words stay as they are"
    assert f"  Try: {cause.hint_for(Audience.COMMAND_LINE)}\n  Machine: running" in told
    assert told.count("  Try: ") == 1
    for python in ("start()", "instance_type", "ready_timeout"):
        assert python not in told.partition("\n")[2]


def test_error_whose_arguments_are_no_texts_is_told_with_its_diagnosis(capsys: Capture) -> None:
    error = CleanupError([OSError("stuck")])
    explain(error, Diagnosis(Cause.SWITCHED_OFF))

    print_error(error, with_traceback=False)

    told = capsys.readouterr().err
    assert "stuck" in told
    assert "  Cause: the machine is off" in told


def test_error_without_a_diagnosis_is_told_as_it_is(capsys: Capture) -> None:
    print_error(CloudError("start() switches it on"), with_traceback=False)

    assert capsys.readouterr().err == "Error: start() switches it on\n"
