"""Locks end with their block, whatever was forked, started or interrupted meanwhile."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from pycloudlib._base import locks
from pycloudlib._base.deadline import Deadline
from pycloudlib._base.locks import directory_lock, exclusive_lock, is_locked, try_lock
from pycloudlib.errors import CloudSetupError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def is_free(path: Path) -> bool:
    with try_lock(path) as held:
        return held


def open_names() -> list[str]:
    """List what this process has open."""
    names = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            names.append(str(descriptor.readlink()))
    return names


@contextlib.contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """Fork a child that works, says so, and lives until the block's end."""
    said, saying = os.pipe()
    waits, lets_go = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(lets_go)
            work()
            os.write(saying, b"done")
            os.read(waits, 1)
        finally:
            os._exit(0)
    os.close(saying)
    os.close(waits)
    try:
        assert os.read(said, 4) == b"done"
        yield child
    finally:
        os.close(said)
        os.close(lets_go)
        os.waitpid(child, 0)


def test_lock_ends_though_another_thread_has_forked(path: Path) -> None:
    forks = contextlib.ExitStack()
    with ThreadPoolExecutor(1) as other, forks:
        with exclusive_lock(path):
            other.submit(forks.enter_context, forked(lambda: None)).result(60)
        assert is_free(path)


def test_lock_ends_though_a_program_has_its_file_open(tmp_path: Path) -> None:
    with directory_lock(tmp_path) as descriptor:
        program = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    with program, directory_lock(tmp_path):
        assert program.poll() is None


def test_programs_inherit_no_lock(path: Path) -> None:
    with exclusive_lock(path):
        shown = subprocess.run(
            ["ls", "-l", "/proc/self/fd/"],
            close_fds=False,
            capture_output=True,
            text=True,
            check=False,
        )
    assert str(path) not in shown.stdout


def test_lock_ends_with_its_process_though_that_has_forked(path: Path) -> None:
    """Also when the process is killed while its child lives on."""
    told, telling = os.pipe()
    waits, lets_go = os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            os.close(lets_go)
            with exclusive_lock(path):
                if os.fork() == 0:
                    os.write(telling, b"1")
                    os.read(waits, 1)
                    os._exit(0)
                signal.pause()
        finally:
            os._exit(0)
    os.close(waits)
    try:
        assert os.read(told, 1) == b"1"
        assert not is_free(path)
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        assert is_free(path)
    finally:
        os.close(lets_go)
        os.close(told)
        os.close(telling)


def test_child_that_leaves_the_block_ends_no_lock_of_its_parent(path: Path) -> None:
    def leave() -> None:
        os.open(os.devnull, os.O_RDONLY)  # gets the number that the lock's descriptor had
        block.close()

    with contextlib.ExitStack() as block:
        block.enter_context(exclusive_lock(path, remove=True))
        with forked(leave):
            assert path.exists()
            assert not is_free(path)
    assert not path.exists()


def test_child_can_take_the_lock_that_its_parent_has_left(path: Path) -> None:
    def take() -> None:
        assert str(path) not in open_names()
        with try_lock(path) as held:
            assert not held

    with exclusive_lock(path), forked(take):
        pass
    with forked(lambda: contextlib.ExitStack().enter_context(exclusive_lock(path))):
        pass


def test_child_forked_while_another_thread_waits_does_not_get_the_lock(path: Path) -> None:
    waiting = threading.Event()
    release = threading.Event()

    def wait() -> None:
        with exclusive_lock(path, lambda _holder: waiting.set()):
            release.wait(60)

    with ThreadPoolExecutor(1) as other, contextlib.ExitStack() as forks:
        with exclusive_lock(path):
            waits = other.submit(wait)
            assert waiting.wait(60)
            forks.enter_context(forked(lambda: None))
        release.set()
        waits.result(60)
        assert is_free(path)


def test_child_forked_while_the_file_is_opened_does_not_get_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as forks:

        def fork(descriptor: int) -> int:
            def check() -> None:
                assert str(path) not in open_names()

            forks.enter_context(forked(check))
            return descriptor

        monkeypatch.setattr(locks, "moved", fork)
        with exclusive_lock(path):
            pass


def test_threads_wait_for_each_other(path: Path) -> None:
    inside = 0

    def work(_number: int) -> None:
        nonlocal inside
        for _ in range(20):
            with exclusive_lock(path):
                inside += 1
                assert inside == 1
                inside -= 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))


def test_thread_that_would_wait_for_itself_is_told(path: Path) -> None:
    with exclusive_lock(path):
        with pytest.raises(RuntimeError, match=r"lock is locked already by the same thread"):
            exclusive_lock(path).__enter__()
        assert not is_free(path)
    assert is_free(path)


def test_whether_it_is_locked_can_be_seen(path: Path) -> None:
    assert not is_locked(path)
    assert not path.exists()
    with exclusive_lock(path):
        assert is_locked(path)
    assert path.exists()
    assert not is_locked(path)


def test_attempt_waits_until_its_deadline(path: Path) -> None:
    release = threading.Event()
    taken = threading.Event()

    def hold() -> None:
        with exclusive_lock(path):
            taken.set()
            release.wait(60)

    with ThreadPoolExecutor(1) as other:
        other.submit(hold)
        assert taken.wait(60)
        with try_lock(path, Deadline.after(0.01)) as held:
            assert not held
        release.set()
        with try_lock(path, Deadline.after(60)) as held:
            assert held


def test_file_that_is_removed_while_others_wait_is_locked_anew(path: Path) -> None:
    waiting = threading.Event()

    def wait() -> bool:
        with exclusive_lock(path, lambda _holder: waiting.set()):
            return not is_free(path)

    with ThreadPoolExecutor(1) as other:
        with exclusive_lock(path, remove=True):
            waits = other.submit(wait)
            assert waiting.wait(60)
        assert waits.result(60)


