"""Measure commands and copies by SSH, in turn with OpenSSH's `scp`.

    python -m scripts.measure_transfer [--rounds 5] [--mib 64]
    python -m scripts.measure_transfer --port 2222 --user me --key ~/.ssh/id_ed25519

Without `--port` a machine is booted; with it, a server of this host is measured: it comes near to a
guest under KVM, and shows what this side can do at best.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pycloudlib import Qemu
from pycloudlib.guest.access import filecopy, ssh
from pycloudlib.guest.access.commands import run
from pycloudlib.guest.access.sessions import Connections
from scripts.figures import describe, timed

COMMANDS = 20
REMOTE = "/var/tmp/measure-transfer"  # noqa: S108 - in the guest


@contextmanager
def find_endpoint(arguments: argparse.Namespace) -> Iterator[ssh.Endpoint]:
    """Give the server that is named, or that of a machine."""
    if arguments.port:
        yield ssh.Endpoint("127.0.0.1", arguments.port, arguments.user, arguments.key)
        return
    with Qemu(tag="measure") as cloud, cloud.launch(cloud.build_image()) as machine:
        machine.wait()
        key = machine.key_pair.private_key_path
        yield ssh.Endpoint(machine.ip, int(machine.port), machine.username, key)


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


def measure(endpoint: ssh.Endpoint, directory: Path, mib: int, rounds: int) -> None:
    """Measure all ways in turn, and print."""
    there, back = str(directory / "there"), str(directory / "back")
    Path(there).write_bytes(os.urandom(mib << 20))
    remote = f"{endpoint.username}@{endpoint.host}:{REMOTE}"
    connect = functools.partial(ssh.connect, endpoint, None, banner_timeout=30)
    with closing(Connections(connect)) as connections:
        ways: dict[str, Callable[[], object]] = {
            "push, scp": lambda: scp(endpoint, there, remote),
            "push, ours": lambda: filecopy.push(connections, there, REMOTE),
            "pull, scp": lambda: scp(endpoint, remote, back),
            "pull, ours": lambda: filecopy.pull(connections, REMOTE, back),
            "connect": lambda: connect().close(),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        commands = []
        for _ in range(rounds):
            for name, way in ways.items():
                taken[name].append(timed(way))
            commands += [timed(lambda: run(connections, "true")) for _ in range(COMMANDS)]
        run(connections, f"rm {REMOTE}")
    for name, values in taken.items():
        print(f"{name}: {describe(values)}", flush=True)
    print(f"command: {describe(commands)}", flush=True)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=64, help="size of the file")
    parser.add_argument("--port", type=int, help="a server on the loopback, instead of a machine")
    parser.add_argument("--user", default=os.environ.get("USER", "root"))
    parser.add_argument("--key", help="private key for it")
    arguments = parser.parse_args()
    with (
        find_endpoint(arguments) as endpoint,
        tempfile.TemporaryDirectory() as name,
    ):
        measure(endpoint, Path(name), arguments.mib, arguments.rounds)


if __name__ == "__main__":
    main()
