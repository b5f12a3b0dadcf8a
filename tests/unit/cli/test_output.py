from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from pycloudlib.cli.common import (
    age_in_words,
    format_table,
    print_facts,
    print_json,
    size_in_words,
    timestamp,
)
from pycloudlib.cli.lifecycle import boot_line
from pycloudlib.cli.machines import Size
from pycloudlib.progress import Progress


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10 << 30, "10 GiB"),
        (2047 << 20, "2.0 GiB"),
        (5 << 40, "5 TiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_sizes_in_words(size: int, words: str) -> None:
    assert size_in_words(size) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "0 seconds"),
        (1, "1 second"),
        (119, "119 seconds"),
        (120, "2 minutes"),
        (7200, "2 hours"),
        (47 * 3600, "47 hours"),
        (10 * 86400, "10 days"),
    ],
)
def test_ages_in_words(seconds: float, words: str) -> None:
    assert age_in_words(1000, 1000 + seconds) == words


def test_times_are_utc() -> None:
    assert timestamp(0) == "1970-01-01T00:00:00Z"


def test_columns_are_as_wide_as_what_is_in_them() -> None:
    table = click.unstyle(format_table(("name", "n"), [("a", 1), ("long-name", 22)]))

    assert table == "NAME       N\na          1\nlong-name  22"


def test_what_is_empty_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts([("One", 1), ("Empty", ""), ("Nothing", None), ("Longer", "x")])

    assert capsys.readouterr().out == "One:    1\nLonger: x\n"


class _Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True, slots=True)
class _Thing:
    name: str
    colour: _Colour
    place: Path


def test_values_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json([_Thing("grün", _Colour.RED, Path("/x"))])

    out = capsys.readouterr().out
    assert json.loads(out) == [{"name": "grün", "colour": "red", "place": "/x"}]
    assert "grün" in out


@pytest.mark.parametrize(
    ("text", "mebibytes"),
    [("2G", 2048), ("512M", 512), ("1.5g", 1536), ("2GiB", 2048), ("2 GB", 2048), ("2048K", 2)],
)
def test_sizes_are_read(text: str, mebibytes: int) -> None:
    assert Size("M").convert(text, None, None) == mebibytes


@pytest.mark.parametrize("text", ["", "2", "G", "-1G", "0G", "1e3M", "2X", "1.0001G", "\u0661G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"size|whole number"):
        Size("M").convert(text, None, None)


def test_boot_is_told_in_one_line_without_control_characters() -> None:
    report = Progress("booting: kernel", "\x1b[1m[ 1.0] usb\r\n\x07", done=3.4, unit="s")

    assert boot_line("web", report) == "web: booting: kernel, 3 s  [1m[ 1.0] usb"
