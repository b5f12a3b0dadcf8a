"""Machines under several hands: threads, processes, interrupts; none is lost, none is left."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib._base.deadline import Deadline
from pycloudlib.cli import inside
from pycloudlib.cli.terminal import SerialConsole
from pycloudlib.diagnosis import Cause
from pycloudlib.errors import CloudError, InstanceNotFoundError
from pycloudlib.guest.helper import FixUp, HelperError
from pycloudlib.progress import Progress
from pycloudlib.qemu.host import resources
from pycloudlib.qemu.host.processes import ProcessIdentity
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.state.rundir import RunDirectory, short_path
from pycloudlib.qemu.vm import helper, sockets
from pycloudlib.qemu.vm.machine import PowerOff
from pycloudlib.qemu.vm.process import LaunchError, PortTakenError, QemuProcess
from pycloudlib.qemu.vm.qmp import QmpError
from pycloudlib.qemu.vm.running import MachineEndedError, State
from tests.pythonlocks import holding_locks
from tests.qemu.conftest import UNSTARTED, CloudMaker
from tests.qemu.machines import SMALL

pytestmark = pytest.mark.qemu


def processes_of(directory: Path) -> list[int]:
    """List the processes that have a directory on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(directory).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


# Prints the line at 0x7c40 on the serial port, over and over.
PRINTER = "31c08ed8be407cbafd03eca82074fbacbaf803ee3c0a75efebea"
TELNET_LIKE = b"\xff\xfb\x01 a \xff\xfa\x18 b \xff\xf0 c \xff\xff d \xff\n"


def test_console_shows_what_a_guest_prints_that_looks_like_telnet(
    cloud: Qemu, tmp_path: Path
) -> None:
    """QEMU's greeting is telnet's, and nothing else that comes."""
    image = tmp_path / "printer.img"
    sector = (bytes.fromhex(PRINTER).ljust(0x40, b"\0") + TELNET_LIKE).ljust(510, b"\0")
    image.write_bytes((sector + b"\x55\xaa").ljust(1 << 20, b"\0"))
    machine = cloud.launch(str(image), SMALL)
    shown = b""
    with contextlib.closing(SerialConsole(machine.ip, int(machine.telnet_port))) as console:
        while TELNET_LIKE * 3 not in shown:
            chunk = console.receive()
            assert chunk is not None
            shown += chunk
            assert len(shown) < 1 << 22, shown[-200:]
    assert not shown.startswith(b"\xff\xfb\x01\xff\xfb\x03")


def test_a_start_that_fails_can_be_tried_again(unstarted: QemuInstance) -> None:
    unstarted.machine.kill()
    with (
        resources.listen(int(unstarted.telnet_port)),
        pytest.raises(PortTakenError, match=unstarted.telnet_port),
    ):
        unstarted.start(wait=False)
    with pytest.raises(MachineEndedError):
        unstarted.machine.check_on()
    unstarted.start(wait=False)
    assert unstarted.machine.state is State.PAUSED


