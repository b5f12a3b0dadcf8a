"""Saved machines: copies go on from where they were saved, each right in time and its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib._base.files import write_private
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.progress import Progress
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.host.processes import ProcessIdentity
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.vm.running import State
from tests.guest.identity import KEYS, WHO, clock_error, who_is
from tests.guest.seeds import SHOW_RECORD
from tests.unit.userdataforms import EVERYTHING, IN_ORDER, RECORD

pytestmark = pytest.mark.guest

CLOCK_LIMIT = 0.1

# Counts in memory alone, and hashes a tree of files over and over.
WORK = """
import hashlib, os, pathlib, time
tree = pathlib.Path("/var/tmp/tree")
tree.mkdir()
for number in range(40):
    (tree / str(number)).write_bytes(os.urandom(20000))
count, hashes = 0, set()
while True:
    digest = hashlib.sha256()
    for file in sorted(tree.iterdir()):
        digest.update(file.read_bytes())
    hashes.add(digest.hexdigest())
    count += 1
    text = f"{os.getpid()} {count} {' '.join(sorted(hashes))}"
    pathlib.Path("/run/work.new").write_text(text)
    os.rename("/run/work.new", "/run/work")
    time.sleep(0.01)
"""


@pytest.fixture
def cloud() -> Iterator[Qemu]:
    with Qemu(tag="live") as cloud:
        yield cloud


def work_of(vm: QemuInstance) -> list[str]:
    return vm.execute("cat /run/work").split()


def goes_on(vm: QemuInstance, count: str) -> bool:
    """Wait until the work has gone beyond a count."""
    return vm.execute(
        f"until [ $(cut -d' ' -f2 /run/work) -gt {count} ]; do sleep 0.1; done", timeout=60
    ).ok


def start_work(vm: QemuInstance) -> None:
    started = vm.execute(["sudo", "systemd-run", "--quiet", "--unit=work", "python3", "-c", WORK])
    assert started.ok, started.stderr
    assert vm.execute("until [ -s /run/work ]; do sleep 0.1; done", timeout=60).ok


def test_copies_go_on_from_one_moment_of_a_machine_that_works(cloud: Qemu, saved: str) -> None:
    source = cloud.launch(saved)
    start_work(source)
    before = work_of(source)
    pid = source.machine.pid
    for _ in range(3):
        image = cloud.snapshot(source, memory=True)
        after = work_of(source)
        assert source.machine.pid == pid, "the same QEMU runs it"
        assert after[0] == before[0], "the same process goes on"
        assert int(after[1]) >= int(before[1])
        assert after[2:] == before[2:], "no file was ever read as anything but what it is"
        assert goes_on(source, after[1])
    assert source.delete() == []

    first, second, third = (cloud.launch(image) for _ in range(3))
    begun = {vm.name: work_of(vm) for vm in (first, second, third)}
    third.machine.kill()
    for vm in (first, second):
        now = work_of(vm)
        assert now[0] == before[0]
        assert int(now[1]) >= int(begun[vm.name][1]) >= int(before[1])
        assert goes_on(vm, now[1])
        assert now[2:] == before[2:]
        assert vm.execute("find /var/tmp/tree -type f -print0 | xargs -0 cat | wc -c") == "800000"
    again = cloud.snapshot(first, memory=True)
    grandchild = cloud.launch(again)
    assert goes_on(grandchild, begun[first.name][1])
    assert work_of(grandchild)[2:] == before[2:]


@pytest.mark.parametrize("count", [6, pytest.param(20, marks=pytest.mark.thorough)])
def test_copies_are_each_their_own_and_right_in_time(count: int, cloud: Qemu, saved: str) -> None:
    copies = [cloud.launch(saved, fresh_identity=True) for _ in range(count)]
    for vm in copies:
        assert clock_error(vm) <= CLOCK_LIMIT, vm.name
    told = {vm.name: who_is(vm) for vm in copies}
    for (one, ours), (other, theirs) in itertools.combinations(told.items(), 2):
        for what in WHO:
            assert ours[what] != theirs[what], f"{what} of {one} and {other}"
    for vm in copies:
        assert told[vm.name]["host name"] == vm.name
        shown = [told[vm.name][kind] for kind in KEYS]
        assert vm.machine.rundir.known_hosts.read_text().splitlines() == shown
    # The pinned keys are what its SSH server shows.
    vm = copies[-1]
    vm.wait()
    vm._ssh_connect().close()
    for copy in copies:
        assert copy.delete() == []


def test_a_copy_is_the_same_machine_unless_it_is_to_be_another(cloud: Qemu, saved: str) -> None:
    one, other = cloud.launch(saved), cloud.launch(saved)
    ours, theirs = who_is(one), who_is(other)
    alike = {what for what in WHO if ours[what] == theirs[what]}
    assert alike == {"host name", "machine-id", "instance-id", *KEYS}
    assert one.get_boot_id() == other.get_boot_id()


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.thorough)])
def test_copies_one_after_another_leave_nothing(count: int, cloud: Qemu, saved: str) -> None:
    def count_all() -> tuple[int, int]:
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        return descriptors, len(list(cloud.parent_dir.iterdir()))

    pids = []
    with cloud.launch(saved) as kept:
        before = count_all()
        for _ in range(count):
            with cloud.launch(saved) as vm:
                assert vm.execute("echo here") == "here"
                pids.append(vm.machine.pid)
        after = count_all()
        assert kept.execute("echo still") == "still"
    assert after[0] <= before[0] + 3
    assert after[1] == before[1]
    assert all(pid is not None and ProcessIdentity.find(pid) is None for pid in pids)


def test_user_data_of_a_copy_is_run_in_it(
    cloud: Qemu, saved: str, caplog: pytest.LogCaptureFixture
) -> None:
    script = cloud.launch(saved, user_data="#!/bin/sh\nid -un >/var/tmp/who; exit 3\n")
    config = cloud.launch(
        saved,
        user_data="#cloud-config\n"
        "write_files: [{path: /var/tmp/written, content: by cloud-init}]\n"
        "runcmd: [[sh, -c, 'cat /var/tmp/written >/var/tmp/ran']]\n"
        "timezone: Europe/Vienna\n",
    )
    script.wait()
    assert script.execute("cat /var/tmp/who") == "root"
    assert "user-data failed" in caplog.text
    caplog.clear()
    config.wait()
    assert config.execute("cat /var/tmp/ran; date +%Z") in (
        "by cloud-initCET",
        "by cloud-initCEST",
    )
    assert "failed" not in caplog.text
    with pytest.raises(ValueError, match="growpart"):
        cloud.launch(saved, user_data="#cloud-config\ngrowpart: {mode: auto}\n")


ASKING = f"""\
#!/bin/bash
{{ echo $0; pwd; umask; id -u; readlink /proc/self/fd/0; env | cut -d= -f1 | sort; }} >{RECORD}
echo to stdout; echo to stderr >&2
"""


@pytest.mark.parametrize("fresh_identity", [True, False])
def test_user_data_of_many_parts_is_taken_as_in_a_boot(
    fresh_identity: bool, cloud: Qemu, saved: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A boot with the same document is among the tests of user-data."""
    vm = cloud.launch(saved, user_data=EVERYTHING, fresh_identity=fresh_identity)
    vm.wait()
    assert vm.execute(SHOW_RECORD).split("\n") == [*IN_ORDER]
    assert "failed" not in caplog.text


