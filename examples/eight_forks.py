"""Prepare a machine once, then run eight tests in eight copies, which continue from there.

python examples/eight_forks.py [IMAGE]
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from pycloudlib import Qemu
from pycloudlib.qemu.instance import QemuInstance

# Each breaks the machine for the others.
TESTS = {
    "no hosts file": "rm /etc/hosts && ! grep -q . /etc/hosts",
    "full disk": "fallocate -l $(df --output=avail -B1 / | tail -1) /big && df / | grep -q 100%",
    "no user": "userdel --force ubuntu && ! id ubuntu",
    "other name": "hostnamectl hostname other && test $(hostname) = other",
    "wrong clock": "date --set '2040-01-01' && test $(date +%Y) = 2040",
    "read-only": "mount -o bind,ro /etc /etc && ! touch /etc/mark",
    "no loopback": "ip link set lo down && ip -o link show lo | grep -q 'state DOWN'",
    "no logging": "systemctl stop systemd-journald.socket systemd-journald-dev-log.socket "
    "systemd-journald && ! systemctl is-active --quiet systemd-journald",
}


def run(name: str, machine: QemuInstance) -> str:
    """Run one test in a machine, and delete the machine."""
    with machine:
        result = machine.execute(["sh", "-c", TESTS[name]], use_sudo=True)
    return (
        f"{'passed' if result.ok else 'FAILED'}  {name}  {result.stderr if result.failed else ''}"
    )


def main() -> int:
    """Launch, prepare, fork, test."""
    with Qemu(tag="eight-forks") as cloud:
        image = sys.argv[1] if len(sys.argv) > 1 else cloud.build_image("bookworm")
        with cloud.launch(image, fast_boot=True) as machine:
            machine.wait()
            machine.execute("touch /var/tmp/prepared")
            started = time.monotonic()
            forks = machine.fork(len(TESTS))
            print(f"{len(forks)} copies run after {time.monotonic() - started:.2f} s")
            with ThreadPoolExecutor(len(forks)) as threads:
                results = list(threads.map(run, TESTS, forks))
    print("\n".join(results))
    return int(any(result.startswith("FAILED") for result in results))


if __name__ == "__main__":
    sys.exit(main())
