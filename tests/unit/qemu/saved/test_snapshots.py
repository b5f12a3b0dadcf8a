"""Images of a disk, with a fake instance: what is asked of it, and in what order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from pycloudlib.qemu.saved import checkpoint
from pycloudlib.qemu.vm.process import ProcessEnd
from pycloudlib.qemu.vm.running import MachineEndedError, State


@dataclass
class FakeInstance:
    """An instance whose machine is in a state; notes what is asked of it."""

    state: State
    waits: BaseException | None = None
    asked: list[str] = field(default_factory=list)
    name: str = "vm"

    @property
    def machine(self) -> Any:
        @contextlib.contextmanager
        def staying_off() -> Iterator[None]:
            self.asked.append("stay off")
            raise _ReachedError
            yield

        rundir = SimpleNamespace(disk="disk")
        return SimpleNamespace(state=self.state, staying_off=staying_off, rundir=rundir)

    def wait(self) -> None:
        self.asked.append("wait")
        if self.waits is not None:
            raise self.waits

    def clean(self) -> None:
        self.asked.append("clean")

    def shutdown(self) -> None:
        self.asked.append("shutdown")


class _ReachedError(Exception):
    """The disk would be frozen now."""


def asked_for_snapshot(instance: FakeInstance, *, clean: bool) -> list[str]:
    with contextlib.suppress(_ReachedError):
        checkpoint.snapshot_disk(instance, lambda _image: None, clean=clean)  # type: ignore[arg-type]
    return instance.asked


def test_running_instance_is_cleaned_when_it_is_ready_then_shut_down() -> None:
    steps = asked_for_snapshot(FakeInstance(State.RUNNING), clean=True)
    assert steps == ["wait", "clean", "shutdown", "stay off"]


def test_instance_is_not_cleaned_unasked() -> None:
    assert asked_for_snapshot(FakeInstance(State.RUNNING), clean=False) == ["shutdown", "stay off"]


def test_instance_that_is_off_is_not_booted_to_be_cleaned(caplog: pytest.LogCaptureFixture) -> None:
    assert asked_for_snapshot(FakeInstance(State.OFF), clean=True) == ["shutdown", "stay off"]
    assert "cannot be cleaned" in caplog.text


def test_instance_that_goes_off_meanwhile_is_as_one_that_is_off() -> None:
    ended = MachineEndedError("vm", ProcessEnd(0, ""))
    steps = asked_for_snapshot(FakeInstance(State.RUNNING, ended), clean=True)
    assert steps == ["wait", "shutdown", "stay off"]


def test_instance_whose_qemu_crashed_has_no_snapshot() -> None:
    instance = FakeInstance(State.RUNNING, MachineEndedError("vm", ProcessEnd(-11, "")))
    with pytest.raises(MachineEndedError):
        asked_for_snapshot(instance, clean=True)
    assert instance.asked == ["wait"]