def test_directory_that_is_removed_while_others_wait_is_told(tmp_path: Path) -> None:
    waiting = threading.Event()
    path = tmp_path / "machine" / "lock"
    path.parent.mkdir()

    def wait() -> None:
        with exclusive_lock(path, lambda _holder: waiting.set()):
            pass

    with ThreadPoolExecutor(1) as other:
        with exclusive_lock(path):
            waits = other.submit(wait)
            assert waiting.wait(60)
            path.unlink()
            path.parent.rmdir()
        with pytest.raises(FileNotFoundError):
            waits.result(60)


@pytest.mark.parametrize("remove", [False, True])
def test_interrupt_at_any_line_leaves_no_lock(path: Path, remove: bool) -> None:
    """As Ctrl-C does: at each line in turn that runs while the lock is taken and given back."""
    line = 0
    interrupted = True
    while interrupted:
        line += 1
        interrupted = False
        with contextlib.suppress(KeyboardInterrupt), interrupting(line):
            try:
                with exclusive_lock(path, remove=remove):
                    pass
            except KeyboardInterrupt:
                interrupted = True
                raise
        assert is_free(path)
        assert str(path) not in open_names()
    assert line > 20


@contextlib.contextmanager
def interrupting(line: int) -> Iterator[None]:
    """Raise KeyboardInterrupt at the n-th line of the module that is run in the block."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != locks.__file__ or is_finalizer(frame):
            return None
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def is_finalizer(frame: FrameType | None) -> bool:
    """Whether it is called by a finalizer, out of which nothing is raised."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def test_interrupt_while_waiting_leaves_no_lock(path: Path) -> None:
    def interrupt_soon(_holder: str) -> None:
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()

    # What runs in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (
            forked(exclusive_lock(path).__enter__),
            pytest.raises(KeyboardInterrupt),
            exclusive_lock(path, interrupt_soon),
        ):
            pytest.fail("it is held by another process")
    finally:
        signal.signal(signal.SIGINT, before)
    assert is_free(path)
    assert str(path) not in open_names()


def test_who_waits_is_told_who_has_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holders: list[str] = []
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pro\x1bgram"])
    with ThreadPoolExecutor(1) as other:
        with forked(exclusive_lock(path).__enter__) as child:
            waits = other.submit(hold_shortly, path, holders.append)
            while not holders:
                os.sched_yield()
        waits.result(60)
        with exclusive_lock(path):
            waits = other.submit(hold_shortly, path, holders.append)
            while len(holders) < 2:
                os.sched_yield()
        waits.result(60)
    assert holders == [rf"process {child} (pro\x1bgram)", "another thread of this process"]


def hold_shortly(path: Path, on_wait: Callable[[str], None] | None = None) -> None:
    with exclusive_lock(path, on_wait):
        pass


def test_long_wait_is_logged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait_and_report() -> None:
        with exclusive_lock(path, report_after=0.0):
            pass

    messages: queue.Queue[str] = queue.Queue()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.put(record.getMessage())

    monkeypatch.setattr(logging.getLogger("pycloudlib._base.locks"), "handlers", [Handler()])
    with ThreadPoolExecutor(1) as other:
        with exclusive_lock(path):
            waits = other.submit(wait_and_report)
            message = messages.get(timeout=60)
        waits.result(60)
    assert message == f"Still waiting for another thread of this process, which holds {path}"


def test_file_system_without_locks_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(CloudSetupError, match=r"lock cannot be locked .*file system of"):
        exclusive_lock(path).__enter__()
    assert str(path) not in open_names()


def test_full_disk_keeps_nobody_from_a_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    with exclusive_lock(path):
        assert not is_free(path)


def test_wait_that_is_cut_off_at_its_beginning_is_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[threading.Timer] = []
    start = threading.Timer.start

    def interrupted(timer: threading.Timer) -> None:
        start(timer)
        begun.append(timer)
        raise KeyboardInterrupt

    def hold() -> None:
        with exclusive_lock(tmp_path / "lock"):
            held.set()
            end.wait(30)

    held, end = threading.Event(), threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    monkeypatch.setattr(threading.Timer, "start", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt), exclusive_lock(tmp_path / "lock"):
            pass
    finally:
        end.set()
        holder.join()
    assert [timer.finished.is_set() for timer in begun] == [True]


class Counter:
    """Something with a Python lock, as what programs hold of machines and clouds has."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition()
        locks.renew_in_children(self, lock=threading.Lock, changed=threading.Condition)


def test_child_forked_while_another_thread_holds_a_python_lock_can_take_it() -> None:
    counter = Counter()
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with counter.lock, counter.changed:
            held.set()
            over.wait()

    def take() -> None:
        assert counter.lock.acquire(timeout=0)
        with counter.changed:
            counter.changed.notify_all()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        with forked(take):
            assert not counter.lock.acquire(timeout=0), "the parent's is what it was"
    finally:
        over.set()
        holder.join()


def test_what_is_gone_is_not_kept_for_children() -> None:
    def make() -> threading.Lock:
        return threading.Lock()

    kept, counter = weakref.ref(make), Counter()
    locks.renew_in_children(counter, lock=make)
    del make, counter
    Counter()
    assert kept() is None


@pytest.mark.parametrize(("directory", "file"), [(0o2775, 0o660), (0o755, 0o600), (0o2777, 0o600)])
def test_lock_in_a_directory_that_a_group_shares_is_the_groups(
    path: Path, directory: int, file: int
) -> None:
    """Else the members of the group could not wait for each other."""
    path.parent.chmod(directory)
    with exclusive_lock(path):
        assert path.stat().st_mode & 0o777 == file
