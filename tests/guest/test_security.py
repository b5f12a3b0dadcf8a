"""What is defended, seen from outside, while real guests run."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.guest.conftest import Guest
from tests.guest.lookout import Lookout
from tests.guest.seeds import Kind

pytestmark = [pytest.mark.guest, pytest.mark.uses(Kind.FAST)]


def test_machines_listen_on_loopback_alone_and_keep_their_files(
    guests: dict[Kind, Future[Guest]], lookout: Lookout
) -> None:
    """All other tests are looked at, too, to the end of the run."""
    vm = guests[Kind.FAST].result().machine
    lookout.look()
    assert lookout.listeners >= 2, "SSH and the console"
    assert lookout.files > 10
    assert lookout.found == set()
    assert vm.machine.pid is not None
    status = Path(f"/proc/{vm.machine.pid}/status").read_text()
    assert "Seccomp:\t2\n" in status, "QEMU is in its sandbox"
    assert "NoNewPrivs:\t1\n" in status


LISTENER = """
import socket, sys, time
listener = socket.socket()
listener.bind((sys.argv[1], 0))
listener.listen()
print("listening", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("address", "wrong"),
    [("127.0.0.1", False), ("0.0.0.0", True)],
)
def test_lookout_sees_what_it_looks_for(address: str, wrong: bool, tmp_path: Path) -> None:
    (tmp_path / "private").touch(mode=0o600)
    command = [sys.executable, "-c", LISTENER, address, f"{tmp_path}/machine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
            looking = Lookout(tmp_path)
            looking.look()
        finally:
            process.kill()
    assert looking.listeners == 1
    assert any(f"listens on {address}" in found for found in looking.found) is wrong
    assert len(looking.found) == wrong
    (tmp_path / "private").chmod(0o640)
    looking.look()
    assert any("private can be read by others" in found for found in looking.found)