def test_a_port_that_is_busy_for_a_moment_does_not_fail_a_start(
    unstarted: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    unstarted.machine.kill()
    other, listen = resources.listen(int(unstarted.telnet_port)), resources.listen
    refused: list[OSError] = []

    def listen_or_free(port: int) -> socket.socket:
        try:
            return listen(port)
        except OSError as error:
            refused.append(error)
            other.close()
            raise

    monkeypatch.setattr(resources, "listen", listen_or_free)
    unstarted.start(wait=False)
    assert len(refused) == 1
    assert unstarted.machine.state is State.PAUSED


@pytest.mark.parametrize("moment", ["before", "after", "greeting"])
def test_ctrl_c_at_any_moment_of_a_launch_leaves_nothing(
    cloud: Qemu, tiny_image: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The signal really comes, while QEMU is being born in another thread."""
    start, write = QemuProcess.start, RunDirectory.write_process

    def start_interrupted(argv: Sequence[str], **options: Any) -> QemuProcess:
        if moment == "before":
            os.kill(os.getpid(), signal.SIGINT)
        process = start(argv, **options)
        if moment == "after":
            os.kill(os.getpid(), signal.SIGINT)
        return process

    def write_interrupted(rundir: RunDirectory, identity: ProcessIdentity) -> None:
        write(rundir, identity)
        if moment == "greeting":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(QemuProcess, "start", start_interrupted)
    monkeypatch.setattr(RunDirectory, "write_process", write_interrupted)
    with pytest.raises(KeyboardInterrupt):
        cloud.launch(str(tiny_image), launch_args=UNSTARTED)
    assert processes_of(cloud.parent_dir) == []
    assert list(cloud.parent_dir.glob("t-*")) == []
    assert cloud.created_instances == []


def test_delete_while_another_thread_starts_it_leaves_nothing(unstarted: QemuInstance) -> None:
    unstarted.machine.kill()

    def start() -> str:
        try:
            unstarted.start(wait=False)
        except InstanceNotFoundError:
            return "deleted first"
        return "started first"

    with ThreadPoolExecutor(2) as threads:
        started, deleted = threads.submit(start), threads.submit(unstarted.delete)
        assert deleted.result() == []
        assert started.result() in ("deleted first", "started first")
    assert processes_of(unstarted.instance_dir) == []
    assert not unstarted.instance_dir.exists()


def test_start_in_the_last_moment_of_a_delete_finds_no_machine(
    unstarted: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files are gone, the lock too; the directory is there still."""
    remove = os.rmdir
    came: list[Path] = []

    def start_and_remove(path: Any, **options: Any) -> None:
        if Path(path).name == unstarted.instance_dir.name and not came:
            came.append(Path(path))
            with pytest.raises(InstanceNotFoundError, match="is deleted"):
                unstarted.machine.power_on()
        remove(path, **options)

    monkeypatch.setattr(os, "rmdir", start_and_remove)
    assert unstarted.delete() == []
    assert came
    assert processes_of(unstarted.instance_dir) == []
    assert not unstarted.instance_dir.exists()


def test_what_another_handle_started_is_seen_and_deleted(
    cloud: Qemu, unstarted: QemuInstance
) -> None:
    other = cloud.get_instance(unstarted.id)
    other.machine.kill()
    other.start(wait=False)
    assert unstarted.machine.pid == other.machine.pid
    with pytest.raises(CloudError, match="only a machine that is off"):
        unstarted.machine.power_on()
    assert unstarted.delete() == []
    assert processes_of(unstarted.instance_dir) == []
    assert other.machine.state is State.OFF


def test_a_deleted_instance_says_so(unstarted: QemuInstance) -> None:
    unstarted.delete()
    for operation in (unstarted.start, unstarted.restart, unstarted.shutdown):
        with pytest.raises(InstanceNotFoundError, match=unstarted.name):
            operation()
    unstarted.wait_for_stop()


def test_a_program_at_the_qmp_socket_is_no_obstacle(cloud: Qemu, unstarted: QemuInstance) -> None:
    with (
        socket.socket(socket.AF_UNIX) as program,
        short_path(unstarted.instance_dir / "qmp-socket") as address,
    ):
        program.connect(address)
        other = cloud.get_instance(unstarted.id)
        assert other.machine.execute("query-status")["status"] == "prelaunch"


def test_a_guest_that_cannot_react_is_not_waited_for(unstarted: QemuInstance) -> None:
    took = unstarted.machine.power_off(Deadline.after(600))
    assert took is PowerOff.QUIT


def test_a_guest_that_cannot_be_reached_is_power_cycled(
    unstarted: QemuInstance, caplog: pytest.LogCaptureFixture
) -> None:
    before = (unstarted.id, unstarted.machine.pid)
    unstarted.banner_timeout = 0.5
    with caplog.at_level("INFO"):
        unstarted.restart(wait=False)
    assert unstarted.machine.state is State.PAUSED
    assert unstarted.id == before[0]
    assert unstarted.machine.pid != before[1]
    assert "power cycle" in caplog.text
    assert PowerOff.QUIT.value in caplog.text


def test_a_powered_off_machine_says_how_it_is_started_again(unstarted: QemuInstance) -> None:
    unstarted.shutdown()
    with pytest.raises(MachineEndedError, match="not running"):
        unstarted.restart()
    unstarted.shutdown()
    unstarted.start(wait=False)
    assert unstarted.machine.state is State.PAUSED


@pytest.mark.parametrize("clean", [True, False])
def test_a_machine_that_is_off_is_saved_as_it_is_without_a_boot(
    cloud: Qemu, unstarted: QemuInstance, clean: bool, caplog: pytest.LogCaptureFixture
) -> None:
    unstarted.shutdown()
    console = unstarted.machine.rundir.console_log
    before = (unstarted.machine.console_start, console.stat().st_size)
    images = [cloud.snapshot(unstarted, clean=clean) for _ in range(2)]
    assert unstarted.machine.pid is None
    assert (unstarted.machine.console_start, console.stat().st_size) == before
    assert ("cannot be cleaned without a boot" in caplog.text) == clean
    with cloud.launch(images[1], launch_args=UNSTARTED) as copy:
        copy.shutdown()
        assert Path(cloud.snapshot(copy, clean=clean)).exists()
    unstarted.start(wait=False)
    assert unstarted.machine.state is State.PAUSED


def test_a_machine_that_another_program_switched_off_is_saved_as_it_is(
    cloud: Qemu, unstarted: QemuInstance, caplog: pytest.LogCaptureFixture
) -> None:
    unstarted.machine.kill()
    again = cloud.get_instance(unstarted.id)
    assert Path(cloud.snapshot(again)).exists()
    assert again.machine.state is State.OFF
    assert "cannot be cleaned without a boot" in caplog.text


def test_a_machine_that_goes_off_before_it_is_cleaned_is_saved_as_it_is(
    cloud: Qemu, unstarted: QemuInstance, caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(cloud.snapshot, unstarted)
        unstarted.machine.execute("quit")
        assert Path(made.result(60)).exists()
    assert "cannot be cleaned without a boot" in caplog.text


def test_a_machine_that_crashes_before_it_is_cleaned_is_not_saved(
    cloud: Qemu, unstarted: QemuInstance
) -> None:
    pid = unstarted.machine.pid
    assert pid is not None
    began = threading.Event()

    def wait(*_: Any, **__: Any) -> None:
        began.set()
        QemuInstance.wait(unstarted)

    unstarted.wait = wait  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(cloud.snapshot, unstarted)
        assert began.wait(60)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(MachineEndedError, match="signal 9"):
            made.result(60)
    assert cloud.created_images == []


def test_an_exported_snapshot_stands_alone(
    cloud: Qemu, tiny_image: Path, unstarted: QemuInstance, tmp_path: Path
) -> None:
    snapshot = cloud.snapshot(unstarted, clean=False)
    target = tmp_path / "exported.img"
    reports: list[Progress] = []
    cloud.export_image(snapshot, target, on_progress=reports.append)
    with pytest.raises(FileExistsError, match=r"exported\.img"):
        cloud.export_image(snapshot, target)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cloud.export_image(snapshot, tmp_path / "nowhere" / "x.img")
    assert unstarted.delete() == []
    cloud.delete_image(snapshot)
    tiny_image.unlink()
    assert cloud.launch(str(target), launch_args=UNSTARTED).machine.state is State.PAUSED
    assert reports


def test_a_given_kernel_is_the_one_that_is_booted(
    cloud: Qemu, tiny_image: Path, tmp_path: Path
) -> None:
    kernel, initrd = tmp_path / "vmlinuz-1.0", tmp_path / "initrd.img-1.0"
    kernel.write_bytes(bytes(1024) + b"not a kernel")
    initrd.write_bytes(b"not an initrd")
    with pytest.raises(LaunchError) as raised:
        cloud.launch(str(tiny_image), kernel_cmdline="quiet", kernel_path=kernel)
    argv = raised.value.argv
    assert argv[argv.index("-kernel") + 1] == str(kernel)
    assert argv[argv.index("-initrd") + 1] == str(initrd)
    assert argv[argv.index("-append") + 1].startswith("quiet root=LABEL=")


def test_many_handles_leak_nothing(cloud: Qemu, unstarted: QemuInstance) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    cloud.get_instance(unstarted.id).machine.execute("query-name")
    before = descriptors()
    for _ in range(30):
        assert cloud.get_instance(unstarted.id).machine.state is State.RUNNING
    # What a handle held is let go of in the loop's thread; one more round trip waits for that.
    unstarted.machine.execute("query-name")
    assert descriptors() <= before + 3
    assert unstarted.machine.state is State.PAUSED


def test_many_launches_leak_nothing(cloud: Qemu, tiny_image: Path) -> None:
    def launch_and_delete() -> None:
        assert cloud.launch(str(tiny_image), launch_args=UNSTARTED).delete() == []

    def held() -> tuple[int, int]:
        # One that makes host keys for the next launches ends by itself.
        threads = [thread for thread in threading.enumerate() if thread.name != "host-keys"]
        return len(list(Path("/proc/self/fd").iterdir())), len(threads)

    launch_and_delete()
    before = held()
    for _ in range(20):
        launch_and_delete()
    after = held()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1]


def test_commands_from_many_threads_are_each_answered(unstarted: QemuInstance) -> None:
    def ask(number: int) -> str:
        command = ("query-name", "query-status")[number % 2]
        answer = unstarted.machine.execute(command)
        return str(answer["name"] if number % 2 == 0 else answer["status"])

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(80)))
    assert answers == [unstarted.name, "prelaunch"] * 40


