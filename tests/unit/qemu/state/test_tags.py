from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest

from pycloudlib.errors import InvalidTagNameError
from pycloudlib.qemu.cloud import Qemu


@pytest.fixture(autouse=True)
def found_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "bin" / "qemu-system-x86_64"
    binary.parent.mkdir()
    binary.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{binary.parent}{os.pathsep}{os.environ['PATH']}")


def make_cloud(tag: str, *, timestamp_suffix: bool = False) -> Qemu:
    return Qemu(tag, timestamp_suffix, io.StringIO(""))


@pytest.mark.parametrize("tag", ["a", "0", "a-b", "a--b", "my-tests-24-04", "x" * 63])
def test_good_tag_is_kept(tag: str) -> None:
    assert make_cloud(tag).tag == tag


@pytest.mark.parametrize("length", [1, 45, 46, 48, 51])
def test_tag_with_the_time_keeps_to_the_rule(length: int) -> None:
    tag = make_cloud("x" * length, timestamp_suffix=True).tag

    assert re.fullmatch(r"x+-\d{4}-\d{6,12}", tag)
    assert make_cloud(tag).tag == tag


@pytest.mark.parametrize("length", [52, 63])
def test_the_given_tag_is_what_is_checked(length: int) -> None:
    tag = make_cloud("x" * length, timestamp_suffix=True).tag

    assert re.fullmatch(rf"x{{{length}}}-\d{{4}}-\d{{6}}", tag)
    with pytest.raises(InvalidTagNameError) as caught:
        make_cloud("X" * length, timestamp_suffix=True)
    assert caught.value.tag == "X" * length
    assert len(caught.value.rules_failed) == 1


def test_time_is_appended_unless_it_is_not_wanted() -> None:
    tag = Qemu("mine", config_file=io.StringIO("")).tag

    assert tag.startswith("mine-")
    assert make_cloud("mine").tag == "mine"


@pytest.mark.parametrize(
    "tag",
    [
        "",
        "x" * 64,
        "Upper",
        "under_score",
        "dot.ted",
        "with space",
        "umläut",
        "line\n",
        "../escape",
        "a/b",
        "-begins",
        "ends-",
        "-",
        "a\0b",
        "٣",
    ],
)
def test_bad_tag_is_refused(tag: str, home: Path) -> None:
    with pytest.raises(InvalidTagNameError) as caught:
        make_cloud(tag)

    assert repr(tag) in str(caught.value)
    assert not list(home.rglob("pycl-qemu-*"))


def test_error_lists_every_broken_rule() -> None:
    with pytest.raises(InvalidTagNameError) as caught:
        make_cloud(f"-{'A' * 70}")

    message = str(caught.value)
    assert "63" in message, "the length is not told"
    assert "a-z" in message, "the characters are not told"
    assert "begin" in message or "start" in message, "the hyphen is not told"


def test_error_lists_no_rule_that_is_kept() -> None:
    with pytest.raises(InvalidTagNameError) as caught:
        make_cloud("Upper")

    assert "63" not in str(caught.value)


@pytest.mark.parametrize("timestamp_suffix", [True, False])
@pytest.mark.parametrize("tag", [None, 5, b"bytes", ["a"]])
def test_tag_of_a_wrong_type_is_refused_by_name(tag: object, timestamp_suffix: bool) -> None:
    with pytest.raises((TypeError, ValueError, InvalidTagNameError), match="tag"):
        make_cloud(tag, timestamp_suffix=timestamp_suffix)  # type: ignore[arg-type]