def test_script_of_a_copy_has_what_it_has_in_a_boot(cloud: Qemu, saved: str) -> None:
    vm = cloud.launch(saved, user_data=ASKING.replace("\n", "\r\n"))
    vm.wait()
    assert vm.execute(f"cat {RECORD}").split("\n") == [
        "/var/lib/cloud/instance/scripts/part-001",
        "/",
        "0022",
        "0",
        "/dev/null",
        *["LANG", "PATH", "PWD", "SHLVL", "TERM", "_"],
    ]
    log = vm.execute("tail -n 2 /var/log/cloud-init-output.log", use_sudo=True)
    assert log == "to stdout\nto stderr"


@pytest.mark.thorough
def test_user_data_of_a_copy_that_boots_it_again_is_followed(cloud: Qemu, saved: str) -> None:
    vm = cloud.launch(saved, user_data=f"#!/bin/sh\necho ran >>{RECORD}\nreboot\n")
    vm.wait()
    assert vm.console_log().count("Linux version") == 1
    assert vm.execute(f"cat {RECORD}; systemctl is-system-running") == "ran\nrunning"


def test_user_data_that_does_not_end_is_not_waited_for(cloud: Qemu, saved: str) -> None:
    vm = cloud.launch(saved, user_data="#!/bin/sh\nexec sleep 1000\n")
    with pytest.raises(PycloudlibTimeoutError, match=r"user-data of .* did not end"):
        vm.wait(ready_timeout=0.5)


def test_files_of_a_copy_go_by_its_helper(cloud: Qemu, saved: str, tmp_path: Path) -> None:
    """In emulation; the first one needs no SSH connection."""
    sent, received = tmp_path / "sent", tmp_path / "received"
    sent.write_bytes(os.urandom(3 << 20))

    def stop(_report: Progress) -> None:
        raise InterruptedError

    with cloud.launch(saved) as copy:
        for _ in range(2):
            copy.push_file(sent, "there")
            copy.pull_file("there", received)
            assert received.read_bytes() == sent.read_bytes()
            if copy.machine.spec.accelerator is Accelerator.TCG:
                assert not copy._is_connected()
            with pytest.raises(InterruptedError):
                copy.pull_file("there", tmp_path / "cut", on_progress=stop)
            with pytest.raises(FileNotFoundError, match="missing"):
                copy.pull_file("missing", received)
            copy._forget_client()
            assert copy.execute("stat -c '%a %U' there") == f"644 {copy.username}"
            assert copy.guest.helper.expected


