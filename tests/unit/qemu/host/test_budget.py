"""What the machines of all processes may use at once, and who waits for whom."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.qemu.host.budget import Budget, Capacity, Spare

WHOLE = Capacity(2, 4000)
FILES = (".taken", ".waiting", ".wanted")
HOLDER = """
import sys
from pathlib import Path
from pycloudlib.qemu.host.budget import Budget, Capacity
room = Capacity(*map(int, sys.argv[2:]))
budget = Budget(Path(sys.argv[1]), Capacity(2, 4000))
with budget.reserving(room, lambda _who: print("waits", flush=True)):
    print("has it", flush=True)
    sys.stdin.read()
"""


BOOTER = """
import sys
from pathlib import Path
from pycloudlib.qemu.host.budget import Budget, Capacity
budget = Budget(Path(sys.argv[1]), Capacity(2, 4000))
room = Capacity(*map(int, sys.argv[2:]))
boots = budget.admit(room, lambda _who: print("waits", flush=True))
print("has it", flush=True)
sys.stdin.read()
"""
SPARE_HOLDER = """
import sys
from pathlib import Path
from pycloudlib.qemu.host.budget import Budget, Capacity

def give_back():
    print("wanted", flush=True)
    spare.release()

spare = Budget(Path(sys.argv[1]), Capacity(2, 4000)).try_spare(
    Capacity(*map(int, sys.argv[2:])), give_back
)
print("has it" if spare else "none", flush=True)
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
def other_process(directory: Path, room: Capacity, program: str = HOLDER) -> Iterator[Holder]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, directory, str(room.processors), str(room.memory_mib)],
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


def test_who_waits_is_served_in_the_order_of_arrival(tmp_path: Path) -> None:
    first = contextlib.ExitStack()
    first.enter_context(Budget(tmp_path, WHOLE).reserving(WHOLE, never))
    with first, contextlib.ExitStack() as others:
        waiting = []
        for _ in range(3):
            waiting.append(others.enter_context(other_process(tmp_path, WHOLE)))
            waiting[-1].expect("waits")
        # One that is killed while it waits holds nobody up.
        waiting[0].process.kill()
        first.close()
        waiting[1].expect("has it")
        assert len(taken(tmp_path)) == 1
        waiting[1].end()
        waiting[2].expect("has it")
    assert not list(tmp_path.glob("*.waiting"))


def test_interrupted_wait_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_who: str) -> None:
        raise KeyboardInterrupt

    with other_process(tmp_path, WHOLE) as other:
        other.expect("has it")
        with (
            pytest.raises(KeyboardInterrupt),
            Budget(tmp_path, WHOLE).reserving(WHOLE, interrupt),
        ):
            pass
        assert len(taken(tmp_path)) == 1
        assert not list(tmp_path.glob("*.waiting"))
        # Nobody waits any more.
        with other_process(tmp_path, Capacity(0, 0), SPARE_HOLDER) as spare:
            spare.expect("has it")


def leftovers(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir() if file.suffix in FILES)


def test_spare_counts_and_is_given_back_once(tmp_path: Path) -> None:
    budget = Budget(tmp_path, WHOLE)
    spare = budget.try_spare(Capacity(1, 3000), lambda: None)
    assert spare is not None
    assert budget.try_spare(Capacity(1, 2000), lambda: None) is None, "too much memory"
    assert budget.try_spare(Capacity(2, 1000), lambda: None) is None, "too many processors"
    spare.release()
    spare.release()
    assert leftovers(tmp_path) == []
    assert spare.promote() is None


def test_spare_of_another_process_is_given_back_to_who_waits(tmp_path: Path) -> None:
    with other_process(tmp_path, Capacity(1, 100), SPARE_HOLDER) as other:
        other.expect("has it")
        with Budget(tmp_path, WHOLE).reserving(WHOLE, never):
            other.expect("wanted")
            assert len(taken(tmp_path)) == 1


def test_spare_of_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    with other_process(tmp_path, WHOLE, SPARE_HOLDER) as other:
        other.expect("has it")
        other.process.kill()
        other.process.wait()
    assert len(leftovers(tmp_path)) == 2, "its files are still there"
    with Budget(tmp_path, WHOLE).reserving(WHOLE, never):
        assert len(leftovers(tmp_path)) == 1, "its own"


