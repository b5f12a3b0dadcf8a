"""A process is told apart from every other one, also where it cannot be seen."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pycloudlib.qemu.host import processes
from pycloudlib.qemu.host.ownership import Orphans, Ownership, create_owned_directory, is_abandoned
from pycloudlib.qemu.host.processes import Presence, ProcessIdentity, World
from pycloudlib.qemu.state.rundir import RunDirectory
from tests.worlds import WITHOUT_PROC, run_inside, unsharing

OTHER_BOOT = "0" * 32
OTHER_HOST = "f" * 16


@pytest.fixture
def sleeper() -> Iterator[ProcessIdentity]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        found = ProcessIdentity.find(process.pid)
        assert found is not None
        yield found
        process.kill()


@pytest.fixture
def blinkered(monkeypatch: pytest.MonkeyPatch) -> None:
    """See no more than a container does: its own processes."""
    monkeypatch.setattr(World, "shows_all", False)


def moved(process: ProcessIdentity, **changes: object) -> ProcessIdentity:
    """Give a process of the same numbers in another world."""
    assert process.world is not None
    world = dataclasses.replace(process.world, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(process, world=world)


def test_process_of_an_earlier_boot_has_ended(sleeper: ProcessIdentity) -> None:
    earlier = moved(sleeper, boot=OTHER_BOOT)
    assert earlier.presence is Presence.ENDED
    assert earlier.find_pid() is None


def test_process_of_another_host_is_taken_to_be_alive(sleeper: ProcessIdentity) -> None:
    other = moved(sleeper, boot=OTHER_BOOT, host=OTHER_HOST, name="ci-3")
    assert other.presence is Presence.ELSEWHERE
    assert other.alive
    assert other.find_pid() is None
    assert other.place == f"process {sleeper.pid} on ci-3"


def test_containers_of_one_host_may_have_any_names(sleeper: ProcessIdentity) -> None:
    assert moved(sleeper, host=OTHER_HOST, name="else").presence is Presence.HERE
    assert moved(sleeper, host=OTHER_HOST, name="else") == sleeper


@pytest.mark.usefixtures("blinkered")
def test_process_of_another_namespace_is_taken_to_be_alive(sleeper: ProcessIdentity) -> None:
    other = moved(sleeper, pids=7)
    assert other.presence is Presence.ELSEWHERE
    assert "another PID namespace" in other.place


def test_who_sees_all_sees_that_a_namespace_is_gone(
    sleeper: ProcessIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "shows_all", True)
    assert moved(sleeper, pids=7).presence is Presence.ENDED


def test_start_times_of_two_clocks_are_not_compared(sleeper: ProcessIdentity) -> None:
    assert moved(sleeper, clock=7).presence is Presence.ELSEWHERE
    gone = dataclasses.replace(sleeper, pid=2**22 + 1)
    assert moved(gone, clock=7).presence is Presence.ENDED


def test_process_that_is_hidden_is_taken_to_be_alive(
    sleeper: ProcessIdentity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As other users' are where /proc is mounted with `hidepid`."""
    monkeypatch.setattr(processes, "find_proc_directory", lambda pid: tmp_path / str(pid))
    assert sleeper.presence is Presence.ELSEWHERE
    ended = dataclasses.replace(sleeper, pid=2**22 + 1)
    assert ended.presence is Presence.ENDED


def test_old_notes_are_read_as_of_our_own_world(sleeper: ProcessIdentity, tmp_path: Path) -> None:
    rundir = RunDirectory(tmp_path)
    numbers = {"pid": sleeper.pid, "start": sleeper.start_time}
    (tmp_path / "process.json").write_text(json.dumps(numbers))
    found = rundir.find_process()
    assert found == ProcessIdentity(sleeper.pid, sleeper.start_time)
    assert found.presence is Presence.HERE
    assert found.find_pid() == sleeper.pid
    note = {**numbers, "orphans": "reap-after-crash", "left": False}
    (tmp_path / ".owner").write_text(json.dumps(note))
    owner = Ownership.find(tmp_path)
    assert owner is not None
    assert not owner.is_orphaned
    (tmp_path / ".owner").write_text(json.dumps({**note, "start": sleeper.start_time - 1}))
    owner = Ownership.find(tmp_path)
    assert owner is not None
    assert owner.is_orphaned


