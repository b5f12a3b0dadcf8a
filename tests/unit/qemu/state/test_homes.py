"""Where things go without a home directory, with an odd one, and with one that is of no use."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pycloudlib.cli.doctor import Outcome, judge
from pycloudlib.cli.hostfacts import collect
from pycloudlib.config import parse_config
from pycloudlib.errors import CloudSetupError
from pycloudlib.qemu.state.settings import QemuSettings, find_home, find_obstacle
from tests.unit.clirun import run

STRANGER = 12345
VARIABLES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")


@pytest.fixture
def no_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, no_xdg: None) -> None:
    """Have no home: as a user that passwd does not know."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def parse(**section: object) -> QemuSettings:
    return QemuSettings.parse({key: str(value) for key, value in section.items()}, "x.toml")


def test_directories_are_the_ones_of_the_specification(home: Path, no_xdg: None) -> None:
    settings = parse()

    assert settings.image_dir == home / ".local/share/pycloudlib/images"
    assert settings.working_dir == home / ".local/state/pycloudlib/instances"
    assert settings.state_dir == home / ".local/state/pycloudlib"
    assert settings.cache_dir == home / ".cache/pycloudlib"


@pytest.mark.parametrize("value", ["", " ", "relative", "./relative", "~/x"])
def test_relative_directory_of_the_environment_is_ignored(
    value: str, home: Path, monkeypatch: pytest.MonkeyPatch, no_xdg: None
) -> None:
    before = parse()
    for variable in VARIABLES:
        monkeypatch.setenv(variable, value)

    assert parse() == before


def test_state_dir_moves_all_that_is_kept(tmp_path: Path) -> None:
    settings = parse(state_dir=tmp_path)

    assert settings.image_dir == tmp_path / "images"
    assert settings.working_dir == tmp_path / "instances"
    assert settings.state_dir == tmp_path
    assert settings.cache_dir.is_relative_to(tmp_path)


def test_directory_that_is_configured_is_not_moved_by_state_dir(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()

    settings = parse(state_dir=tmp_path, working_dir=work)

    assert settings.working_dir == work


@pytest.mark.parametrize("value", ["/nowhere/at/all", 5, ""])
def test_state_dir_that_cannot_be_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"state_dir in \[qemu\] of x.toml"):
        QemuSettings.parse({"state_dir": value}, "x.toml")


def test_without_a_home_the_key_to_set_is_named(homeless: None) -> None:
    with pytest.raises(CloudSetupError, match=r"no entry in passwd.*state_dir in \[qemu\]"):
        parse()


@pytest.mark.parametrize("home", ["relative", "./x"])
def test_home_that_is_relative_is_none(
    home: str, monkeypatch: pytest.MonkeyPatch, no_xdg: None
) -> None:
    monkeypatch.setenv("HOME", home)

    with pytest.raises(CloudSetupError, match=r"not absolute.*state_dir"):
        parse()


def test_home_that_is_empty_is_the_one_in_passwd(
    monkeypatch: pytest.MonkeyPatch, no_xdg: None
) -> None:
    monkeypatch.setenv("HOME", "")

    assert find_home() == Path(pwd.getpwuid(os.getuid()).pw_dir)


def test_without_a_home_state_dir_is_enough(homeless: None, tmp_path: Path) -> None:
    assert parse(state_dir=tmp_path).image_dir == tmp_path / "images"


def test_without_a_home_directories_of_the_environment_are_enough(
    homeless: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, str(tmp_path / variable))

    assert parse().state_dir == tmp_path / "XDG_STATE_HOME" / "pycloudlib"