def test_nothing_is_spare_while_another_waits(tmp_path: Path) -> None:
    budget = Budget(tmp_path, WHOLE)
    ours = contextlib.ExitStack()
    ours.enter_context(budget.reserving(Capacity(1, 100), never))
    with ours, other_process(tmp_path, WHOLE) as other:
        other.expect("waits")
        assert budget.try_spare(Capacity(0, 100), lambda: None) is None
        ours.close()
        other.expect("has it")
        spare = budget.try_spare(Capacity(0, 0), lambda: None)
        assert spare is not None
        spare.release()


def test_thread_that_waits_wants_the_spares_of_its_own_process(tmp_path: Path) -> None:
    budget = Budget(tmp_path, WHOLE)
    threads = []

    def give_back() -> None:
        threads.append(threading.current_thread())
        assert spare is not None
        assert spare.promote() is None, "it is wanted"
        spare.release()

    spare = budget.try_spare(WHOLE, give_back)
    with budget.reserving(WHOLE, never):
        assert threads != [threading.current_thread()]
        assert len(threads) == 1
    assert leftovers(tmp_path) == []


class _PromotedWhenSeen:
    """What a spare holds; another thread promotes it once the spare's own has seen that it does."""

    def __init__(self, spare: Spare) -> None:
        self.held = vars(spare)["_held"]
        self.release = self.held.release
        self.promoted: list[AbstractContextManager[None] | None] = []
        self.promoter = threading.Thread(target=lambda: self.promoted.append(spare.promote()))

    def __bool__(self) -> bool:
        held = bool(self.held)
        if threading.current_thread().name == "budget-spare" and self.promoter.ident is None:
            self.promoter.start()
            self.promoter.join(0.2)  # it may wait for this thread
        return held


def test_spare_is_promoted_or_wanted_but_not_both(tmp_path: Path) -> None:
    wanted: list[None] = []
    before = set(threading.enumerate())
    spare = Budget(tmp_path, WHOLE).try_spare(WHOLE, lambda: wanted.append(None))
    assert spare is not None
    (listener,) = set(threading.enumerate()) - before
    promoting = _PromotedWhenSeen(spare)
    # What it holds, so that the test can act between its two looks at it.
    vars(spare)["_held"] = promoting

    (fifo,) = tmp_path.glob("*.wanted")
    fifo.write_text("wanted")
    listener.join(30)
    promoting.promoter.join(30)

    (promoted,) = promoting.promoted
    assert (promoted is None) == bool(wanted)
    spare.release()


def test_promoted_spare_is_a_reservation_as_any(tmp_path: Path) -> None:
    budget = Budget(tmp_path, WHOLE)
    wanted: list[None] = []
    spare = budget.try_spare(Capacity(1, 1000), lambda: wanted.append(None))
    assert spare is not None
    promoted = spare.promote()
    assert promoted is not None
    assert spare.promote() is None
    spare.release()  # without effect now
    with promoted, other_process(tmp_path, WHOLE) as other:
        other.expect("waits")
        # As a process with a machine, this one does not wait.
        with budget.reserving(WHOLE, never):
            assert len(taken(tmp_path)) == 2
        promoted.__exit__(None, None, None)
        other.expect("has it")
    assert wanted == []


def test_process_with_a_spare_alone_waits(tmp_path: Path) -> None:
    budget = Budget(tmp_path, WHOLE, limit=0.2)
    with other_process(tmp_path, Capacity(1, 100)) as other:
        other.expect("has it")
        spare = budget.try_spare(Capacity(1, 100), lambda: None)
        assert spare is not None
        with (
            pytest.raises(PycloudlibTimeoutError),
            budget.reserving(Capacity(2, 100), lambda _who: None),
        ):
            pass
        spare.release()