def test_commands_run_without_a_network_and_by_ssh_without_a_helper(
    cloud: Qemu, saved: str
) -> None:
    vm = cloud.launch(saved)
    interface = vm.execute("ip -oneline route show default | cut -d' ' -f5")
    assert vm.execute(f"ip link set {interface} down", use_sudo=True).ok
    assert vm.execute("id -un") == "ubuntu"
    assert vm.execute(f"ip link set {interface} up", use_sudo=True).ok

    other = cloud.launch(saved)
    other.execute("systemctl stop pycloudlib-helper", use_sudo=True)
    assert other.execute("echo $SSH_CONNECTION") != ""
    write_private(other.machine.rundir.fix_up, '{"identity": null, "new_key": null}')
    other.execute("date --set='1 hour ago'", use_sudo=True)
    other.wait()
    assert clock_error(other) <= CLOCK_LIMIT


def test_a_machine_is_taken_back_as_often_as_wanted(cloud: Qemu, saved: str) -> None:
    vm = cloud.launch(saved, fresh_identity=True)
    vm.execute("echo before >/var/tmp/state; sync")
    place = (vm.id, vm.name, vm.port)
    image = cloud.snapshot(vm, memory=True)
    for _ in range(2):
        assert vm.execute("echo after >/var/tmp/state; sync; hostname") == vm.name
        vm.rollback(image)
        assert (vm.id, vm.name, vm.port) == place
        assert vm.execute("cat /var/tmp/state; hostname") == f"before\n{vm.name}"
        assert clock_error(vm) <= CLOCK_LIMIT
    vm.wait()
    vm._ssh_connect().close()
    assert vm.machine.state is State.RUNNING


def test_forks_of_a_machine_run_side_by_side(cloud: Qemu, saved: str) -> None:
    vm = cloud.launch(saved)
    vm.execute("echo common >/run/mark", use_sudo=True)
    forks = vm.fork(4)
    with ThreadPoolExecutor(4) as threads:
        marks = list(threads.map(lambda fork: fork.execute("cat /run/mark"), forks))
    assert marks == ["common"] * 4
    assert len({fork.port for fork in (vm, *forks)}) == 5
    assert vm.execute("cat /run/mark") == "common"


KEPT = """
import sys
from pycloudlib import Qemu
with Qemu("another-day") as cloud:
    vm = cloud.launch(sys.argv[1])
    print(vm.execute("cat /run/mark"))
    vm.wait()
    vm._ssh_connect().close()
"""


def test_a_kept_machine_goes_on_in_another_program(saved: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept.img"
    with Qemu(tag="live-kept") as cloud:
        vm = cloud.launch(saved)
        vm.execute("echo kept >/run/mark", use_sudo=True)
        assert cloud.snapshot(vm, memory=True, path=kept) == str(kept)
        with pytest.raises(FileExistsError):
            cloud.snapshot(vm, memory=True, path=kept)
    done = subprocess.run(
        [sys.executable, "-c", KEPT, kept], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "kept\n"


WARM = """
import sys
from pycloudlib import Qemu
with Qemu("warm") as cloud:
    vm = cloud.launch(sys.argv[1], "c1m512", user_data=sys.argv[2], warm=True, fast_boot=True)
    vm.wait()
    print("booted" if "Linux version" in vm.console_log() else "copied")
    print(vm.execute("cat /var/tmp/proof; hostname; cat /etc/machine-id").replace("\\n", " "))
"""


@pytest.fixture
def warm_programs(image: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Start two programs that want the same warm machine."""
    user_data = f"#!/bin/sh\necho warm >/var/tmp/proof # {uuid.uuid4()}\n"
    arguments = [sys.executable, "-c", WARM, image, user_data]
    cloud = Qemu(tag="live-warm")
    before = {warm.key for warm in cloud.warm_images()}
    with contextlib.ExitStack() as stack:
        programs = []
        for _ in range(2):
            program = subprocess.Popen(
                arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.callback(program.wait)
            stack.callback(program.send_signal, signal.SIGINT)
            programs.append(program)
        yield programs
    for warm in cloud.warm_images():
        if warm.key not in before and not warm.first_boot:
            cloud.delete_image(warm.image_id)


@pytest.mark.thorough
def test_two_programs_that_want_a_warm_machine_boot_it_once(
    warm_programs: list[subprocess.Popen[str]],
) -> None:
    told = [program.communicate(timeout=1200) for program in warm_programs]
    outputs = [output.splitlines() for output, _errors in told]
    assert all(len(output) == 2 for output in outputs), told
    assert sorted(output[0] for output in outputs) == ["booted", "copied"]
    proofs = [output[1].split() for output in outputs]
    assert [proof[0] for proof in proofs] == ["warm"] * 2
    assert proofs[0][1] != proofs[1][1]
    assert proofs[0][2] != proofs[1][2]