@pytest.mark.parametrize("name", ["plain", "два", "\udcd1\udcff", 'a "b" \\ c', ""])
def test_notes_keep_the_world_whatever_the_host_is_called(name: str, tmp_path: Path) -> None:
    me = moved(ProcessIdentity.own(), name=name)
    rundir = RunDirectory(tmp_path)
    rundir.write_process(me)
    found = rundir.find_process()
    assert found is not None
    assert found == me
    assert found.world is not None
    assert me.world is not None
    assert (found.world.name, found.world.host) == (name, me.world.host)
    Ownership(me, Orphans.REAP).write(tmp_path)
    assert Ownership.find(tmp_path) == Ownership(me, Orphans.REAP)


@pytest.mark.parametrize("world", ["", "x", "1-2-3", "1-2-3-g", "1--2-3-a", 'a-1-2-b"\n'])
def test_damaged_world_is_told(world: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no boot"):
        World.parse(world)
    (tmp_path / "process.json").write_text(json.dumps({"pid": 1, "start": 1, "world": world}))
    assert RunDirectory(tmp_path).find_process() is None


def test_unfinished_directory_of_another_host_is_not_cut_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Path] = []

    def stop(self: Ownership, owned: Path) -> None:
        made.append(owned)
        raise InterruptedError

    monkeypatch.setattr(Ownership, "write", stop)
    with pytest.raises(InterruptedError):
        create_owned_directory(tmp_path / "vm", Orphans.REAP)
    (path,) = made
    assert not is_abandoned(path), "its program runs"
    own = World.own()
    here, gone = str(own), ProcessIdentity(2**22 + 1, 1)
    elsewhere = str(dataclasses.replace(own, boot=OTHER_BOOT, host=OTHER_HOST))
    earlier = str(dataclasses.replace(own, boot=OTHER_BOOT))
    pattern = f".vm.{gone.pid}-{gone.start_time}-{{}}.new"
    assert is_abandoned(path.with_name(pattern.format(here)))
    assert is_abandoned(path.with_name(pattern.format(earlier)))
    assert not is_abandoned(path.with_name(pattern.format(elsewhere)))


INSIDE = """
import json, os, subprocess, sys, time
from pycloudlib.qemu.host.processes import ProcessIdentity
me = ProcessIdentity.own()
with subprocess.Popen(["sleep", "1000"]) as child:
    its = ProcessIdentity.find(child.pid)
    seen = [me.presence.name, its.presence.name, its.find_pid() == child.pid]
    print(json.dumps([me.to_plain(), its.to_plain(), seen]), flush=True)
    if sys.stdin.read(1):
        child.kill()
print(its.presence.name, flush=True)
"""


@pytest.mark.parametrize("proc", [True, False])
def test_processes_inside_are_seen_under_other_pids(proc: bool) -> None:
    """Also where those inside have the /proc of outside, which does not show their own pids."""
    enter = unsharing() if proc else unsharing(WITHOUT_PROC)
    with subprocess.Popen(
        [*enter, sys.executable, "-c", INSIDE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        *noted, seen = json.loads(process.stdout.readline())
        assert seen == ["HERE", "HERE", True]
        me, child = (processes.ProcessRecord(**plain).identity() for plain in noted)
        assert (me.pid, child.pid) != (me.find_pid(), child.find_pid())
        assert me.presence is child.presence is Presence.HERE
        pid = child.find_pid()
        assert pid is not None
        assert b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()
        process.stdin.write("x")
        process.stdin.close()
        assert process.stdout.readline() == "ENDED\n"
    expected = Presence.ENDED if World.own().shows_all else Presence.ELSEWHERE
    assert child.presence is me.presence is expected


def test_processes_outside_are_taken_to_be_alive() -> None:
    me = ProcessIdentity.own()
    program = (
        "import json, sys\n"
        "from pycloudlib.qemu.host.processes import ProcessRecord\n"
        "print(ProcessRecord(**json.loads(sys.argv[1])).identity().presence.name)"
    )
    assert run_inside(program, json.dumps(me.to_plain())) == "ELSEWHERE\n"