def test_as_many_spares_as_needed_are_given_back_the_newest_first(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        spares = []
        for number in range(3):
            spares.append(
                stack.enter_context(other_process(tmp_path, Capacity(0, 1000), SPARE_HOLDER))
            )
            spares[-1].expect("has it")
            os.utime(max(taken(tmp_path), key=lambda file: file.stat().st_mtime_ns), (number,) * 2)
        with Budget(tmp_path, WHOLE).reserving(Capacity(1, 2000), lambda _who: None):
            spares[2].expect("wanted")
            assert len(taken(tmp_path)) == 3
            for each in spares:
                each.end()


def test_spare_that_is_not_given_back_is_not_counted_on(tmp_path: Path) -> None:
    with (
        other_process(tmp_path, Capacity(1, 1000), SPARE_HOLDER) as older,
        other_process(tmp_path, Capacity(1, 1000), SPARE_HOLDER) as newer,
    ):
        older.expect("has it")
        newer.expect("has it")
        newer.process.send_signal(signal.SIGSTOP)
        budget = Budget(tmp_path, WHOLE, patience=0.0)
        with budget.reserving(Capacity(1, 1000), lambda _who: None):
            older.expect("wanted")


def _use_in_child(spare: Spare) -> None:
    spare.release()
    os._exit(0 if spare.promote() is None else 1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_gives_nothing_back(tmp_path: Path) -> None:
    wanted: list[None] = []
    budget = Budget(tmp_path, WHOLE)
    spare = budget.try_spare(WHOLE, lambda: wanted.append(None))
    assert spare is not None
    child = multiprocessing.get_context("fork").Process(target=_use_in_child, args=(spare,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert len(leftovers(tmp_path)) == 2
    assert not wanted
    spare.release()
    assert leftovers(tmp_path) == []


def test_without_fifos_there_are_no_spares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "mkfifo", refuse)
    budget = Budget(tmp_path, WHOLE)
    assert budget.try_spare(WHOLE, lambda: None) is None
    with budget.reserving(WHOLE, never):
        pass


def test_machine_holds_processors_until_it_has_booted_and_then_memory(tmp_path: Path) -> None:
    budget = Budget(tmp_path, WHOLE)
    booting = budget.admit(Capacity(2, 1000), never)
    with other_process(tmp_path, Capacity(1, 3000)) as other:
        other.expect("waits")
        booting.end_boot()
        other.expect("has it")
        other.end()
    with other_process(tmp_path, Capacity(1, 3001)) as other:
        other.expect("waits")
        booting.release()
        other.expect("has it")
    booting.release()


def test_process_does_not_wait_for_the_memory_of_its_own_machines(tmp_path: Path) -> None:
    """Nor for who waits for it: that one may wait until this process has ended."""
    budget = Budget(tmp_path, WHOLE)
    machines = [budget.admit(Capacity(1, 3000), never) for _ in range(2)]
    with other_process(tmp_path, Capacity(1, 3000)) as other:
        other.expect("waits")
        machines[0].end_boot()
        machines.append(budget.admit(Capacity(1, 3000), never))
        assert not machines[0].boots
        for machine in machines:
            machine.release()
        other.expect("has it")


def test_who_waits_for_a_boot_to_end_is_not_passed(tmp_path: Path) -> None:
    budget = Budget(tmp_path, WHOLE)
    first = budget.admit(Capacity(1, 100), never)
    with (
        other_process(tmp_path, Capacity(2, 100), BOOTER) as other,
        ThreadPoolExecutor(1) as threads,
    ):
        other.expect("waits")
        waits = threading.Event()
        second = threads.submit(budget.admit, Capacity(1, 100), lambda _who: waits.set())
        # It would fit, but came later.
        assert waits.wait(10)
        first.end_boot()
        other.expect("has it")
        assert not second.done()
        other.end()
        second.result(30).release()
    first.release()


def test_boots_of_many_threads_are_as_many_as_fit(tmp_path: Path) -> None:
    budget = Budget(tmp_path, WHOLE)
    at_once: list[int] = []

    def boot(_number: int) -> None:
        machine = budget.admit(Capacity(1, 0), lambda _who: None)
        at_once.append(len(list(tmp_path.glob("1-0-*.taken"))))
        machine.end_boot()

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(boot, range(12)))
    assert max(at_once) <= 2
    assert not list(tmp_path.glob("*.waiting"))


def test_large_machine_is_not_larger_than_the_whole(tmp_path: Path) -> None:
    """It boots beside machines that have booted, though these have some of the memory."""
    budget = Budget(tmp_path, WHOLE)
    with other_process(tmp_path, Capacity(0, 1000)) as other:
        other.expect("has it")
        budget.admit(Capacity(64, 3000), never).release()
