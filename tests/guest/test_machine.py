"""One machine, booted once: what commands, files and devices are like in it."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import paramiko
import pytest

from pycloudlib._base.deadline import Deadline
from pycloudlib.diagnosis import Cause
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest.boot.bootlines import Phase
from pycloudlib.key import KeyPair, generate_ed25519, generate_key_pair
from pycloudlib.progress import Progress
from pycloudlib.qemu.instance import QemuInstance
from tests.guest.repository import REPOSITORY
from tests.guest.seeds import CALLERS_KEY, Kind

pytestmark = [
    pytest.mark.guest,
    pytest.mark.uses(Kind.CLOUD_CONFIG),
]

MEGABYTES = 10_000_000


def test_devices_have_the_names_that_programs_rely_on(vm: QemuInstance) -> None:
    assert vm.execute("findmnt --noheadings --output SOURCE /").startswith("/dev/sda")
    assert vm.execute("lsblk --noheadings --nodeps --output LABEL /dev/vda") == "cidata"
    assert int(vm.execute("blockdev --getsize64 /dev/sda", use_sudo=True)) == 10 << 30
    assert "via 10.0.2.2" in vm.execute("ip route show default")


def test_the_root_file_system_has_grown_to_the_disk(vm: QemuInstance) -> None:
    assert int(vm.execute("df --output=size --block-size=1G / | tail -1")) >= 9


def test_cloud_init_ended_well(vm: QemuInstance) -> None:
    assert vm.execute("cat /var/lib/cloud/data/result.json | tr -d ' \\n'").endswith(
        '"errors":[]}}'
    )
    assert vm.execute("systemctl --failed --no-legend") == ""


def test_meta_data_of_the_caller_is_honoured(vm: QemuInstance) -> None:
    assert vm.execute("hostname") == "callers-name"
    keys = vm.execute("cat ~/.ssh/authorized_keys").splitlines()
    assert CALLERS_KEY in keys
    assert any(vm.key_pair.public_key_content.split()[1] in key for key in keys)


def test_vendor_data_of_the_caller_takes_effect_beside_ours(vm: QemuInstance) -> None:
    assert vm.execute("cat /var/tmp/vendor") == "vendor"


def test_the_host_keys_are_of_the_usual_types_and_pinned(vm: QemuInstance) -> None:
    made = vm.execute("cut -d' ' -f1,2 /etc/ssh/ssh_host_*_key.pub").splitlines()
    assert sorted(vm.machine.rundir.known_hosts.read_text().splitlines()) == sorted(made)
    assert {line.split()[0] for line in made} == {
        "ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa",
    }  # fmt: skip
    modes = vm.execute("stat -c '%a %U %n' /etc/ssh/ssh_host_*").splitlines()
    assert {mode.rpartition(".")[2] == "pub" for mode in modes} == {True, False}
    for mode in modes:
        assert mode.startswith("644 root" if mode.endswith(".pub") else "600 root"), mode
    said = vm.execute("journalctl -b --no-pager -t cloud-init", use_sudo=True)
    assert "Generating public/private" not in said, "they are not made in the guest"


def test_the_boot_has_a_timeline(vm: QemuInstance) -> None:
    phases = [start.phase for start in vm.boot_timeline]
    assert phases[0] is Phase.FIRMWARE
    assert {Phase.KERNEL, Phase.SYSTEMD, Phase.CLOUD_INIT_FINAL} <= set(phases)
    seconds = [start.seconds for start in vm.boot_timeline]
    assert seconds == sorted(seconds)


def test_the_console_log_tells_the_whole_boot(vm: QemuInstance) -> None:
    log = vm.console_log()
    assert log.index("SeaBIOS") < log.index("Linux version") < log.index("Cloud-init v.")


def test_a_text_is_run_by_a_shell_and_a_list_as_it_is(vm: QemuInstance) -> None:
    assert vm.execute("echo $((6 * 7))") == "42"
    assert vm.execute(["echo", "$((6 * 7))", "a  b"]) == "$((6 * 7)) a  b"


def test_a_result_has_all_parts_and_never_raises(vm: QemuInstance) -> None:
    result = vm.execute("printf 'out\\n\\n'; printf 'err\\n' >&2; exit 7")
    assert (result.stdout, result.stderr, result.return_code) == ("out", "err", 7)
    assert not result
    assert result.failed


def test_input_and_unicode_go_through(vm: QemuInstance) -> None:
    assert vm.execute("cat", stdin="grüße\n日本") == "grüße\n日本"
    assert vm.execute("wc -c", stdin=b"\0\xff") == "2"
    assert vm.execute("printf '\\377ok'") == "\N{REPLACEMENT CHARACTER}ok"


def test_sudo_and_terminals(vm: QemuInstance) -> None:
    assert vm.execute("id -un") == "ubuntu"
    assert vm.execute("id -un", use_sudo=True) == "root"
    assert vm.execute("tty").failed
    assert vm.execute("tty", get_pty=True).ok


def test_both_outputs_are_drained_whatever_their_size(vm: QemuInstance) -> None:
    fill = f"head -c {MEGABYTES} /dev/zero | tr '\\0' x"
    on_stderr = vm.execute(f"{fill} >&2; echo done", timeout=300)
    assert (on_stderr.stdout, len(on_stderr.stderr)) == ("done", MEGABYTES)
    on_stdout = vm.execute(f"{fill}; echo done >&2", timeout=300)
    assert (len(on_stdout.stdout), on_stdout.stderr) == (MEGABYTES, "done")


def test_a_command_that_takes_too_long_is_hung_up_on(vm: QemuInstance) -> None:
    with pytest.raises(PycloudlibTimeoutError, match=r"within 1 s.*sleep 600"):
        vm.execute("sleep 600", timeout=1)
    assert vm.execute("echo alive") == "alive"


def test_commands_whose_time_is_over_are_ended_and_leave_room(vm: QemuInstance) -> None:
    ways: list[dict[str, bool]] = [{}, {"use_sudo": True}, {"get_pty": True}]
    commands = ["sleep 611", "sleep 611", "trap '' HUP; sudo sleep 611; sudo sleep 611"]

    def take_too_long(number: int) -> None:
        with pytest.raises(PycloudlibTimeoutError, match="sleep 611"):
            vm.execute(commands[number % 3], timeout=10, **ways[number // 3 % 3])  # type: ignore[arg-type]

    with ThreadPoolExecutor(11) as threads:
        list(threads.map(take_too_long, range(11)))
    # A guest that is out of breath may take longer than the caller waited for.
    deadline = Deadline.after(120)
    while vm.execute(["pgrep", "-fx", "sleep 611"]).ok:
        assert not deadline.expired, "some of them run still"
        time.sleep(0.5)


def test_thirty_commands_at_once(vm: QemuInstance) -> None:
    with ThreadPoolExecutor(30) as threads:
        results = list(threads.map(lambda n: vm.execute(f"sleep 3; echo {n}"), range(30)))
    assert results == [str(n) for n in range(30)]


def test_what_cannot_be_copied_is_named_with_the_reason(vm: QemuInstance, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100_000))
    vm.execute(
        "mkdir -p full ro && mount -t tmpfs -o size=16k,mode=777 none full && "
        "mount -t tmpfs -o ro none ro && ln -sfn nowhere dangling",
        use_sudo=True,
    )
    for target, number in (
        ("/tmp", errno.EISDIR),
        ("full/x", errno.ENOSPC),
        ("ro/x", errno.EROFS),
        ("/root/x", errno.EACCES),
        ("dangling", errno.ENOENT),
        ("missing/x", errno.ENOENT),
    ):
        with pytest.raises(OSError, match=target) as caught:
            vm.push_file(file, target)
        assert (caught.value.errno, caught.value.filename) == (number, target)
    for source, number in (("/etc/shadow", errno.EACCES), ("/etc", errno.EISDIR)):
        with pytest.raises(OSError, match=source) as caught:
            vm.pull_file(source, file)
        assert (caught.value.errno, caught.value.filename) == (number, source)
    vm.execute("umount full ro; rm -r full ro dangling", use_sudo=True)
    vm.pull_file("/proc/version", file)
    assert "Linux version" in file.read_text()
    vm.push_file(file, "/dev/null")
    assert vm.execute("test -c /dev/null").ok


def test_a_script_runs_with_its_interpreter(vm: QemuInstance) -> None:
    assert vm.run_script("#!/usr/bin/env python3\nprint('it is', 6 * 7)") == "it is 42"
    failed = vm.run_script("echo text without a first line; exit 5")
    assert (failed.stdout, failed.return_code) == ("text without a first line", 5)
    assert vm.execute("ls /tmp/tmp.*").failed, "nothing is left in the guest"


def test_files_are_pushed_and_pulled_whole(vm: QemuInstance, tmp_path: Path) -> None:
    sent, received = tmp_path / "sent", tmp_path / "received"
    sent.write_bytes(bytes(range(256)) * 4096)
    vm.push_file(str(sent), "/var/tmp/pushed")
    vm.pull_file("/var/tmp/pushed", str(received))
    assert received.read_bytes() == sent.read_bytes()
    assert vm.execute("stat --format=%U /var/tmp/pushed") == "ubuntu"


def test_large_files_go_by_the_port_and_leave_nothing_running(
    vm: QemuInstance, tmp_path: Path
) -> None:
    """In emulation; with KVM by SSH, with the same outcome."""
    sent, received = tmp_path / "sent", tmp_path / "received"
    sent.write_bytes(os.urandom(8 << 20))

    def stop(report: Progress) -> None:
        if report.done is not None and report.done > 1 << 20:
            raise InterruptedError

    for _ in range(2):
        vm.push_file(sent, "large")
        vm.pull_file("large", received)
        assert received.read_bytes() == sent.read_bytes()
        with pytest.raises(InterruptedError):
            vm.push_file(sent, "cut", on_progress=stop)
        with pytest.raises(InterruptedError):
            vm.pull_file("large", tmp_path / "cut", on_progress=stop)
    assert not (tmp_path / "cut").exists()
    assert not vm.guest.helper.port_is_refused
    assert vm.execute("stat -c '%a %U' large") == f"644 {vm.username}"
    assert vm.execute("sleep 2; pgrep -f '[w]rite-regular|[r]ead /home'; rm large cut") == ""


def test_a_missing_file_is_named_and_what_was_there_stays(vm: QemuInstance, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("before")
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        vm.pull_file("/nowhere", str(kept))
    assert kept.read_text() == "before"
    assert list(tmp_path.iterdir()) == [kept]
    with pytest.raises(FileNotFoundError, match="absent"):
        vm.push_file(str(tmp_path / "absent"), "/var/tmp/x")
    with pytest.raises(FileNotFoundError, match="/nowhere/x"):
        vm.push_file(str(kept), "/nowhere/x")


def test_a_host_key_that_the_machine_does_not_show_itself_is_refused(vm: QemuInstance) -> None:
    """Another program hands its port on to the machine's, and so could read all that is said."""
    known_hosts = vm.machine.rundir.known_hosts
    right, port = known_hosts.read_text(), vm.port
    other = " ".join(generate_ed25519("somebody else")[1].split()[:2])
    with forwarding(int(port)) as false_port:
        for pinned in (other + "\n", ""):
            known_hosts.write_text(pinned)
            try:
                vm.port = str(false_port)
                vm._forget_client()
                with pytest.raises(paramiko.SSHException, match="host key") as caught:
                    vm.execute("true")
                assert caught.value.diagnosis.cause is Cause.HOST_KEY  # type: ignore[attr-defined]
                assert known_hosts.read_text() == pinned
            finally:
                vm.port = port
                known_hosts.write_text(right)
    vm._ssh_connect().close()


