from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pycloudlib.errors import CloudError
from pycloudlib.qemu.host import resources
from pycloudlib.qemu.host.resources import PortLease, PortRegistry
from tests.portrange import claimed_ports

LEASE_IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from pycloudlib.qemu.host.resources import PortRegistry

first, last = map(int, sys.argv[1:3])
directory, *owners = map(Path, sys.argv[3:])
for owner in owners:
    lease = PortRegistry(directory, range(first, last + 1)).acquire(owner)
    print(lease.ssh, lease.telnet)
"""


@pytest.fixture
def registry(tmp_path: Path, claimed: range) -> PortRegistry:
    return PortRegistry(tmp_path / "registry" / "ports", claimed)


def make_owner(tmp_path: Path, name: str = "vm") -> Path:
    owner = tmp_path / name
    owner.mkdir()
    return owner


def ports_of(*leases: PortLease) -> list[int]:
    return [port for lease in leases for port in (lease.ssh, lease.telnet)]


@contextlib.contextmanager
def foreign_listener(port: int) -> Iterator[None]:
    with resources.listen(port):
        yield


def test_each_process_of_tests_claims_ports_of_its_own(claimed: range) -> None:
    with claimed_ports() as one, claimed_ports() as other:
        assert not set(claimed) & set(one)
        assert not set(one) & set(other)


def test_range_is_the_documented_one(tmp_path: Path) -> None:
    assert PortRegistry(tmp_path).ports == range(18000, 18101)


def test_two_ports_of_the_range_are_leased(
    registry: PortRegistry, tmp_path: Path, claimed: range
) -> None:
    lease = registry.acquire(make_owner(tmp_path))

    assert lease.ssh != lease.telnet
    assert all(port in claimed for port in ports_of(lease))


def test_leased_port_can_be_listened_on(registry: PortRegistry, tmp_path: Path) -> None:
    lease = registry.acquire(make_owner(tmp_path))

    for port in ports_of(lease):
        with resources.listen(port) as listener:
            assert listener.getsockname() == ("127.0.0.1", port)


def test_lease_holds_without_a_listener(registry: PortRegistry, tmp_path: Path) -> None:
    first = registry.acquire(make_owner(tmp_path, "one"))
    second = registry.acquire(make_owner(tmp_path, "two"))

    assert len(set(ports_of(first, second))) == 4


def test_leases_of_threads_differ(registry: PortRegistry, tmp_path: Path) -> None:
    owners = [make_owner(tmp_path, f"vm-{number}") for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        leases = list(pool.map(registry.acquire, owners))

    assert len(set(ports_of(*leases))) == 24


def test_leases_of_processes_differ(registry: PortRegistry, tmp_path: Path, claimed: range) -> None:
    owners = [make_owner(tmp_path, f"vm-{number}") for number in range(12)]
    command = [sys.executable, "-c", LEASE_IN_ANOTHER_PROCESS]
    command += [str(claimed[0]), str(claimed[-1]), str(registry.directory)]
    processes = [
        subprocess.Popen(
            [*command, *map(str, owners[first : first + 4])], stdout=subprocess.PIPE, text=True
        )
        for first in (0, 4, 8)
    ]
    outputs = [process.communicate(timeout=50)[0] for process in processes]

    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set("".join(outputs).split())) == 24


def test_released_ports_are_leased_again(registry: PortRegistry, tmp_path: Path) -> None:
    one, two = make_owner(tmp_path, "one"), make_owner(tmp_path, "two")
    lease = registry.acquire(one)

    registry.release(lease, one)

    assert registry.acquire(two) == lease


def test_lease_is_released_by_its_owner_alone(registry: PortRegistry, tmp_path: Path) -> None:
    one, two = make_owner(tmp_path, "one"), make_owner(tmp_path, "two")
    lease = registry.acquire(one)

    registry.release(lease, two)

    assert set(ports_of(registry.acquire(two))).isdisjoint(ports_of(lease))


def test_lease_is_released_twice_without_an_error(registry: PortRegistry, tmp_path: Path) -> None:
    owner = make_owner(tmp_path)
    lease = registry.acquire(owner)

    registry.release(lease, owner)
    registry.release(lease, owner)


def test_late_release_leaves_the_next_owners_lease(registry: PortRegistry, tmp_path: Path) -> None:
    one, two = make_owner(tmp_path, "one"), make_owner(tmp_path, "two")
    lease = registry.acquire(one)
    one.rmdir()
    assert registry.acquire(two) == lease

    registry.release(lease, one)

    third = registry.acquire(make_owner(tmp_path, "three"))
    assert set(ports_of(third)).isdisjoint(ports_of(lease))


def test_lease_of_a_vanished_directory_is_over(registry: PortRegistry, tmp_path: Path) -> None:
    gone = make_owner(tmp_path, "gone")
    lease = registry.acquire(gone)
    gone.rmdir()

    assert registry.acquire(make_owner(tmp_path, "next")) == lease


@pytest.mark.parametrize("content", ["", "\n", "relative", "\0"])
def test_damaged_lease_is_no_lease(content: str, registry: PortRegistry, tmp_path: Path) -> None:
    """A host that lost its power leaves an empty file; its port must not be lost for ever."""
    owner = make_owner(tmp_path, "one")
    lease = registry.acquire(owner)
    for port in ports_of(lease):
        (registry.directory / str(port)).write_text(content)

    assert registry.acquire(make_owner(tmp_path, "two")) == lease


@pytest.mark.parametrize("which", ["ssh", "telnet"])
def test_port_of_another_program_is_left_alone(
    which: str, registry: PortRegistry, tmp_path: Path
) -> None:
    owner = make_owner(tmp_path)
    lease = registry.acquire(owner)
    registry.release(lease, owner)
    taken = int(getattr(lease, which))

    with foreign_listener(taken):
        assert not resources.can_listen(taken)
        assert taken not in ports_of(registry.acquire(owner))

    assert resources.can_listen(taken)


def test_a_look_at_a_port_hinders_nobody_who_listens_there_meanwhile(
    registry: PortRegistry, claimed: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a machine of another registry does that is switched on at that moment."""
    listened: list[int] = []

    class Looking(socket.socket):
        def close(self) -> None:
            if not listened:
                listened.append(port := self.getsockname()[1])
                resources.listen(port).close()
            super().close()

    monkeypatch.setattr(resources, "make_socket", Looking)
    assert resources.can_listen(claimed[0])
    assert listened == [claimed[0]]


def test_range_that_is_used_up_is_an_error(
    registry: PortRegistry, tmp_path: Path, claimed: range
) -> None:
    leases = []
    with pytest.raises(CloudError, match=str(claimed[0])) as caught:  # noqa: PT012 - until it is full
        for number in range(51):
            leases.append(registry.acquire(make_owner(tmp_path, f"vm-{number}")))

    assert str(claimed[-1]) in str(caught.value)
    assert len(set(ports_of(*leases))) == 2 * len(leases)
    (tmp_path / "vm-0").rmdir()
    assert registry.acquire(make_owner(tmp_path, "next")) == leases[0]


def test_other_users_cannot_look_into_the_registry(registry: PortRegistry, tmp_path: Path) -> None:
    registry.acquire(make_owner(tmp_path))

    assert registry.directory.stat().st_mode & 0o077 == 0
