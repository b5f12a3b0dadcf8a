"""The benchmark's arithmetic, its order, and the wrapper that swaps the accelerator."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import make_parser
from benchmarks.courses.suite import Times
from benchmarks.driver import end_qemus, running
from benchmarks.plan import Plan
from benchmarks.processes import find_qemu
from benchmarks.recorder import TimeUp, limit
from benchmarks.report import Figure, gather, ratio, write_number, write_report
from benchmarks.results import Measurement, Results, Run
from benchmarks.scenarios import BY_KEY, OURS, OWN_COURSES, PROGRAMS, SCENARIOS
from benchmarks.wrapper import write_wrapper
from scripts.doc_blocks import DOCUMENTS
from tests import ROOT

COMPARE = PROGRAMS["compare"]
TCG = "tcg,thread=multi,tb-size=256"


def run(side: str, scenario: str, *values: float, number: int = 1, problem: str = "") -> Run:
    measurement = Measurement(scenario, values, problem)
    return Run(side, BY_KEY[scenario].course, number, "2026-01-01", 1.0, 0.5, (measurement,))


def results(*runs: Run) -> Results:
    return Results({"machines at once": "8"}, runs)


def row(report: str, title: str) -> list[str]:
    (line,) = (line for line in report.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_packages_take_turns_a_b_b_a() -> None:
    order = COMPARE.turns(3, ("boot",))

    assert order == [
        (1, "original", "one"),
        (1, "ours", "one"),
        (2, "ours", "one"),
        (2, "original", "one"),
        (3, "original", "one"),
        (3, "ours", "one"),
    ]


def test_long_courses_are_run_once_in_three_rounds_and_take_turns_too() -> None:
    assert COMPARE.turns(6, ("many-boot",)) == [
        (1, "original", "many"),
        (1, "ours", "many"),
        (4, "ours", "many"),
        (4, "original", "many"),
    ]


def test_what_only_this_package_does_is_measured_on_it_alone() -> None:
    assert {side for _, side, _ in COMPARE.turns(4, ("copy",))} == {OURS}


def test_what_is_compared_has_a_base_of_its_own_course_or_of_the_originals() -> None:
    for scenario in SCENARIOS:
        for base in scenario.base:
            course = BY_KEY[base].course
            assert course == scenario.course or course not in OWN_COURSES
        assert "|" not in scenario.title


def test_report_sets_a_fast_boot_beside_the_originals_cold_boot() -> None:
    report = write_report(
        results(
            run("original", "boot", 120),
            run("ours", "boot", 80),
            run("ours", "fast", 40),
            run("ours", "fast-prepare", 50),
        )
    )

    assert row(report, BY_KEY["fast"].title)[1:4] == ["120 s", "40.0 s", "3.00"]
    assert row(report, BY_KEY["fast-prepare"].title)[1:] == ["50.0 s", "", "1"]


def test_scenarios_are_chosen_by_their_names_and_their_courses() -> None:
    assert COMPARE.choose(("package", "boot"), ("size",)) == ("import", "boot")
    assert COMPARE.choose((), ("one", "fast", "many", "ours", "dead")) == ("import", "size")
    assert COMPARE.choose((), ()) == COMPARE.scenarios


def test_round_counts_with_the_median_of_its_values() -> None:
    runs = (run(OURS, "execute", 1, 2, 9), run(OURS, "execute", 4, 4, 5, number=2))

    assert gather(runs, OURS, "execute") == Figure((2, 4), ())


def test_ratio_is_that_of_the_medians() -> None:
    assert ratio(Figure((10, 20, 90), ()), Figure((4, 5, 6), ())) == 4
    assert ratio(Figure((), ("failed",)), Figure((4,), ())) is None
    assert ratio(Figure((4,), ()), Figure((0.0,), ())) is None


@pytest.mark.parametrize(
    ("value", "written"),
    [(117.4, "117"), (99.96, "100.0"), (11.52, "11.5"), (1.2345, "1.23"), (0.0123, "0.012")],
)
def test_numbers_have_the_digits_that_mean_something(value: float, written: str) -> None:
    assert write_number(value) == written


def test_report_tells_median_spread_and_ratio() -> None:
    report = write_report(
        results(
            run("original", "boot", 120),
            run("ours", "boot", 80),
            run("ours", "boot", 70, number=2),
            run("original", "boot", 100, number=2),
        )
    )

    assert row(report, BY_KEY["boot"].title)[1:] == [
        "110 s (100-120)",
        "75.0 s (70.0-80.0)",
        "1.47",
        "2",
    ]


def test_report_tells_what_is_short_in_milliseconds() -> None:
    report = write_report(results(run("original", "execute", 0.2), run("ours", "execute", 0.0053)))

    assert row(report, BY_KEY["execute"].title)[1:4] == ["0.20 s", "5.30 ms", "37.7"]


def test_report_tells_the_rate_of_what_is_transferred() -> None:
    report = write_report(results(run("ours", "push", 8)))

    assert "8.00 s, 8.39 MB/s" in row(report, BY_KEY["push"].title)[1]


def test_report_tells_what_happened_instead() -> None:
    report = write_report(
        results(run("original", "dead", problem="no error within 300 s"), run("ours", "dead", 0.1))
    )

    assert row(report, BY_KEY["dead"].title)[1:4] == ["no error within 300 s", "0.10 s", ""]


def test_report_tells_what_was_said_once() -> None:
    said = Measurement("dead", (1.0,), note="LaunchError: bad argument")
    runs = [Run(OURS, "dead", number, "2026-01-01", 1, 0, (said,)) for number in (1, 2)]

    assert write_report(results(*runs)).count("this package: LaunchError: bad argument") == 1


def test_what_only_this_package_does_is_compared_with_its_own_boot() -> None:
    report = write_report(results(run(OURS, "ours-boot", 60), run(OURS, "copies", 3)))

    assert row(report, "8 copies at once, likewise")[1:] == ["3.00 s", "20.0", "1"]


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = results(run("ours", "execute", 1, 2), run("original", "dead", problem="none"))
    (tmp_path / "results.json").write_text(written.to_json())

    assert Results.read(tmp_path / "results.json") == written


def test_ways_of_a_course_take_turns_a_b_b_a() -> None:
    code = (
        "from benchmarks.recorder import Recorder\n"
        "recorder = Recorder(['curl', 'fetch'], '600 MiB')\n"
        "done = []\n"
        "ways = {name: lambda name=name: name for name in ('curl', 'other', 'fetch')}\n"
        "recorder.take_turns(ways, 2, done.append)\n"
        "assert done == ['curl', 'fetch', 'fetch', 'curl'], done\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )

    told = [Measurement.from_json(json.loads(line)) for line in done.stdout.splitlines()]
    assert [item.scenario for item in told] == ["curl", "fetch", "fetch", "curl"]
    assert {item.row for item in told} == {"600 MiB"}


def test_sizes_are_the_rows_of_a_table_of_their_own() -> None:
    runs = [
        Run(OURS, "data", 1, "2026-01-01", 1, 0, (Measurement(key, values, row=f"{mib} MiB"),))
        for mib, key, values in (
            (0, "disk-snapshot", (0.02,)),
            (0, "convert", (1.5,)),
            (256, "disk-snapshot", (0.02, 0.03, 0.04)),
        )
    ]

    report = write_report(results(*runs))

    assert "| data added to the image | `snapshot()` | `qemu-img convert` | ratio |" in report
    assert row(report, "0 MiB")[1:] == ["20.0 ms", "1.50 s", "75.0"]
    assert row(report, "256 MiB")[1:] == ["30.0 ms (20.0-40.0)", "", ""]


def test_each_scenario_is_measured_by_a_program() -> None:
    measured = {key for program in PROGRAMS.values() for key in program.scenarios}

    assert measured == set(BY_KEY)


COMMANDS = [
    (document.name, command)
    for document in DOCUMENTS
    for command in re.findall(r"python -m benchmarks ([^`#\n]*)", document.read_text())
]


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_commands_that_documents_name_are_understood(document: str, command: str) -> None:
    given = make_parser().parse_args(shlex.split(command))

    assert given.list or given.name in PROGRAMS


def test_documents_name_each_program() -> None:
    assert {command.split()[0] for _, command in COMMANDS} >= set(PROGRAMS) - {"package"}


def test_plan_is_read_as_it_was_written() -> None:
    plan = Plan("one", image="image", wanted=("boot", "copy"), memory=(512,), dead_limit=60)

    assert Plan.from_argument(plan.to_argument()) == plan


def test_step_that_takes_too_long_is_ended_whatever_it_catches() -> None:
    def stubborn() -> None:
        while True:
            try:
                time.sleep(10)
            except Exception:  # noqa: BLE001 - that is the point
                continue

    with pytest.raises(TimeUp), limit(0.05):
        stubborn()


def test_course_tells_what_it_measures_apart_from_what_it_prints() -> None:
    code = (
        "from benchmarks.recorder import Recorder\n"
        "recorder = Recorder(['boot', 'launch'])\n"
        "print('noise')\n"
        "recorder.record('boot', 1.5)\n"
        "recorder.record('restart', 2.5)\n"
        "try: recorder.time('launch', lambda: 1 / 0)\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    boot, launch = (Measurement.from_json(json.loads(line)) for line in done.stdout.splitlines())
    assert boot == Measurement("boot", (1.5,))
    assert launch == Measurement("launch", problem="ZeroDivisionError: division by zero")
    assert "noise" in done.stderr
    assert "StepFailedError" in done.stderr


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["-enable-kvm"], ["-accel", TCG]),
        (["--enable-kvm", "-m", "1G"], ["-accel", TCG, "-m", "1G"]),
        (["-accel", "kvm"], ["-accel", TCG]),
        (["-machine", "pc,accel=kvm"], ["-machine", "pc,accel=tcg"]),
        (["-machine", "accel=kvm,usb=off"], ["-machine", "accel=tcg,usb=off"]),
        (["-M", "accel=kvm"], ["-M", "accel=tcg"]),
        (["-cpu", "host"], ["-cpu", "max"]),
        (["-cpu", "host,+x"], ["-cpu", "max,+x"]),
        (["-cpu", "qemu64"], ["-cpu", "qemu64"]),
        # Nothing else is touched, whatever it looks like.
        (["-name", "host", "-name", "kvm"], ["-name", "host", "-name", "kvm"]),
        (["-drive", "file=a b*'\"$x,if=ide", ""], ["-drive", "file=a b*'\"$x,if=ide", ""]),
        ([], []),
    ],
)
def test_wrapper_swaps_the_accelerator_and_nothing_else(
    given: list[str], passed: list[str], tmp_path: Path
) -> None:
    qemu = tmp_path / "a qemu"
    qemu.write_text('#!/bin/sh\nfor argument do printf "%s\\0" "$argument"; done\n')
    qemu.chmod(0o755)
    wrapper = tmp_path / "wrapper"
    write_wrapper(wrapper, str(qemu), TCG, "max")

    done = subprocess.run([wrapper, *given], capture_output=True, text=True, check=True)

    assert done.stdout == "".join(f"{argument}\0" for argument in passed)
    assert os.access(wrapper, os.X_OK)


def test_qemu_that_is_left_is_found_by_its_directory_and_ended(tmp_path: Path) -> None:
    qemu = tmp_path / "qemu-system-x86_64"
    shutil.copy(shutil.which("sleep") or "", qemu)
    with subprocess.Popen([qemu, "1000"]) as left:
        try:
            # The kernel shows a program's arguments a moment after it has begun.
            until = time.monotonic() + 10
            while not find_qemu(str(qemu)) and time.monotonic() < until:
                time.sleep(0.01)
            assert find_qemu(str(tmp_path / "other")) == []
            assert find_qemu(str(qemu)) == [left.pid]
            assert end_qemus(str(qemu)) == 1
            assert left.wait(10) == -signal.SIGKILL
        finally:
            left.kill()


def test_course_is_told_to_clean_up_when_the_driver_is_interrupted(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"
        "try:\n"
        "    print('up', flush=True)\n"
        "    time.sleep(1000)\n"
        "finally: print('cleaned', file=sys.stderr)\n"
    )
    log = tmp_path / "log"

    def interrupted() -> None:
        with log.open("w") as output, running([sys.executable, "-c", code], output) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert log.read_text() == "cleaned\n"


def test_waits_of_all_rounds_are_put_together() -> None:
    runs = (run(OURS, "suite-wait", 1, 2, 9), run(OURS, "suite-wait", 4, 5, number=2))

    assert gather(runs, OURS, "suite-wait") == Figure((1, 2, 9, 4, 5), ())


def test_steps_of_a_suite_take_turns_and_boots_come_once() -> None:
    turns = PROGRAMS["suite"].step_turns(("copies", "boots", "ahead"), (OURS,), 2)

    assert [step for _, _, step in turns] == ["boots", "copies", "ahead", "ahead", "copies"]


def test_reports_of_a_suite_separate_waits_and_commands(tmp_path: Path) -> None:
    reports = tmp_path / "reports"
    lines = []
    phases = (("setup", 0.0, 2.0), ("call", 2.0, 2.5), ("teardown", 2.5, 3.0))
    for worker, test, began in (("gw0", "a", 10.0), ("gw1", "b", 10.5), ("gw0", "c", 15.0)):
        for phase, start, stop in phases:
            lines.append(json.dumps([worker, test, phase, True, began + start, began + stop]))
    reports.write_text("\n".join(lines))

    times = Times.read(reports)

    assert (times.waits, times.first_waits) == ([2.0], [2.0, 2.0])
    assert times.commands == [0.5, 0.5, 0.5]
    assert times.whole == 8 / 3


def test_suite_with_a_test_that_failed_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "reports").write_text('["", "test_it[3]", "call", false, 1, 2]\n')

    with pytest.raises(RuntimeError, match=r"test_it\[3\] failed"):
        Times.read(tmp_path / "reports")
