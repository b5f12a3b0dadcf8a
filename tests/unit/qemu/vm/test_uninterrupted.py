from __future__ import annotations

import os
import signal
import threading

import pytest

from pycloudlib._base.tools import uninterrupted


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("moment", ["first", "last"])
def test_work_that_is_interrupted_comes_to_its_end_and_is_undone(moment: str) -> None:
    """Also when Ctrl-C comes in the moment in which the work begins."""
    done: list[str] = []

    def work() -> None:
        if moment == "first":
            interrupt()
        threading.Event().wait(0.05)
        done.append("worked")
        if moment == "last":
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(work, lambda: done.append("undone"))
    assert done == ["worked", "undone"]


def test_work_gives_its_result() -> None:
    assert uninterrupted(lambda: 7, pytest.fail) == 7


def test_work_that_fails_is_not_undone() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        uninterrupted(fail, pytest.fail)


def test_thread_whose_start_is_interrupted_ends_without_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[threading.Thread] = []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        threads.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        uninterrupted(pytest.fail)
    (thread,) = threads
    thread.join(30)
    assert not thread.is_alive()