def test_a_host_key_that_the_machine_shows_itself_is_pinned(vm: QemuInstance) -> None:
    known_hosts = vm.machine.rundir.known_hosts
    right = known_hosts.read_text()
    other = " ".join(generate_ed25519("somebody else")[1].split()[:2])
    shown = right.splitlines()[0]
    try:
        for pinned in (other + "\n", ""):
            known_hosts.write_text(pinned)
            vm._ssh_connect().close()
            assert known_hosts.read_text().splitlines() == [shown]
    finally:
        known_hosts.write_text(right)


@contextlib.contextmanager
def forwarding(port: int) -> Iterator[int]:
    """Forward connections to a port, one after the other; give the port that leads there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    theirs, _ = listener.accept()
                except OSError:
                    return
                with theirs, socket.create_connection(("127.0.0.1", port)) as ours:
                    ends = {theirs: ours, ours: theirs}
                    open_ends = set(ends)
                    while open_ends:
                        for end in select.select(open_ends, (), ())[0]:
                            try:
                                data = end.recv(1 << 16)
                            except OSError:
                                data = b""
                            if not data:
                                open_ends.clear()
                                break
                            ends[end].sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(30)
            assert not thread.is_alive()


def test_a_key_that_the_guest_does_not_know_is_refused(vm: QemuInstance, tmp_path: Path) -> None:
    right = vm.key_pair
    wrong = generate_key_pair(tmp_path, "wrong")
    try:
        vm.key_pair = KeyPair(wrong.public_key_path, wrong.private_key_path)
        vm._forget_client()
        with pytest.raises(paramiko.AuthenticationException, match=str(tmp_path)) as caught:
            vm.execute("true")
        assert caught.value.diagnosis.cause is Cause.KEY_REFUSED  # type: ignore[attr-defined]
    finally:
        vm.key_pair = right


def test_a_lost_connection_is_made_anew(vm: QemuInstance) -> None:
    assert vm.execute("sudo pkill -x sshd -u $USER").return_code == -1
    assert vm.execute("echo again") == "again"


def test_several_commands_at_once(vm: QemuInstance) -> None:
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda n: vm.execute(f"sleep 0.2; echo {n}"), range(8)))
    assert results == [str(n) for n in range(8)]


def test_packages_are_installed_and_updated(vm: QemuInstance) -> None:
    prepared = vm.execute(REPOSITORY, use_sudo=True, description="making a package repository")
    assert prepared.ok, prepared.stderr
    installed = vm.install(["greeting"])
    assert installed.ok, installed.stderr
    assert vm.execute("greeting") == "greetings"
    updated = vm.update()
    assert updated.ok, updated.stderr


def test_a_machine_that_stands_still_ends_a_command_in_time(vm: QemuInstance) -> None:
    pid = vm.machine.pid
    assert pid is not None
    vm.execute("true")  # a connection is there
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises((PycloudlibTimeoutError, paramiko.SSHException)):
            vm.execute("true", timeout=2)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert vm.execute("echo goes on") == "goes on"


def test_the_boot_id_is_a_uuid(vm: QemuInstance) -> None:
    assert len(vm.get_boot_id().split("-")) == 5
