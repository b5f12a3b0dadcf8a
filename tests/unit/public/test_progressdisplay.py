"""Progress as people see it."""

from __future__ import annotations

import io
import logging
import sys
import time

import pytest

from pycloudlib.progress import Progress, showing_progress

LOG = logging.getLogger("pycloudlib.test")
MIB = 1 << 20


def report(done: float, total: float | None = 100 * MIB) -> Progress:
    return Progress("downloading", "noble.img", done, total, "B")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_callers_callback_is_used() -> None:
    told: list[Progress] = []
    with showing_progress(told.append, LOG) as tell:
        tell(report(1))
    assert told == [report(1)]


def test_log_has_a_line_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO), showing_progress(None, LOG) as tell:
        for second in range(41):
            now = 100.0 + second
            tell(report(10 * MIB + second * MIB))
        tell(Progress("installing packages", "unpacking a"))
        tell(Progress("installing packages", "unpacking b"))
        tell(Progress("exporting", done=50, total=100, unit="%"))
    assert caplog.messages == [
        "downloading noble.img 10 of 100 MiB",
        "downloading noble.img 25 of 100 MiB (1.0 MiB/s, 75 s left)",
        "downloading noble.img 40 of 100 MiB (1.0 MiB/s, 60 s left)",
        "installing packages unpacking a",
        "exporting 50%",
    ]
    assert stderr.getvalue() == ""


def test_terminal_has_a_bar_with_rate_and_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    with caplog.at_level(logging.INFO), showing_progress(None, LOG) as tell:
        tell(Progress("waiting for another process"))
        for done in range(0, 101, 10):
            tell(report(done * MIB))
    shown = terminal.getvalue()
    assert "noble.img" in shown
    assert "100 of 100 MiB" in shown
    assert "100%" in shown
    assert caplog.messages == []


def test_unknown_total_is_no_obstacle(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO), showing_progress(None, LOG) as tell:
        tell(report(10 * MIB, None))
    assert caplog.messages == ["downloading noble.img 10 MiB"]
    monkeypatch.setattr(sys, "stderr", Terminal())
    with showing_progress(None, LOG) as tell:
        tell(report(10 * MIB, None))
