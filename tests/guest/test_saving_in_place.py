"""A machine that is saved while it runs notices nothing: neither its guest nor who is connected."""

from __future__ import annotations

import itertools
import json
import logging
import re
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import paramiko
import pytest

from pycloudlib import Qemu
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.parts.part import ANONYMOUS
from pycloudlib.qemu.vm.running import State
from tests.guest.identity import KEYS, clock_error, who_is
from tests.qemu.machines import pauses

pytestmark = pytest.mark.guest

_log = logging.getLogger(__name__)

# Seconds: what takes so long hangs.
HANGS = 60


@pytest.fixture
def cloud() -> Iterator[Qemu]:
    with Qemu(tag="in-place") as cloud:
        yield cloud


# Prints a number every 50 ms until its input ends, then the longest time between two, in seconds.
COUNT = """
import sys, threading, time
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
number, gap, last = 0, 0.0, time.monotonic()
while not ended.wait(0.05):
    print(number, flush=True)
    number += 1
    now = time.monotonic()
    gap, last = max(gap, now - last), now
print("gap", gap)
"""


class Session:
    """An SSH session with a command that counts, on a connection of its own."""

    def __init__(self, vm: QemuInstance) -> None:
        self._client: paramiko.SSHClient = vm._ssh_connect()
        self._stdin, self._stdout, _ = self._client.exec_command(f"python3 -c {shlex.quote(COUNT)}")
        self._lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._stdout:
            self._lines.append((time.monotonic(), line.rstrip("\n")))

    def goes_on(self) -> bool:
        """Wait until more has come; say whether it has."""
        before, deadline = len(self._lines), time.monotonic() + HANGS
        while len(self._lines) <= before + 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        return len(self._lines) > before + 1

    def end(self) -> tuple[list[int], float, float]:
        """End the command.

        Returns:
            The numbers that came, and the longest gap between two: inside, and here.
        """
        self._stdin.channel.shutdown_write()
        assert self._stdout.channel.status_event.wait(HANGS)
        assert self._stdout.channel.recv_exit_status() == 0
        self._reader.join(HANGS)
        self._client.close()
        times = [came for came, _ in self._lines]
        *numbers, (_, told) = self._lines
        gap = max(later - earlier for earlier, later in itertools.pairwise(times))
        return [int(number) for _, number in numbers], float(told.split()[1]), gap


class Console:
    """A telnet client of the serial console, which stays connected."""

    def __init__(self, vm: QemuInstance) -> None:
        self._socket = socket.create_connection(("127.0.0.1", int(vm.telnet_port)), HANGS)

    def prompts(self) -> bool:
        """Type a line's end; say whether the guest asks who wants to log in."""
        self._socket.sendall(b"\r\n")
        received = b""
        while b"login:" not in received:
            data = self._socket.recv(1 << 16)
            if not data:
                return False
            received += data
        return True

    def close(self) -> None:
        self._socket.close()


