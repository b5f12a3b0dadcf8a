"""Commands and copies by SSH, in turn with OpenSSH's `scp`.

Without a port a machine boots; with it, an SSH server of this host is measured: it comes near to a
guest under KVM, and shows what this side can do at best.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import paramiko

from benchmarks.worker import Bench
from pycloudlib._base.deadline import Deadline
from pycloudlib.guest.access import filecopy, ssh
from pycloudlib.guest.access.commands import run as execute
from pycloudlib.guest.access.portstream import FilePort
from pycloudlib.guest.access.sessions import Connections

COMMANDS = 20
REMOTE = "/var/tmp/measure-transfer"  # noqa: S108 - in the guest


def run(bench: Bench) -> None:
    """Measure all ways in turn."""
    there, back = (str(Path(bench.plan.scratch, name)) for name in ("there", "back"))
    Path(there).write_bytes(os.urandom(bench.plan.mib << 20))
    with find_endpoint(bench) as (endpoint, port):
        remote = f"{endpoint.username}@{endpoint.host}:{REMOTE}"

        def connect(deadline: Deadline | None = None) -> paramiko.SSHClient:
            return ssh.connect(endpoint, None, banner_timeout=30, deadline=deadline)

        with closing(Connections(connect)) as connections:
            ways: dict[str, Callable[[], object]] = {
                "scp-push": lambda: scp(endpoint, there, remote),
                "own-push": lambda: filecopy.push(connections, there, REMOTE, port=port),
                "scp-pull": lambda: scp(endpoint, remote, back),
                "own-pull": lambda: filecopy.pull(connections, REMOTE, back, port=port),
                "connect": lambda: connect().close(),
            }
            bench.recorder.take_turns(ways, bench.plan.rounds)
            command = {"command": lambda: execute(connections, "true")}
            bench.recorder.take_turns(command, bench.plan.rounds * COMMANDS)
            execute(connections, f"rm {REMOTE}")


@contextmanager
def find_endpoint(bench: Bench) -> Iterator[tuple[ssh.Endpoint, FilePort | None]]:
    """Return the server that the plan names, or that of a machine with what files go by."""
    plan = bench.plan
    if plan.port:
        yield ssh.Endpoint("127.0.0.1", plan.port, plan.user, plan.key or None), None
        return
    with bench.boot() as machine:
        key = machine.key_pair.private_key_path
        endpoint = ssh.Endpoint(machine.ip, int(machine.port), machine.username, key)
        yield endpoint, machine._file_port()


def scp(endpoint: ssh.Endpoint, *paths: str) -> None:
    """Copy as OpenSSH does; nothing is remembered of the host's key."""
    # fmt: off
    argv = [
        "scp", "-q", "-B", "-F", "none",
        "-P", str(endpoint.port), "-i", str(endpoint.private_key_path),
        "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", *paths,
    ]
    # fmt: on
    subprocess.run(argv, check=True)
