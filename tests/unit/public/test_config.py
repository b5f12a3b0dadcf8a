from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pycloudlib import config as config_module
from pycloudlib.config import Config, parse_config
from pycloudlib.errors import MissingPrerequisiteError
from pycloudlib.qemu.cloud import Qemu

MakeCloud = Callable[[str], Qemu]


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """Give a program that is only there to be found."""
    path = tmp_path / "bin" / "qemu-system-x86_64"
    path.parent.mkdir()
    path.touch(mode=0o755)
    return path


@pytest.fixture
def make_cloud(binary: Path, monkeypatch: pytest.MonkeyPatch) -> MakeCloud:
    monkeypatch.setenv("PATH", f"{binary.parent}{os.pathsep}{os.environ['PATH']}")

    def make(text: str) -> Qemu:
        return Qemu("config", timestamp_suffix=False, config_file=io.StringIO(text))

    return make


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def marked(number: int) -> str:
    return f"[qemu]\nkey_name = 'file {number}'\n"


def key_name(config: Config) -> str:
    return str(config["qemu"]["key_name"])


@pytest.mark.parametrize("kind", [str, Path])
def test_file_may_be_named_by_text_or_path(kind: type[str] | type[Path], tmp_path: Path) -> None:
    file = write(tmp_path / "mine.toml", marked(1))

    assert key_name(parse_config(kind(file))) == "file 1"


def test_open_text_is_read() -> None:
    assert key_name(parse_config(io.StringIO(marked(1)))) == "file 1"


def test_files_are_looked_up_in_their_order(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(config_module.DEFAULT_LOCATIONS[1], marked(4))
    assert key_name(parse_config()) == "file 4"

    write(home / ".config" / "pycloudlib.toml", marked(3))
    assert key_name(parse_config()) == "file 3"

    monkeypatch.setenv("PYCLOUDLIB_CONFIG", str(write(tmp_path / "named.toml", marked(2))))
    assert key_name(parse_config()) == "file 2"

    assert key_name(parse_config(write(tmp_path / "given.toml", marked(1)))) == "file 1"


def test_no_file_at_all_is_fine() -> None:
    assert parse_config() == {}


def test_file_in_the_current_directory_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pycloudlib.toml", ".config/pycloudlib.toml"):
        write(tmp_path / "project" / name, '[qemu]\nimage_verification = "disabled"\n')
    monkeypatch.chdir(tmp_path / "project")
    for home in (None, "", "."):
        if home is None:
            monkeypatch.delenv("HOME")
        else:
            monkeypatch.setenv("HOME", home)
        monkeypatch.setenv("XDG_CONFIG_HOME", ".config")
        assert parse_config() == {}


def test_keyring_is_not_looked_for_in_the_current_directory(
    tmp_path: Path, make_cloud: MakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "keys.asc", "keys")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"image_keyring .* is 'keys.asc', expected an absolute"):
        make_cloud('[qemu]\nimage_keyring = "keys.asc"\n').images()


