from __future__ import annotations

import logging
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pycloudlib.errors import ToolError
from pycloudlib.util import (
    LTS_RELEASES,
    UBUNTU_RELEASE_VERSION_MAP,
    add_key_to_cloud_config,
    chmod,
    get_timestamped_tag,
    is_writable_dir,
    log_exception_list,
    mkdtemp,
    rmfile,
    shell_pack,
    shell_quote,
    shell_safe,
    subp,
    touch,
    update_nested,
)

KEY = "ssh-ed25519 AAAAC3Nza user@host"


@pytest.mark.parametrize(
    ("series", "version"),
    [
        ("xenial", "16.04"),
        ("bionic", "18.04"),
        ("focal", "20.04"),
        ("jammy", "22.04"),
        ("noble", "24.04"),
        ("resolute", "26.04"),
    ],
)
def test_series_has_its_version(series: str, version: str) -> None:
    assert UBUNTU_RELEASE_VERSION_MAP[series] == version
    assert series in LTS_RELEASES


def test_versions_are_a_year_and_a_month() -> None:
    assert all(re.fullmatch(r"\d\d\.(04|10)", v) for v in UBUNTU_RELEASE_VERSION_MAP.values())


def test_long_term_releases_are_known_and_of_april_of_even_years() -> None:
    versions = [UBUNTU_RELEASE_VERSION_MAP[series] for series in LTS_RELEASES]

    assert versions == sorted(versions)
    assert all(int(v[:2]) % 2 == 0 and v.endswith(".04") for v in versions)
    assert "plucky" not in LTS_RELEASES


def test_timestamped_tag_stays_a_good_tag() -> None:
    assert re.fullmatch(r"mine-\d{4}-\d{12}", get_timestamped_tag("mine"))


@pytest.mark.parametrize("user_data", [None, "", "#cloud-config\n", "#cloud-config\n{}\n"])
def test_key_is_added_to_nothing(user_data: str | None) -> None:
    config = add_key_to_cloud_config(KEY, user_data)

    assert config.startswith("#cloud-config\n")
    assert yaml.safe_load(config) == {"ssh_authorized_keys": [KEY]}


def test_key_is_added_to_a_cloud_config() -> None:
    user_data = "#cloud-config\nruncmd: [echo]\nssh_authorized_keys: [other]\n"

    config = add_key_to_cloud_config(KEY, user_data)

    assert config.startswith("#cloud-config\n")
    assert yaml.safe_load(config) == {"runcmd": ["echo"], "ssh_authorized_keys": ["other", KEY]}


def test_key_that_is_there_already_is_not_doubled() -> None:
    once = add_key_to_cloud_config(KEY, None)

    assert add_key_to_cloud_config(KEY, once) == once


def test_empty_list_of_keys_is_filled() -> None:
    config = add_key_to_cloud_config(KEY, "#cloud-config\nssh_authorized_keys:\n")

    assert yaml.safe_load(config) == {"ssh_authorized_keys": [KEY]}


