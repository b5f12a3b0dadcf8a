"""What the tests of saved machines share: machines that run, and looks at them from outside."""

from __future__ import annotations

import itertools
import os
import socket
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from pycloudlib import Qemu
from pycloudlib._base.deadline import Deadline
from pycloudlib.guest.access.hostkeys import HostKeyPool
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.host.processes import ProcessIdentity
from pycloudlib.qemu.host.resources import PortRegistry
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching.beginning import Host
from pycloudlib.qemu.saved import checkpoint
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import make_name
from pycloudlib.qemu.vm.running import State

SMALL = "c1m64"
"""A size whose memory is copied in no time."""


_clouds: weakref.WeakSet[Qemu] = weakref.WeakSet()


def track(cloud: Qemu) -> Qemu:
    """Let `save` find the cloud that is to delete what it saves."""
    _clouds.add(cloud)
    return cloud


def run(cloud: Qemu, image: Path) -> QemuInstance:
    """Start a machine whose guest halts at once, and has nothing that could be reached."""
    return hurry(track(cloud).launch(str(image), SMALL))


def hurry(instance: QemuInstance) -> QemuInstance:
    """Let nobody wait for an SSH server that will never be there."""
    instance.banner_timeout = 0.2
    return instance


def save(
    instance: QemuInstance, name: str = "", *, pause_limit: float = checkpoint.PAUSE_LIMIT
) -> SavedMachine:
    """Save a machine, without looking for a helper first; its cloud cleans up."""
    file_name = f"{name or make_name(instance.name)}.img"
    saved = checkpoint.save(instance.machine, file_name, ask_helper=None, pause_limit=pause_limit)
    owner = next(cloud for cloud in _clouds if cloud.parent_dir == instance.instance_dir.parent)
    owner.created_images.append(str(saved.image))
    return saved


def host_of(cloud: Qemu) -> Host:
    """Return what the machines of a cloud run on, in emulation."""
    state = cloud.settings.state_dir
    ports, host_keys = PortRegistry(state / "ports"), HostKeyPool(state / "host-keys")
    return Host(Path(cloud.qemu_binary), Accelerator.TCG, ports, host_keys)


def qemus(directory: Path) -> list[int]:
    """List the QEMUs that have a directory on their command line, by the kernel's own word."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # A comma in a path is written twice in QEMU's options.
            command = (process / "cmdline").read_bytes().replace(b",,", b",")
        except OSError:
            continue
        pid = int(process.name)
        if os.fsencode(directory) + b"/" in command and b"-accel" in command and alive(pid):
            found.append(pid)
    return found


def alive(pid: int | None) -> bool:
    assert pid is not None
    return ProcessIdentity.find(pid) is not None


def becomes(true: Callable[[], bool], limit: float = 20) -> bool:
    """Wait until something is so, where nothing tells of it; say whether it became so."""
    deadline = Deadline.after(limit)
    while not true():
        if deadline.expired:
            return False
        time.sleep(0.02)
    return True


def accepts(port: str) -> bool:
    """Say whether somebody listens on a local port."""
    with socket.socket() as client:
        client.settimeout(10)
        return client.connect_ex(("127.0.0.1", int(port))) == 0


def runs(instance: QemuInstance) -> bool:
    """Say whether a machine runs, is one process, and has its ports."""
    status = instance.machine.execute("query-status")["status"]
    return (
        instance.machine.state is State.RUNNING
        and status == "running"
        and qemus(instance.instance_dir) == [instance.machine.pid]
        and accepts(instance.port)
        and accepts(instance.telnet_port)
    )


def pauses(instance: QemuInstance) -> list[float]:
    """List how long a machine was paused, each time, by QEMU's own word, in seconds."""
    events = [event for event in instance.machine.events if event.name in ("STOP", "RESUME")]
    return [
        later.timestamp - earlier.timestamp
        for earlier, later in itertools.pairwise(events)
        if earlier.name == "STOP"
    ]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def touch(path: Path) -> None:
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000))
