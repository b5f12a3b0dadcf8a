"""How a machine is brought to where first boots begin, with a QEMU that only answers."""

from __future__ import annotations

import calendar
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pycloudlib.deadline import Deadline
from pycloudlib.errors import CloudError, PycloudlibTimeoutError
from pycloudlib.qemu import firstboot
from pycloudlib.qemu.firstboot import UnfitImageError
from pycloudlib.qemu.machine import MachineEndedError
from pycloudlib.qemu.qmp import Event

IO_ERROR = {"device": "", "node-name": "seed", "action": "stop", "operation": "read"}


def struct_tm(moment: int) -> dict[str, int]:
    """Tell a time as QEMU does: years since 1900, months from 0 on."""
    told = time.gmtime(moment)
    return {
        "tm_year": told.tm_year - 1900,
        "tm_mon": told.tm_mon - 1,
        "tm_mday": told.tm_mday,
        "tm_hour": told.tm_hour,
        "tm_min": told.tm_min,
        "tm_sec": told.tm_sec,
    }


class Machine:
    """Stands for a machine whose real-time clock tells whole seconds.

    Args:
        console: Its console's log.
        clock: Gives the time that its real-time clock has.
        events: The events that its QEMU has told.
    """

    def __init__(
        self, console: Path, clock: Callable[[], float] = time.time, *events: Event
    ) -> None:
        self.rundir = SimpleNamespace(console_log=console)
        self.spec = SimpleNamespace(name="vm-1")
        self.powered_on = time.monotonic()
        self._clock = clock
        self._events = events
        self.looks = 0

    @contextlib.contextmanager
    def session(self) -> Iterator[Machine]:
        yield self

    def execute(self, command: str, arguments: dict[str, str]) -> dict[str, int]:
        assert (command, arguments["property"]) == ("qom-get", "rtc-time")
        return struct_tm(int(self._clock()))

    def qemu(self) -> Machine:
        return self

    def wait_for_event(self, wanted: Callable[[Event], bool], deadline: Deadline) -> Event:
        self.looks += 1
        for event in self._events:
            if wanted(event):
                return event
        time.sleep(max(deadline.remaining, 0))
        raise PycloudlibTimeoutError("no event")


def measure(machine: Machine) -> float:
    given: Any = machine
    return firstboot._measure_rtc_lag(given)


def wait_for_seed(machine: Machine, limit: float = 60) -> None:
    given: Any = machine
    firstboot._wait_for_seed(given, Deadline.after(limit))


@pytest.fixture
def console(tmp_path: Path) -> Path:
    return tmp_path / "console.log"


@pytest.mark.parametrize("lag", [0.0, 0.3, 0.9])
def test_lag_of_the_real_time_clock_is_told(lag: float, console: Path) -> None:
    machine = Machine(console, lambda: time.time() - lag)
    assert measure(machine) == pytest.approx(lag, abs=0.05)


NEW_YEAR = calendar.timegm((2027, 1, 1, 0, 0, 0))
LEAP_DAY = calendar.timegm((2028, 3, 1, 0, 0, 0))


@pytest.mark.parametrize("midnight", [NEW_YEAR, LEAP_DAY], ids=["new year", "leap day"])
def test_lag_is_told_over_the_end_of_a_day(
    midnight: int, console: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = midnight - time.time() - 0.2
    now = time.time
    monkeypatch.setattr(firstboot.time, "time", lambda: now() + ahead)
    machine = Machine(console, lambda: now() + ahead - 0.5)
    assert measure(machine) == pytest.approx(0.5, abs=0.05)


def test_real_time_clock_that_stands_still_is_an_error(
    console: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firstboot, "_RTC_LIMIT", 0.05)
    with pytest.raises(CloudError, match="real-time clock of vm-1 stands still"):
        measure(Machine(console, lambda: 1_700_000_000.0))


def at(name: str, data: dict[str, str]) -> Event:
    return Event(name, data, 0.0)


def test_machine_that_has_stopped_at_its_seed_is_not_waited_for(console: Path) -> None:
    machine = Machine(console, time.time, at("BLOCK_IO_ERROR", IO_ERROR))
    wait_for_seed(machine)
    assert machine.looks == 1


@pytest.mark.parametrize(
    "event",
    [
        at("BLOCK_IO_ERROR", {**IO_ERROR, "node-name": "#block123"}),
        at("BLOCK_IO_ERROR", {"device": "root"}),
        at("STOP", {}),
    ],
    ids=["another disk", "a disk without a name", "stop"],
)
def test_machine_that_has_stopped_for_something_else_has_not_come_to_its_seed(
    event: Event, console: Path
) -> None:
    with pytest.raises(UnfitImageError, match="within 0 s"):
        wait_for_seed(Machine(console, time.time, event), limit=0.05)


@pytest.mark.parametrize(
    "line",
    [
        "debian login:",
        "debian login: ",
        "Cloud-init v. 22.4.2 running 'init' at Wed, 25 Nov 2026. Up 12 seconds.\n",
        "Cloud-init v. 22.4.2 finished at Wed, 25 Nov 2026. Datasource DataSourceNone.\n",
    ],
)
def test_guest_that_is_past_its_seed_is_given_up_at_once(line: str, console: Path) -> None:
    console.write_text(f"SeaBIOS\n{line}")
    begun = time.monotonic()
    with pytest.raises(UnfitImageError) as caught:
        wait_for_seed(Machine(console))
    assert time.monotonic() - begun < 30
    assert repr(line.strip()) in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "Linux version 6.1.0\n",
        "Cloud-init v. 22.4.2 running 'init-local' at Wed, 25 Nov 2026. Up 9 seconds.\n",
        "Last login: yesterday\n",
    ],
)
def test_guest_that_may_come_to_its_seed_has_all_its_time(line: str, console: Path) -> None:
    console.write_text(line)
    machine = Machine(console)
    with pytest.raises(UnfitImageError, match="of 1 s that it may take"):
        wait_for_seed(machine, limit=1)
    assert machine.looks > 1


def test_machine_that_ended_is_told_as_it_ended(
    console: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(console)

    def ended(*_arguments: object) -> Event:
        raise MachineEndedError("vm-1", None)

    monkeypatch.setattr(machine, "wait_for_event", ended)
    with pytest.raises(MachineEndedError, match="vm-1 is not running"):
        wait_for_seed(machine)
