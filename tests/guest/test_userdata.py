"""User-data of every kind takes effect, and SSH works with each."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import paramiko
import pytest

from pycloudlib.errors import PycloudlibTimeoutError
from tests.guest.conftest import Guest
from tests.guest.seeds import EVERY_TIME, OWN_HOST_KEY, SEEDS, THOROUGH, Kind

pytestmark = pytest.mark.guest


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(kind, marks=pytest.mark.uses(kind)) for kind in EVERY_TIME),
        Kind.NONE,
        *(pytest.param(kind, marks=pytest.mark.thorough) for kind in THOROUGH),
    ],
    ids=lambda kind: kind.value,
)
def test_user_data_takes_effect_untouched(kind: Kind, guests: dict[Kind, Future[Guest]]) -> None:
    vm = guests[kind].result().machine
    command, expected = SEEDS[kind].proof
    assert vm.execute(command) == expected
    given = SEEDS[kind].user_data
    content = given.encode() if isinstance(given, str) else given or b""
    # cloud-init keeps what it read, byte for byte, but for compression.
    digest = vm.execute("md5sum </var/lib/cloud/instance/user-data.txt", use_sudo=True)
    assert digest.split()[0] == _md5(content)


@pytest.mark.uses(*EVERY_TIME)
def test_many_machines_launched_together_all_come_up(
    guests: dict[Kind, Future[Guest]],
) -> None:
    machines = [guests[kind].result().machine for kind in EVERY_TIME]
    ports = {port for machine in machines for port in (machine.port, machine.telnet_port)}
    assert len(ports) == 2 * len(machines)
    with ThreadPoolExecutor(8) as threads:
        ids = list(threads.map(lambda machine: machine.execute("cat /etc/machine-id"), machines))
    assert len(set(ids)) == len(machines)


@pytest.mark.uses(Kind.GZIP)
def test_a_host_key_in_user_data_wins_and_is_pinned(
    guests: dict[Kind, Future[Guest]],
) -> None:
    vm = guests[Kind.GZIP].result().machine
    shown = " ".join(OWN_HOST_KEY[1].split()[:2])
    assert vm.machine.rundir.known_hosts.read_text().splitlines() == [shown]


@pytest.mark.uses(Kind.MULTIPART)
def test_user_data_decides_of_which_types_the_guest_makes_its_host_keys(
    guests: dict[Kind, Future[Guest]],
) -> None:
    vm = guests[Kind.MULTIPART].result().machine
    assert vm.execute("ls /etc/ssh/ssh_host_*").splitlines() == [
        "/etc/ssh/ssh_host_ecdsa_key",
        "/etc/ssh/ssh_host_ecdsa_key.pub",
    ]
    made = vm.execute("cut -d' ' -f1,2 /etc/ssh/ssh_host_ecdsa_key.pub")
    assert vm.machine.rundir.known_hosts.read_text().splitlines() == [made]


@pytest.mark.uses(Kind.SCRIPT, Kind.FAST)
def test_a_failure_of_cloud_init_is_logged_and_success_is_not(
    guests: dict[Kind, Future[Guest]],
) -> None:
    failed = guests[Kind.SCRIPT].result().warnings
    assert any("cloud-init failed" in text and "scripts" in text for text in failed), failed
    assert guests[Kind.FAST].result().warnings == []


@pytest.mark.uses(Kind.SCRIPT, Kind.GZIP)
def test_machines_have_identities_of_their_own(guests: dict[Kind, Future[Guest]]) -> None:
    one, other = (guests[kind].result().machine for kind in (Kind.SCRIPT, Kind.GZIP))
    for command in (
        "cat /var/lib/cloud/data/instance-id",
        "cat /etc/machine-id",
        "cat /etc/ssh/ssh_host_ed25519_key.pub",
        "hostname",
    ):
        ours, theirs = (vm.execute(command, use_sudo=True) for vm in (one, other))
        assert ours.ok
        assert ours != theirs, command
    assert one.execute("hostname") == one.name


@pytest.mark.uses(Kind.GZIP)
def test_a_qemu_that_is_killed_ends_a_command_with_the_cause(
    guests: dict[Kind, Future[Guest]],
) -> None:
    vm = guests[Kind.GZIP].result().machine
    pid = vm.machine.pid
    assert pid is not None
    vm.execute("true")
    killer = threading.Timer(1.0, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(paramiko.SSHException, match="SIGKILL"):
        vm.execute("sleep 600")
    with pytest.raises(PycloudlibTimeoutError, match="SIGKILL"):
        vm.wait(ready_timeout=1)


def _md5(content: bytes) -> str:
    import hashlib  # noqa: PLC0415

    return hashlib.md5(content).hexdigest()
