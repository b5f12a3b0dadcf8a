"""Who a guest is, and what time it takes it to be."""

from __future__ import annotations

import time

from pycloudlib.qemu.instance import QemuInstance

KEYS = ("ed25519 key", "ECDSA key", "RSA key")
WHO = {
    "host name": "hostname",
    "machine-id": "cat /etc/machine-id",
    "instance-id": "cat /var/lib/cloud/data/instance-id",
    "ed25519 key": "cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub",
    "ECDSA key": "cut -d' ' -f1,2 /etc/ssh/ssh_host_ecdsa_key.pub",
    "RSA key": "cut -d' ' -f1,2 /etc/ssh/ssh_host_rsa_key.pub",
    "random bytes": "head -c 32 /dev/urandom | base64",
    "random UUID": "cat /proc/sys/kernel/random/uuid",
}


def who_is(vm: QemuInstance) -> dict[str, str]:
    commands = (f'echo "$({command})"' for command in WHO.values())
    result = vm.execute("; ".join(commands), use_sudo=True)
    assert result.ok, result.stderr
    return dict(zip(WHO, result.splitlines(), strict=True))


def clock_error(vm: QemuInstance) -> float:
    """Tell how wrong a guest's clock is at least, in seconds; what cannot be known is left out."""
    errors = []
    for _ in range(3):
        sent = time.time()
        guest = float(vm.execute("date +%s.%N"))
        came = time.time()
        errors.append(max(sent - guest, guest - came, 0.0))
    return min(errors)