def test_commands_of_many_threads_that_did_not_start_it_are_each_answered(
    cloud: Qemu, unstarted: QemuInstance
) -> None:
    other = cloud.get_instance(unstarted.id)
    together = threading.Barrier(32)

    def ask(_number: int) -> str:
        together.wait()
        return str(other.machine.execute("query-status")["status"])

    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(ask, range(32))) == ["prelaunch"] * 32


def _ask_often(directory: str, instance_id: str, answers: Any) -> None:
    config = f'[qemu]\nworking_dir = "{directory}"\naccelerator = "tcg"\n'
    other = Qemu("t", timestamp_suffix=False, config_file=io.StringIO(config))
    instance = other.get_instance(instance_id)
    answers.put([instance.machine.execute("query-status")["status"] for _ in range(10)])


def test_commands_of_many_processes_are_each_answered(cloud: Qemu, unstarted: QemuInstance) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    workers = [
        context.Process(target=_ask_often, args=(str(cloud.working_dir), unstarted.id, answers))
        for _ in range(6)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert [answers.get() for _ in workers] == [["prelaunch"] * 10] * 6


@contextlib.contextmanager
def holding(socket_file: Path) -> Iterator[None]:
    """Be connected to a machine's socket, as a program that does not leave."""
    with socket.socket(socket.AF_UNIX) as program, short_path(socket_file) as address:
        program.connect(address)
        yield


def test_a_program_that_holds_the_socket_is_named(cloud: Qemu, unstarted: QemuInstance) -> None:
    other = cloud.get_instance(unstarted.id)
    with holding(unstarted.machine.rundir.attach_socket):
        with pytest.raises(QmpError, match=r"within 0\.3 s") as caught:
            other.machine.execute("query-status", timeout=0.3)
        assert f"process {os.getpid()}" in str(caught.value)
    assert other.machine.execute("query-status")["status"] == "prelaunch"


def test_a_client_gets_its_turn_when_the_one_before_has_left(
    cloud: Qemu, unstarted: QemuInstance
) -> None:
    other = cloud.get_instance(unstarted.id)
    with ThreadPoolExecutor(8) as threads:
        with holding(unstarted.machine.rundir.attach_socket):
            asked = [threads.submit(other.machine.execute, "query-status") for _ in range(8)]
            with pytest.raises(TimeoutError):
                asked[0].result(0.3)
        assert [one.result(60)["status"] for one in asked] == ["prelaunch"] * 8


@pytest.mark.parametrize("wrong", [0, -1, "5", float("nan"), True])
def test_a_wrong_limit_of_a_qmp_command_is_refused(unstarted: QemuInstance, wrong: Any) -> None:
    with pytest.raises(ValueError, match="timeout is"):
        unstarted.machine.execute("query-status", timeout=wrong)


def test_more_clients_than_qemu_lets_wait_can_connect(unstarted: QemuInstance) -> None:
    rundir = unstarted.machine.rundir
    for file in (rundir.qmp_socket, rundir.attach_socket, rundir.helper_socket):
        with contextlib.ExitStack() as clients, short_path(file) as address:
            for _ in range(20):
                client = clients.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(address)
                client.getpeername()
    with contextlib.ExitStack() as clients:
        console = ("127.0.0.1", int(unstarted.telnet_port))
        for _ in range(20):
            clients.enter_context(socket.create_connection(console, 10))


def test_a_console_that_is_open_elsewhere_says_where(unstarted: QemuInstance) -> None:
    inside.wait_for_console(unstarted)
    with socket.create_connection(("127.0.0.1", int(unstarted.telnet_port))) as terminal:
        assert terminal.recv(1), "QEMU greets whom it serves"
        with pytest.raises(CloudError, match=rf"open elsewhere.*process {os.getpid()} "):
            inside.wait_for_console(unstarted, 0.3)
    inside.wait_for_console(unstarted)


def test_a_helper_whose_socket_others_hold_is_not_waited_for(
    unstarted: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSH does its work then; what it alone can do says who is in the way."""
    link, rundir = unstarted.guest.helper, unstarted.machine.rundir
    rundir.helper_mark.write_text("ubuntu")
    look = link.chardev
    # Nothing in this guest can open the port.
    monkeypatch.setattr(link, "chardev", lambda limit: {**look(limit), "frontend-open": True})
    with holding(rundir.helper_socket):
        seen = Deadline.after(60)
        while sockets.is_free(look(30)):
            assert not seen.expired
        assert link.execute(["true"], "ubuntu", b"", None) is None
        with pytest.raises(HelperError, match=f"process {os.getpid()} "):
            link.fix(FixUp(), 0.3)
    assert link.expected


def test_a_port_that_others_have_is_left_to_them(
    unstarted: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSH copies the file then."""
    link, port = unstarted.guest.helper, unstarted.guest.file_port("ubuntu")
    look = link.chardev
    monkeypatch.setattr(link, "chardev", lambda limit: {**look(limit), "frontend-open": True})
    monkeypatch.setattr(helper, "RESTORE_LIMIT", 0.1)
    with port.copying("read", "file") as stream:
        assert stream is None
    monkeypatch.undo()
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with link.free_port(Deadline.after(30)) as is_free:
            assert is_free
            held.set()
            over.wait(60)

    with ThreadPoolExecutor(1) as others:
        other = others.submit(hold)
        assert held.wait(60)
        with port.copying("read", "file") as stream:
            assert stream is None
        over.set()
        other.result()
    assert port.is_better(64 << 20)
    assert not port.is_better(1 << 20)


@pytest.fixture
def asked(unstarted: QemuInstance, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Give the machine a helper, and the requests to it.

    What was lent the port before does not answer the first one."""
    link, requests = unstarted.guest.helper, list[bytes]()

    def connect(_limit: Deadline) -> socket.socket:
        ours, theirs = socket.socketpair()

        def serve() -> None:
            with theirs, theirs.makefile("rwb") as file:
                requests.append(file.readline())
                if not unstarted.machine.rundir.lent_mark.exists() or len(requests) > 1:
                    number = json.loads(requests[-1])["id"]
                    file.write(json.dumps({"id": number, "now": 1, "exit": 0}).encode() + b"\n")
                    file.flush()
                file.readline()

        threading.Thread(target=serve, daemon=True).start()
        return ours

    free = {"frontend-open": True, "filename": "disconnected:unix"}
    monkeypatch.setattr(link, "chardev", lambda _limit: free)
    monkeypatch.setattr(link, "connect", connect)
    monkeypatch.setattr(helper, "RECOVER_LIMIT", 0.5)
    monkeypatch.setattr(helper, "RECOVER_PAUSE", 0)
    return requests


def test_a_helper_that_nobody_knew_of_is_used(unstarted: QemuInstance, asked: list[bytes]) -> None:
    link = unstarted.guest.helper
    assert not link.expected
    assert link.adopt("ubuntu")
    assert link.execute(["true"], "ubuntu", b"", 30) is not None
    assert [json.loads(line)["op"] for line in asked] == ["clock", "exec"]


def test_a_helper_that_has_lent_its_port_is_asked_first(
    unstarted: QemuInstance, asked: list[bytes]
) -> None:
    """What was lent the port reads a request, and does not answer it."""
    link, rundir = unstarted.guest.helper, unstarted.machine.rundir
    rundir.helper_mark.write_text("ubuntu")
    rundir.lent_mark.touch()
    assert link.execute(["true"], "ubuntu", b"", 30) is not None
    assert [json.loads(line)["op"] for line in asked] == ["clock", "clock", "exec"]
    assert not rundir.lent_mark.exists()


def test_a_caller_with_a_running_event_loop_can_use_it(cloud: Qemu, tiny_image: Path) -> None:
    async def work() -> str:
        instance = cloud.launch(str(tiny_image), launch_args=UNSTARTED)
        status = instance.machine.execute("query-status")["status"]
        assert instance.delete() == []
        return str(status)

    assert asyncio.run(work()) == "prelaunch"


def _use_and_delete(instance: QemuInstance, answers: multiprocessing.SimpleQueue[object]) -> None:
    answers.put(instance.machine.execute("query-status")["status"])
    answers.put([str(error) for error in instance.delete()])


def test_a_forked_worker_can_use_and_delete_it(unstarted: QemuInstance) -> None:
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.SimpleQueue[object] = context.SimpleQueue()
    worker = context.Process(target=_use_and_delete, args=(unstarted, answers))
    worker.start()
    worker.join(timeout=60)
    assert worker.exitcode == 0
    assert [answers.get(), answers.get()] == ["prelaunch", []]
    unstarted.wait_for_stop()
    assert processes_of(unstarted.instance_dir) == []


def test_clouds_of_one_tag_leave_each_others_things_alone(
    make_cloud: CloudMaker, tiny_image: Path
) -> None:
    ours, theirs = make_cloud("same"), make_cloud("same")
    assert ours.launch(str(tiny_image), launch_args=UNSTARTED).delete() == []
    snapshot = theirs.snapshot(theirs.launch(str(tiny_image), launch_args=UNSTARTED), clean=False)
    assert ours.clean() == []
    assert Path(snapshot).exists()
    theirs.launch(snapshot, launch_args=UNSTARTED)
    ours.launch(str(tiny_image), launch_args=UNSTARTED)


def test_deleting_an_image_that_is_not_there_changes_nothing(cloud: Qemu, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cloud.delete_image(str(empty / "missing.img"))
    cloud.delete_image("")
    assert empty.is_dir()


def test_another_id_in_the_same_directory_is_not_found(
    cloud: Qemu, unstarted: QemuInstance
) -> None:
    path = unstarted.instance_path
    for wrong in (f"{path}::1::2", f"{path.with_name('other.img')}::{unstarted.port}::1"):
        with pytest.raises(InstanceNotFoundError, match="is not the id"):
            cloud.get_instance(wrong)
    (unstarted.instance_dir / "login.json").write_text("{}")
    with pytest.raises(InstanceNotFoundError, match=r"login.json is damaged"):
        cloud.get_instance(unstarted.id)


def test_a_process_that_is_not_the_machines_own_is_left_alone(
    cloud: Qemu, unstarted: QemuInstance
) -> None:
    """The process file names another process, as after a reboot of the host."""
    instance_id, pid = unstarted.id, unstarted.machine.pid
    assert pid is not None
    me = ProcessIdentity.find(os.getpid())
    assert me is not None
    unstarted.machine.rundir.write_process(me)
    other = cloud.get_instance(instance_id)
    assert other.machine.state is State.OFF
    assert ProcessIdentity.find(pid) is not None


def test_another_handle_finds_out_that_a_machine_stands_still(
    cloud: Qemu, unstarted: QemuInstance
) -> None:
    other = cloud.get_instance(unstarted.id)

    def seen() -> State:
        other.machine.refresh()
        return other.machine.state

    assert other.diagnose().cause is Cause.STANDS_STILL
    assert seen() is State.PAUSED
    unstarted.machine.execute("cont")
    assert seen() is State.RUNNING
    unstarted.machine.kill()
    assert seen() is State.OFF


def test_status_is_told_in_one_word(cloud: Qemu, running: QemuInstance, tiny_image: Path) -> None:
    stopped = cloud.launch(str(tiny_image), launch_args=UNSTARTED)

    assert (running.get_status(), stopped.get_status()) == ("running", "paused")
    stopped.machine.kill()
    assert stopped.get_status() == "off"
    assert stopped.delete() == []
    with pytest.raises(InstanceNotFoundError, match="is deleted"):
        stopped.get_status()


def test_private_address_is_the_one_that_qemu_leads_ssh_to(unstarted: QemuInstance) -> None:
    told = unstarted.machine.execute("human-monitor-command", {"command-line": "info usernet"})

    assert re.search(rf"HOST_FORWARD.* {re.escape(unstarted.private_ip)} +22\b", str(told))


def test_child_forked_while_another_thread_uses_the_machine_can_use_it(
    unstarted: QemuInstance,
) -> None:
    """A lock that a thread holds at a fork would stay held in the child for ever."""
    machine = unstarted.machine
    machine.console.look()
    used, over = threading.Event(), threading.Event()

    def use() -> None:
        with holding_locks(machine) as number:
            assert number >= 3, "the machine's, its QEMU's and its console's"
            used.set()
            over.wait()

    user = threading.Thread(target=use)
    user.start()
    used.wait()
    try:
        child = os.fork()
        if child == 0:
            # The kernel ends it if it hangs.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            try:
                state = machine.state
                machine.console.look()
            finally:
                os._exit(0 if state is State.RUNNING else 1)
    finally:
        over.set()
        user.join()
    assert os.waitpid(child, 0)[1] == 0
