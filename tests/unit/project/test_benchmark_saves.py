"""The benchmark of saves: its order, what it hears of a guest's ticks, and its tables."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.courses.saves import add_pauses, collect_pauses, measure_disk
from benchmarks.driver import CourseFailedError, do_step, running
from benchmarks.plan import Plan
from benchmarks.report import write_report
from benchmarks.results import Measurement, Results, Run
from benchmarks.scenarios import BEFORE, NOW, PROGRAMS
from benchmarks.ticks import TICKER, Tick, Ticks, find_gaps
from pycloudlib._base.deadline import Deadline
from pycloudlib.qemu.vm.qmp import Event
from tests import ROOT

ROW = "a later one, of an idle machine, 1024 MiB"


def run(side: str, took: float, *, ticks: bool = True) -> Run:
    values = {"save-took": took, "save-paused": 0.01, "save-disk": 300, "save-qemu": 200}
    if ticks:
        values |= {"save-inside": 0.02, "save-outside": 0.03}
    measured = tuple(Measurement(key, (value,), row=ROW) for key, value in values.items())
    return Run(side, "saves", 1, "2026-01-01", 1.0, 0.5, measured)


def results(*runs: Run) -> Results:
    return Results({}, runs)


def test_versions_take_turns_and_a_first_save_comes_once() -> None:
    turns = PROGRAMS["saves"].step_turns(("first", "second"), (BEFORE, NOW), 2)

    assert [turn[1:] for turn in turns] == [
        (BEFORE, "first"),
        (NOW, "first"),
        (BEFORE, "second"),
        (NOW, "second"),
        (NOW, "second"),
        (BEFORE, "second"),
    ]


def test_a_gap_that_ended_before_does_not_count() -> None:
    ticks = [Tick(10.0, 0.7, 9.5), Tick(10.2, 0.7, 9.5), Tick(10.5, 0.3, 10.5)]

    inside, outside = find_gaps(ticks, 9.8)

    assert inside == 0.3
    assert outside == pytest.approx(0.3)


def test_silence_right_after_the_beginning_is_a_gap() -> None:
    _, outside = find_gaps([Tick(10.0, 0.1, 10.0), Tick(12.0, 0.2, 12.0)], 10.5)

    assert outside == 1.5


def test_a_longer_gap_that_ended_just_before_hides_those_of_the_guest() -> None:
    ticks = [Tick(10.0, 0.7, 9.5), Tick(10.2, 0.7, 9.5)]

    inside, outside = find_gaps(ticks, 9.8)

    assert inside == outside == pytest.approx(0.2)


def test_a_guest_that_does_not_tick_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="does not tick"):
        find_gaps([Tick(10.0, 0.1, 10.0)], 11.0)


@contextmanager
def ticking(port: int) -> Iterator[None]:
    """Run a guest's ticker on this host."""
    program = TICKER.replace("10.0.2.2", "127.0.0.1")
    with subprocess.Popen([sys.executable, "-c", program, str(port)]) as process:
        try:
            yield
        finally:
            process.kill()


def test_ticks_of_the_guests_program_are_heard() -> None:
    ticks = Ticks()
    deadline = Deadline.after(30)
    with ticking(ticks.port):
        while not ticks.heard:
            assert not deadline.expired
            time.sleep(0.01)

    inside, outside = ticks.find_gaps(0)
    assert 0 < inside < 30
    # From the beginning of the epoch to the first tick.
    assert outside > 1e9


def test_pauses_are_added_up_from_stop_to_resume() -> None:
    events = tuple(
        Event(name, {}, at)
        for name, at in (
            ("STOP", 1.0),
            ("RESUME", 1.9),
            ("STOP", 5.0),
            ("RESUME", 5.25),
            ("RESET", 5.5),
            ("STOP", 6.0),
            ("RESUME", 6.5),
            ("STOP", 7.0),
        )
    )

    assert add_pauses(events, since=4.0) == 0.75


def test_pauses_that_the_package_logs_are_collected() -> None:
    logger = logging.getLogger("pycloudlib.qemu.somewhere")
    with collect_pauses() as pauses:
        logger.info("Saved %s; the guest stood still for %.0f ms", "m", 12.4)
        logger.info("something else")

    assert pauses.seconds == [0.012]
    assert pauses not in logging.getLogger("pycloudlib").handlers


def test_disk_of_a_save_is_what_is_allocated(tmp_path: Path) -> None:
    image = tmp_path / "saved.img"
    (tmp_path / "saved.img.live").mkdir()
    for file in (image, tmp_path / "saved.img.live" / "memory"):
        with file.open("wb") as opened:
            opened.write(b"\1" * (1 << 20))
            opened.truncate(1 << 30)
            os.fsync(opened.fileno())

    assert 2 <= measure_disk(image) < 3


def test_report_sets_versions_side_by_side() -> None:
    report = write_report(results(run(BEFORE, 3.0), run(BEFORE, 5.0), run(NOW, 0.2)))

    (row,) = (line for line in report.splitlines() if line.startswith(f"| {ROW} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == ["4.00 s (3.00-5.00)", "0.20 s", "10.0 ms (10.0-10.0)", "10.0 ms"]
    assert cells[-1] == "20.0"


def test_report_of_one_version_has_no_ratio() -> None:
    report = write_report(results(run(NOW, 0.2)))

    assert "before" not in report
    assert "| ratio" not in report


def test_report_leaves_out_what_was_not_measured() -> None:
    report = write_report(results(run(NOW, 0.2, ticks=False)))

    assert "ticks" not in report
    assert "disk" in report


def test_saves_that_were_measured_are_read_again(tmp_path: Path) -> None:
    measured = results(run(BEFORE, 3.0), run(NOW, 0.2))
    (tmp_path / "saves.json").write_text(measured.to_json())

    assert Results.read(tmp_path / "saves.json") == measured


def test_a_step_that_fails_says_where_its_error_is(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    plan = Plan("saves", config_file=str(tmp_path / "none.toml"))
    argv = [sys.executable, "-m", "benchmarks.worker", plan.to_argument()]
    with (
        log.open("w") as output,
        running(argv, output, ROOT / "src", steps=True) as process,
        pytest.raises(CourseFailedError, match=r"worker\.log"),
    ):
        do_step(process, "boot", log, [])

    assert "none.toml" in log.read_text()