def test_sessions_and_connections_outlive_twenty_saves(cloud: Qemu, saved: str) -> None:
    vm = cloud.launch(saved)
    assert vm.execute("echo common >/dev/shm/mark").ok
    facts = (vm.machine.pid, vm.id, vm.get_boot_id())
    before = len(pauses(vm))
    console = Console(vm)
    assert console.prompts()
    session = Session(vm)
    assert session.goes_on()
    lag, begun = clock_error(vm), time.monotonic()
    for number in range(20):
        image = cloud.snapshot(vm, memory=True)
        assert vm.execute(f"echo {number}") == str(number)
        cloud.delete_image(image)
        assert session.goes_on()
    took = time.monotonic() - begun
    assert console.prompts()
    forks = vm.fork(2, fresh_identity=True)
    assert session.goes_on()
    assert (vm.machine.pid, vm.id, vm.get_boot_id()) == facts
    numbers, inside, outside = session.end()
    assert numbers == list(range(len(numbers)))
    assert console.prompts()
    console.close()

    found = pauses(vm)[before:]
    assert len(found) == 21
    _log.info("20 saves and what was done between them: %.1f s", took)
    _log.info("Paused for %s ms by QEMU", [round(pause * 1000, 1) for pause in found])
    _log.info("Longest gap: %.3f s in the guest, %.3f s outside", inside, outside)
    _log.info("The guest's clock is wrong by %.3f s, before %.3f s", clock_error(vm), lag)
    assert max(found) < HANGS
    assert max(inside, outside) < HANGS

    told = [who_is(each) for each in (vm, *forks)]
    assert len({told[number]["machine-id"] for number in range(3)}) == 3
    assert len({told[number][KEYS[0]] for number in range(3)}) == 3
    for fork in forks:
        assert fork.execute("cat /dev/shm/mark") == "common"
        assert fork.delete() == []
    # The helper still works, since there is no other way in.
    interface = vm.execute("ip -oneline route show default | cut -d' ' -f5")
    assert vm.execute(f"ip link set {interface} down", use_sudo=True).ok
    assert vm.execute("id -un") == vm.username
    assert vm.execute(f"ip link set {interface} up", use_sudo=True).ok


# Two threads append to a file each, on the disk: a number, and a digest of all numbers so far. When
# a line is on the disk, it is written to memory.
JOURNAL = """
import hashlib, os, pathlib, threading, time
def work(name):
    digest = ""
    descriptor = os.open(f"/var/tmp/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    number = 0
    while True:
        number += 1
        digest = hashlib.sha256(f"{digest} {number}".encode()).hexdigest()
        line = f"{number} {digest}"
        os.write(descriptor, f"{line}\\n".encode())
        os.fsync(descriptor)
        new = pathlib.Path(f"/dev/shm/{name}.new")
        new.write_text(line)
        new.rename(f"/dev/shm/{name}")
        time.sleep(0.005)
for name in ("one", "other"):
    threading.Thread(target=work, args=[name]).start()
"""

# Reads what is in memory, then what is on the disk, not what the kernel remembers of it.
CHECK = """
import hashlib, json, os, pathlib
told = {}
for name in ("one", "other"):
    reached = pathlib.Path(f"/dev/shm/{name}").read_text()
    os.sync()
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
    lines = pathlib.Path(f"/var/tmp/{name}").read_text().splitlines()
    digest = ""
    for number, line in enumerate(lines[:-1], 1):
        digest = hashlib.sha256(f"{digest} {number}".encode()).hexdigest()
        assert line == f"{number} {digest}", (name, number, line)
    number = int(reached.split()[0])
    assert lines[number - 1] == reached, (name, reached, len(lines))
    told[name] = number
print(json.dumps(told))
"""

# Files of random bytes in memory and on the disk; prints their digest.
PLANT = """
for place in /dev/shm/tree /var/tmp/tree; do
    mkdir $place
    for number in $(seq 20); do head -c 200000 /dev/urandom >$place/$number; done
done
sync
"""
DIGEST = (
    "echo 3 >/proc/sys/vm/drop_caches; "
    "cat /dev/shm/tree/* /var/tmp/tree/* | sha256sum; cat /proc/sys/kernel/random/boot_id"
)


def start_journal(vm: QemuInstance) -> str:
    """Let a guest work; return the digest of what it does not change."""
    assert vm.execute(PLANT).ok
    unit = ["sudo", "systemd-run", "--quiet", "--unit=journal", "python3", "-c", JOURNAL]
    started = vm.execute(unit)
    assert started.ok, started.stderr
    assert vm.execute(
        "until [ -s /dev/shm/one ] && [ -s /dev/shm/other ]; do sleep 0.1; done", timeout=HANGS
    ).ok
    return digest(vm)


def digest(vm: QemuInstance) -> str:
    result = vm.execute(DIGEST, use_sudo=True)
    assert result.ok, result.stderr
    return str(result)


def check_journal(vm: QemuInstance) -> dict[str, int]:
    """See that memory and disk of a guest are of one moment; return which numbers it reached."""
    checked = vm.execute(["sudo", "python3", "-c", CHECK])
    assert checked.ok, checked.stderr
    reached: dict[str, int] = json.loads(checked)
    return reached