@pytest.mark.parametrize(
    "user_data",
    [
        "#cloud-config\n- a\n- list\n",
        "#cloud-config\nkey: [unclosed\n",
        "just text",
        "#!/bin/sh\necho hello\n",
        "#!/bin/sh\n# nothing to do\n",
        "## template: jinja\n#cloud-config\nruncmd: ['echo {{ v1.region }}']\n",
        "#cloud-config\nssh_authorized_keys: 5\n",
    ],
    ids=["list", "bad YAML", "text", "script", "comments", "template", "keys are no list"],
)
def test_user_data_of_another_kind_is_refused(user_data: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        add_key_to_cloud_config(KEY, user_data)

    assert "user_data" in str(caught.value)


def test_collected_errors_are_logged_each(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        log_exception_list([ValueError("first"), OSError("second")])

    assert "first" in caplog.text
    assert "second" in caplog.text


def test_no_errors_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        log_exception_list([])

    assert not caplog.records


class TestSubp:
    def test_all_that_a_program_says_is_returned(self) -> None:
        result = subp(["sh", "-c", "echo out; echo err >&2; exit 3"], rcs=[0, 3])

        assert (result, result.stderr, result.return_code) == ("out", "err", 3)
        assert result.failed

    @pytest.mark.parametrize("data", ["tëxt", "tëxt".encode()])
    def test_data_is_what_it_reads(self, data: str | bytes) -> None:
        assert subp(["cat"], data) == "tëxt"

    def test_it_reads_nothing_without_data(self) -> None:
        assert subp(Path("/bin/cat")) == ""

    def test_it_reads_what_its_parent_does_when_asked_for(self) -> None:
        program = "from pycloudlib.util import subp; print(subp('cat', shortcircuit_stdin=False))"
        done = subprocess.run(
            [sys.executable, "-c", program], input=b"from above", capture_output=True, check=True
        )

        assert done.stdout == b"from above\n"

    def test_its_environment_may_be_another(self) -> None:
        result = subp("echo $ONE $TWO", env={"TWO": "2"}, shell=True)

        assert result == "2"

    def test_another_exit_status_is_an_error_that_says_why(self) -> None:
        with pytest.raises(ToolError, match=r"exit status 3.*\n.*broken") as caught:
            subp(["sh", "-c", "echo broken >&2; exit 3"])

        assert caught.value.exit_status == 3

    def test_a_missing_program_is_named(self) -> None:
        with pytest.raises(FileNotFoundError, match="no-such-program"):
            subp(["no-such-program"])


WORDS = ["printf", "%s|", "a b", "it's", "$HOME", '"', "", "new\nline", "tëxt", "\\", "`id`"]


@pytest.mark.parametrize("write", [shell_quote, shell_safe, shell_pack])
def test_a_shell_takes_a_written_command_as_it_is(write: Any) -> None:
    assert subp(write(WORDS), shell=True) == "|".join(WORDS[2:]) + "|"


def test_a_packed_command_passes_through_another_shell_as_one_word() -> None:
    text = f"sh -c {shell_quote(shell_pack(WORDS))}"

    assert subp(f"sh -c {shell_quote(text)}", shell=True) == "|".join(WORDS[2:]) + "|"


def test_words_are_quoted() -> None:
    assert shell_quote("a b") == "'a b'"
    assert shell_quote(("ls", "-l", "a b")) == "ls -l 'a b'"
    assert shell_safe(["ls", "it's"]) == "'ls' 'it'\\''s'"


def test_a_packed_text_is_a_program_without_arguments() -> None:
    assert subp(shell_pack("/bin/pwd"), shell=True) == str(Path.cwd())


def test_files_are_made_changed_and_removed(tmp_path: Path) -> None:
    file = tmp_path / "file"

    touch(file, 0o600)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("kept")
    touch(str(file))
    assert file.read_text() == "kept"
    chmod(str(file), 0o640)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    rmfile(str(file))
    rmfile(str(file))
    assert not file.exists()


def test_temporary_directory_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    directory = Path(mkdtemp("mine-"))

    assert directory.parent == tmp_path
    assert directory.name.startswith("mine-")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert Path(mkdtemp()).name.startswith("pycloudlib")


def test_writable_directory_is_told_from_others(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    assert is_writable_dir(tmp_path)
    assert is_writable_dir(str(tmp_path / "new" / "one"))
    assert not is_writable_dir(file)
    assert not is_writable_dir("/proc")
    assert os.listdir(tmp_path / "new" / "one") == []  # noqa: PTH208 - all that is in it


def test_values_are_put_into_nested_mappings() -> None:
    mapping = {"a": {"b": 1, "c": {"d": 2}}, "e": 5}

    changed = update_nested(mapping, {"a": {"c": {"f": 3}, "g": [4]}, "e": {"h": 6}})

    assert changed is mapping
    assert mapping == {"a": {"b": 1, "c": {"d": 2, "f": 3}, "g": [4]}, "e": {"h": 6}}