def test_without_a_home_no_configuration_is_read_from_the_working_directory(
    homeless: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "~" / ".config"
    planted.mkdir(parents=True)
    (planted / "pycloudlib.toml").write_text("[qemu]\n")
    monkeypatch.chdir(tmp_path)

    assert parse_config() == {}


def test_obstacles_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()

    assert find_obstacle(tmp_path) is None
    assert find_obstacle(tmp_path / "not" / "yet") is None
    assert find_obstacle(file / "below") == f"{file} is not a directory"
    assert find_obstacle(file) == f"{file} is not a directory"
    dangling = tmp_path / "link"
    dangling.symlink_to("nowhere")
    assert find_obstacle(dangling) == f"{dangling} is not a directory"
    # What another user's directory and a read-only file system answer; root's are refused nothing.
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert find_obstacle(tmp_path) == f"{tmp_path} cannot be written to"


def test_failure_for_a_directory_names_its_key(tmp_path: Path) -> None:
    file = tmp_path / "file"
    settings = parse(state_dir=tmp_path)
    file.touch()
    broken = QemuSettings(file / "images", tmp_path, tmp_path, tmp_path)

    said = pytest.raises(CloudSetupError, match=r"image_dir .*not a directory.*Let image_dir")
    with said, broken.naming("working_dir", "image_dir"):
        broken.image_dir.mkdir()
    with pytest.raises(FileNotFoundError), settings.naming("image_dir"):
        raise FileNotFoundError("something else")
    with pytest.raises(FileNotFoundError), broken.naming("image_dir"):
        raise FileNotFoundError(errno.ENOENT, "not there", "/some/where/else")


def test_doctor_looks_without_a_home(homeless: None) -> None:
    [check] = [check for check in judge(collect(ask_server=False)) if check.name == "configuration"]

    assert check.outcome is Outcome.PROBLEM
    assert "state_dir" in check.detail


def test_doctor_finds_directories_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/state")

    checks = {check.name: check for check in judge(collect(ask_server=False))}

    assert checks["disk of working_dir"].outcome is Outcome.PROBLEM
    assert checks["disk of state_dir"].outcome is Outcome.PROBLEM
    assert "/dev/null is not a directory" in checks["disk of state_dir"].detail
    assert "state_dir" in checks["disk of state_dir"].remedy
    assert checks["disk of image_dir"].outcome is not Outcome.PROBLEM


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Give a directory that other users can get to, who are shut out of those of tests."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


def run_as_stranger(program: str, *arguments: str, **environment: str) -> str:
    """Run a Python program as a user whom passwd does not know; give what it prints."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    system = shutil.which(f"python3.{sys.version_info.minor}", path="/usr/bin")
    # The one that runs the tests may be in root's home.
    for interpreter in filter(None, (sys.executable, system)):
        try:
            done = subprocess.run(
                [interpreter, "-c", program, *arguments],
                env=env,
                cwd="/",
                user=STRANGER,
                group=STRANGER,
                extra_groups=[],
                capture_output=True,
                text=True,
                check=False,
            )
        except PermissionError:
            continue
        assert done.returncode == 0, done.stderr
        return done.stdout
    pytest.skip("other users cannot run this Python")


PROGRAM = """
import io, json, sys
from pycloudlib import Qemu
try:
    cloud = Qemu("t", config_file=io.StringIO(sys.argv[1]))
    key = cloud.key_pair
    print("made", key.public_key_path)
    print("left", cloud.clean())
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("environment", ["none", "root's home", "/", "empty"])
@pytest.mark.parametrize("configured", [True, False])
def test_user_that_nobody_knows(environment: str, configured: bool, open_directory: Path) -> None:
    """As with `docker run -u`: what a launch begins with works, or the key to set is named."""
    state = open_directory / "state"
    state.mkdir()
    os.chown(state, STRANGER, STRANGER)
    locked = open_directory / "root"
    (locked / ".ssh").mkdir(parents=True)
    (locked / ".ssh" / "id_rsa.pub").touch()
    locked.chmod(0o700)
    homes = {"none": {}, "root's home": {"HOME": str(locked)}, "/": {"HOME": "/"}}
    config = f"[qemu]\nstate_dir = {json.dumps(str(state))}\n" if configured else ""

    said = run_as_stranger(PROGRAM, config, **homes.get(environment, {"HOME": ""}))

    if configured:
        assert said.startswith(f"made {state}/instances/")
        assert said.endswith("\nleft []\n")
    else:
        assert said.startswith("CloudSetupError")
        assert "state_dir" in said
        assert "[qemu]" in said


def test_command_line_says_which_key_to_set(
    homeless: None, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(capsys, "list")

    assert done.code == 1
    assert "state_dir" in done.err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("arguments", [["list"], ["prune"], ["launch", "bookworm"]])
def test_command_line_names_the_directory_that_cannot_be_read(
    arguments: list[str], open_directory: Path
) -> None:
    """Not: there are no machines."""
    locked = open_directory / "locked"
    locked.mkdir(mode=0o700)
    config = open_directory / "c.toml"
    config.write_text(f"[qemu]\nworking_dir = {json.dumps(str(locked))}\n")
    binary = open_directory / "qemu-system-x86_64"
    binary.touch()
    binary.chmod(0o755)
    program = (
        "import contextlib, sys\nfrom pycloudlib.cli.app import main\n"
        "with contextlib.redirect_stderr(sys.stdout): main(sys.argv[1:])"
    )

    said = run_as_stranger(
        program,
        *arguments,
        HOME=str(open_directory),
        PYCLOUDLIB_CONFIG=str(config),
        PATH=f"{open_directory}{os.pathsep}{os.environ['PATH']}",
    )

    assert f"working_dir {locked} cannot be used" in said
    assert "Let working_dir" in said
