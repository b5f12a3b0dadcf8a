"""What test processes may use at once."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.pytest_plugin.budget import Budget, Capacity

WHOLE = Capacity(2, 4000)
HOLDER = """
import sys
from pathlib import Path
from pycloudlib.pytest_plugin.budget import Budget, Capacity
room = Capacity(*map(int, sys.argv[2:]))
budget = Budget(Path(sys.argv[1]), Capacity(2, 4000))
with budget.reserving(room, lambda _who: print("waits", flush=True)):
    print("has it", flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that takes some of the budget until it is told to end, or killed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def expect(self, words: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{words}\n"

    def end(self) -> None:
        self.process.communicate("", timeout=30)


@contextlib.contextmanager
def other_process(directory: Path, room: Capacity) -> Iterator[Holder]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, directory, str(room.processors), str(room.memory_mib)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Holder(process)
    finally:
        process.kill()
        process.communicate()


def never(who: str) -> None:
    raise AssertionError(f"it waits: {who}")


def taken(directory: Path) -> list[Path]:
    return list(directory.glob("*.taken"))


def test_what_fits_is_taken_at_once_and_given_back(tmp_path: Path) -> None:
    with other_process(tmp_path, Capacity(1, 2000)) as other:
        other.expect("has it")
        with Budget(tmp_path, WHOLE).reserving(Capacity(1, 2000), never):
            assert len(taken(tmp_path)) == 2
        other.end()
    assert taken(tmp_path) == []


@pytest.mark.parametrize(
    "wanted", [Capacity(2, 100), Capacity(1, 3000)], ids=["processors", "memory"]
)
def test_what_does_not_fit_is_waited_for(tmp_path: Path, wanted: Capacity) -> None:
    ours = contextlib.ExitStack()
    ours.enter_context(Budget(tmp_path, WHOLE).reserving(Capacity(1, 2000), never))
    with ours, other_process(tmp_path, wanted) as other:
        other.expect("waits")
        assert len(taken(tmp_path)) == 1
        ours.close()
        other.expect("has it")


def test_more_than_there_is_is_taken_when_nothing_else_is(tmp_path: Path) -> None:
    with Budget(tmp_path, WHOLE).reserving(Capacity(8, 100_000), never):
        assert len(taken(tmp_path)) == 1


def test_process_that_is_killed_gives_back(tmp_path: Path) -> None:
    with other_process(tmp_path, WHOLE) as other:
        other.expect("has it")
        other.process.kill()
        other.process.wait()
    assert len(taken(tmp_path)) == 1, "its file is still there"
    with Budget(tmp_path, WHOLE).reserving(WHOLE, never):
        assert len(taken(tmp_path)) == 1


def test_process_that_has_something_does_not_wait_for_more(tmp_path: Path) -> None:
    budget = Budget(tmp_path, WHOLE)
    with other_process(tmp_path, Capacity(1, 1000)) as other:
        other.expect("has it")
        with budget.reserving(Capacity(1, 1000), never), budget.reserving(WHOLE, never):
            assert len(taken(tmp_path)) == 3


def test_threads_of_a_process_do_not_wait_for_each_other(tmp_path: Path) -> None:
    budget = Budget(tmp_path, WHOLE)
    waiting, both_have_it = threading.Barrier(3, timeout=30), threading.Barrier(2, timeout=30)

    def tell(_who: str) -> None:
        waiting.wait()

    def want_all() -> None:
        with budget.reserving(WHOLE, tell):
            both_have_it.wait()

    with other_process(tmp_path, Capacity(1, 1000)) as other:
        other.expect("has it")
        with ThreadPoolExecutor(2) as threads:
            done = [threads.submit(want_all) for _ in range(2)]
            waiting.wait()
            other.end()
        assert [each.result() for each in done] == [None, None]


def test_host_has_processors_and_memory() -> None:
    room = Capacity.of_host()

    assert room.processors >= 1
    assert room.memory_mib > 100


def test_large_machine_is_not_overtaken(tmp_path: Path) -> None:
    ours = contextlib.ExitStack()
    ours.enter_context(Budget(tmp_path, WHOLE).reserving(Capacity(1, 1000), never))
    with ours, other_process(tmp_path, WHOLE) as large:
        large.expect("waits")
        # It would fit, but came later.
        with other_process(tmp_path, Capacity(1, 1000)) as small:
            small.expect("waits")
            ours.close()
            large.expect("has it")
            large.end()
            small.expect("has it")


def test_waiting_has_an_end_that_says_who_has_it(tmp_path: Path) -> None:
    told: list[str] = []
    with other_process(tmp_path, WHOLE) as other:
        other.expect("has it")
        held = f"machines of processes {other.process.pid} have 2"
        budget = Budget(tmp_path, WHOLE, limit=0.3)
        with (
            pytest.raises(PycloudlibTimeoutError, match=held),
            budget.reserving(Capacity(1, 1), told.append),
        ):
            pass
    assert told == [held]
    assert len(taken(tmp_path)) == 1