@pytest.mark.parametrize("path", ["~/mine.toml", "$HOME/mine.toml", "${HOME}/mine.toml"])
def test_home_and_variables_in_the_files_name_are_expanded(
    path: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(home / "mine.toml", marked(1))
    assert key_name(parse_config(path)) == "file 1"

    monkeypatch.setenv("PYCLOUDLIB_CONFIG", path)
    assert key_name(parse_config()) == "file 1"


def test_given_file_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"

    with pytest.raises(ValueError, match="config_file") as caught:
        parse_config(missing)

    assert str(missing) in str(caught.value)


def test_variable_that_names_no_file_is_passed_over(
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    missing = tmp_path / "missing.toml"
    monkeypatch.setenv("PYCLOUDLIB_CONFIG", str(missing))
    assert parse_config() == {}

    write(home / ".config" / "pycloudlib.toml", marked(3))

    assert key_name(parse_config()) == "file 3"
    assert f"{missing} (from $PYCLOUDLIB_CONFIG) is not there" in caplog.text


def test_variable_that_names_a_directory_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYCLOUDLIB_CONFIG", str(tmp_path))

    with pytest.raises(ValueError, match=r"PYCLOUDLIB_CONFIG"):
        parse_config()


def test_directory_in_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        parse_config(tmp_path)


def test_bad_toml_is_told_with_file_and_line(tmp_path: Path) -> None:
    file = write(tmp_path / "bad.toml", "[qemu]\n\nimage_dir = /no/quotes\n")

    with pytest.raises(ValueError, match=r"line 3") as caught:
        parse_config(file)

    assert str(file) in str(caught.value)


def test_bad_toml_given_as_text_is_told_with_its_line() -> None:
    with pytest.raises(ValueError, match=r"config_file.*line 2"):
        parse_config(io.StringIO("[qemu]\n= 5\n"))


def test_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "latin.toml"
    file.write_bytes(b"[qemu]\nkey_name = '\xe9'\n")

    with pytest.raises(ValueError, match=str(file)):
        parse_config(file)


@pytest.mark.parametrize("wrong", [5, ["a"], {"qemu": {}}])
def test_config_file_of_a_wrong_type_is_named(wrong: object) -> None:
    with pytest.raises(TypeError, match="config_file"):
        parse_config(wrong)  # type: ignore[arg-type]


def test_missing_key_is_named() -> None:
    with pytest.raises(KeyError, match=r"no_such_section.*pycloudlib\.toml"):
        parse_config(io.StringIO(""))["no_such_section"]


def test_cloud_works_with_nothing_configured(binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{binary.parent}{os.pathsep}{os.environ['PATH']}")

    with Qemu(tag="x") as cloud:
        assert Path(cloud.qemu_binary) == binary


def test_default_directories_are_the_users_own(make_cloud: MakeCloud, home: Path) -> None:
    cloud = make_cloud("")

    assert Path(cloud.image_dir).is_relative_to(home / ".local" / "share")
    assert Path(cloud.working_dir).is_relative_to(home / ".local" / "state")


@pytest.mark.parametrize("written", ["{home}/{key}", "~/{key}", "$HOME/{key}", "${{HOME}}/{key}"])
@pytest.mark.parametrize("key", ["image_dir", "working_dir"])
def test_configured_directory_is_used(
    key: str, written: str, make_cloud: MakeCloud, home: Path
) -> None:
    (home / key).mkdir()

    cloud = make_cloud(f"[qemu]\n{key} = '{written.format(home=home, key=key)}'\n")

    assert Path(getattr(cloud, key)) == home / key


@pytest.mark.parametrize("key", ["image_dir", "working_dir"])
def test_configured_directory_that_does_not_exist_is_an_error(
    key: str, make_cloud: MakeCloud, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=key) as caught:
        make_cloud(f"[qemu]\n{key} = '{tmp_path}/missing'\n")

    assert f"{tmp_path}/missing" in str(caught.value)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("key", ["image_dir", "working_dir"])
def test_file_in_place_of_a_directory_is_an_error(
    key: str, make_cloud: MakeCloud, binary: Path
) -> None:
    with pytest.raises(ValueError, match=key) as caught:
        make_cloud(f"[qemu]\n{key} = '{binary}'\n")

    assert str(binary) in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "image_dir",
        "key_name",
        "private_key_path",
        "public_key_path",
        "qemu_binary",
        "working_dir",
    ],
)
@pytest.mark.parametrize("value", ["5", "true", "['a']", "''"])
def test_configured_value_of_a_wrong_type_is_an_error(
    key: str, value: str, make_cloud: MakeCloud
) -> None:
    with pytest.raises((ValueError, TypeError), match=key):
        make_cloud(f"[qemu]\n{key} = {value}\n")


def test_section_that_is_none_is_an_error(make_cloud: MakeCloud) -> None:
    with pytest.raises((ValueError, TypeError), match="qemu"):
        make_cloud("qemu = 5\n")


def test_unknown_key_is_warned_about(
    make_cloud: MakeCloud, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        make_cloud("[qemu]\nimage_dri = '/somewhere'\n")

    assert any("image_dri" in record.getMessage() for record in caplog.records)


def test_other_sections_are_ignored(
    make_cloud: MakeCloud, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        make_cloud("[ec2]\nregion = 'eu'\nimage_dir = '/nowhere'\n[gce]\nx = 1\n")

    assert not caplog.records


def test_section_is_readable_as_the_clouds_config(make_cloud: MakeCloud) -> None:
    assert make_cloud("[qemu]\nkey_name = 'mine'\n").config["key_name"] == "mine"


@pytest.mark.parametrize("written", ["{path}", "~/qemu-mine", "$HOME/qemu-mine", "qemu-mine"])
def test_configured_binary_is_used(
    written: str, make_cloud: MakeCloud, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = home / "qemu-mine"
    mine.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")

    cloud = make_cloud(f"[qemu]\nqemu_binary = '{written.format(path=mine)}'\n")

    assert Path(cloud.qemu_binary) == mine


def test_missing_qemu_is_named_with_its_package(make_cloud: MakeCloud, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "qemu-system-x86_64"

    with pytest.raises(MissingPrerequisiteError, match="qemu-system-x86") as caught:
        make_cloud(f"[qemu]\nqemu_binary = '{missing}'\n")

    assert str(missing) in str(caught.value)
    assert "'qemu-system-x86'" in str(caught.value), "the package is not named"


def test_missing_qemu_leaves_nothing_behind(
    make_cloud: MakeCloud, tmp_path: Path, home: Path
) -> None:
    with pytest.raises(MissingPrerequisiteError):
        make_cloud(f"[qemu]\nqemu_binary = '{tmp_path}/nowhere/qemu-system-x86_64'\n")

    assert not list(home.rglob("pycl-qemu-*"))


def test_missing_qemu_img_is_named_with_its_package(
    make_cloud: MakeCloud, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("qemu-img", path="/usr/local/sbin:/usr/sbin:/sbin"):
        pytest.skip("this host keeps its programs in the administrators' directories")
    monkeypatch.setenv("PATH", str(binary.parent))

    with pytest.raises(MissingPrerequisiteError, match="qemu-utils") as caught:
        make_cloud("")

    assert "qemu-img" in str(caught.value)