def test_what_is_written_while_saves_are_made_is_whole_in_each_copy(
    cloud: Qemu, saved: str
) -> None:
    vm = cloud.launch(saved)
    planted = start_journal(vm)
    pid = vm.machine.pid
    images = [cloud.snapshot(vm, memory=True) for _ in range(4)]
    assert vm.machine.pid == pid
    after = check_journal(vm)
    assert digest(vm) == planted
    for image in images:
        copy = cloud.launch(image)
        reached = check_journal(copy)
        assert digest(copy) == planted
        later = check_journal(copy)
        assert all(later[name] > number for name, number in reached.items()), "it goes on"
        assert copy.delete() == []
    assert all(check_journal(vm)[name] > number for name, number in after.items())


@pytest.mark.thorough
def test_eight_saves_of_saves_are_each_as_they_were(cloud: Qemu, saved: str) -> None:
    vm = cloud.launch(saved)
    planted = start_journal(vm)
    for number in range(8):
        pid = vm.machine.pid
        assert vm.execute(f"echo {number} | tee -a /dev/shm/saves >>/var/tmp/saves; sync").ok
        image = cloud.snapshot(vm, memory=True)
        assert vm.machine.pid == pid
        copy = cloud.launch(image)
        for each in (vm, copy):
            saves = each.execute("cmp /dev/shm/saves /var/tmp/saves && cat /var/tmp/saves")
            assert saves.split() == [str(done) for done in range(number + 1)]
            check_journal(each)
            assert digest(each) == planted
        assert vm.delete() == []
        vm = copy


@pytest.mark.thorough
def test_machines_under_load_are_saved_in_two_threads(cloud: Qemu, saved: str) -> None:
    pair = [cloud.launch(saved) for _ in range(2)]
    planted = [start_journal(vm) for vm in pair]
    pids = [vm.machine.pid for vm in pair]
    for _ in range(3):
        with ThreadPoolExecutor(2) as threads:
            images = list(threads.map(lambda vm: cloud.snapshot(vm, memory=True), pair))
        for image, wanted in zip(images, planted, strict=True):
            with cloud.launch(image) as copy:
                check_journal(copy)
                assert digest(copy) == wanted
    assert [vm.machine.pid for vm in pair] == pids
    for vm, wanted in zip(pair, planted, strict=True):
        check_journal(vm)
        assert digest(vm) == wanted


@pytest.mark.thorough
def test_copy_boots_again_powers_off_and_on_and_is_saved_in_turn(
    cloud: Qemu, saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the firmware needs for that is no part of the guest's memory, or of its devices."""
    source = cloud.launch(saved)
    assert source.execute("echo kept >/var/tmp/mark; sync").ok
    copy = cloud.launch(cloud.snapshot(source, memory=True))
    assert source.delete() == []
    boot_id = copy.get_boot_id()
    copy.restart()
    assert copy.get_boot_id() != boot_id
    assert re.search("SeaBIOS.*Linux version", copy.console_log(), re.DOTALL)

    copy.shutdown()
    assert copy.machine.state is State.OFF
    assert any(event.name == "SHUTDOWN" and event.data["guest"] for event in copy.machine.events)
    # This time in memory of the kind that machines have with KVM.
    monkeypatch.setattr("pycloudlib.qemu.vm.machine.choose_memory", lambda _: ANONYMOUS)
    copy.start()
    assert copy.execute("cat /var/tmp/mark") == "kept"
    planted, pid = start_journal(copy), copy.machine.pid
    image = cloud.snapshot(copy, memory=True)
    assert copy.machine.pid == pid
    check_journal(copy)
    assert copy.delete() == []

    again = cloud.launch(image)
    check_journal(again)
    assert digest(again) == planted
    again.restart()
    assert again.execute("cat /var/tmp/mark") == "kept"
    assert again.execute("ls /dev/shm/tree").failed
