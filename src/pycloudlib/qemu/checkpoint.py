"""Saving a machine while it runs: its disk, its memory and its state, all of one moment."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from pycloudlib.deadline import Deadline
from pycloudlib.descriptors import moved
from pycloudlib.errors import CloudError
from pycloudlib.files import copy_private
from pycloudlib.images import uses
from pycloudlib.key import bring_along
from pycloudlib.qemu import layers, savedmachine
from pycloudlib.qemu.handover import hand_over
from pycloudlib.qemu.hotplug import list_plugged
from pycloudlib.qemu.identity import find_proc_directory
from pycloudlib.qemu.keptmemory import check_machine
from pycloudlib.qemu.machine import Machine, State, uninterrupted
from pycloudlib.qemu.memory import BACKEND, SHARED, Memory, find_shared_memory, keep
from pycloudlib.qemu.ownership import disown
from pycloudlib.qemu.qmp import QmpSession
from pycloudlib.qemu.rundir import RunDirectory
from pycloudlib.qemu.savedmachine import SavedMachine

_log = logging.getLogger(__name__)

_MERGE_LIMIT = 600.0


def save(machine: Machine, image_name: str, *, helper: bool) -> SavedMachine:
    """Save a running machine; it goes on.

    Args:
        machine: The machine.
        image_name: The name of the image's file, without its directory.
        helper: Whether the helper runs in it.

    Raises:
        MachineEndedError: It is off.
        KeptMemoryError: It has a device that would change the memory of its copies.
        CloudError: It could not be saved, and goes on; says why.
    """
    store = layers.LayerStore(machine.rundir.path.parent)
    with _changing(machine):
        _merge_layers(machine)
    memory = _open_shared_memory(machine)
    try:
        with contextlib.ExitStack() as undo:

            def freeze() -> tuple[Path, float | None]:
                with (
                    _changing(machine),
                    store.freezing(machine.rundir.disk, image_name, in_use=True) as image,
                    savedmachine.new_directory(savedmachine.directory_of(image)) as directory,
                ):
                    shared = Memory(file=find_proc_directory(os.getpid()) / "fd" / str(memory))
                    pause = hand_over(machine, shared, kept_state=directory / "state")
                # From here on the machine's old disk is a layer that it is built on.
                undo.callback(disown, image)
                undo.callback(uses.forget, image)
                undo.callback(image.unlink)
                undo.callback(shutil.rmtree, directory)
                return image, pause

            image, pause = uninterrupted(freeze)
            keep(memory, savedmachine.directory_of(image) / "memory", release=True)
            saved = _write(_describe(machine, image, helper), machine.rundir)
            # By now it is known which kernel it needs.
            layers.record_uses(image)
            store.complete(image, machine.rundir.path)
            undo.pop_all()
    finally:
        os.close(memory)
    stood = "" if pause is None else f"; the guest stood still for {pause * 1000:.0f} ms"
    _log.info("Saved %s as %s%s", machine.spec.name, image, stood)
    return saved


@contextlib.contextmanager
def _changing(machine: Machine) -> Iterator[None]:
    """Keep others from changing a machine that can be saved."""
    with machine.changing():
        _check_can_be_saved(machine)
        yield


def _check_can_be_saved(machine: Machine) -> None:
    machine.check_on()
    if machine.state is not State.RUNNING:
        raise CloudError(
            f"{machine.spec.name} is {machine.state.value}; it can be saved when it runs"
        )
    with machine.session() as session:
        check_machine(machine.spec.name, session)
    plugged = list_plugged(machine)
    if plugged:
        raise CloudError(
            f"{machine.spec.name} cannot be saved while network interfaces are plugged in "
            f"({', '.join(plugged)}): remove_network_interface() first"
        )


def _merge_layers(machine: Machine) -> None:
    """Take the layers below a running machine's disk into it when they have become many."""
    lowest = layers.too_deep(machine.rundir.disk)
    if lowest is None:
        return
    deadline = Deadline.after(_MERGE_LIMIT)
    qemu = machine.qemu()
    job = f"merge-{time.monotonic_ns()}"
    with qemu.session() as session:
        session.execute(
            "block-stream", {"job-id": job, "device": "root", "base-node": _name_lowest(session)}
        )
        event = qemu.wait_for_event(
            lambda event: event.name == "BLOCK_JOB_COMPLETED" and event.data["device"] == job,
            deadline,
        )
    if "error" in event.data:
        raise CloudError(f"{machine.spec.name}: merging its layers failed: {event.data['error']}")


def _name_lowest(session: QmpSession) -> str:
    """Give QEMU's name of the lowest file of a machine's disk.

    Not the file's own: that is a path, which need not be text, and QMP takes nothing else.
    """
    (root,) = (block for block in session.execute("query-block") if block["device"] == "root")
    image = root["inserted"]["image"]
    while "backing-image" in image:
        image = image["backing-image"]
    # In both answers QEMU shows the path alike.
    nodes = session.execute("query-named-block-nodes", {"flat": True})
    names = [
        node["node-name"]
        for node in nodes
        if node["file"] == image["filename"] and node["drv"] != "file"
    ]
    return str(names[0])


def _open_shared_memory(machine: Machine) -> int:
    """Open the machine's memory; it is moved into shared memory first if it is elsewhere."""
    if not _has_shared_memory(machine):
        pause = uninterrupted(lambda: _move_memory(machine))
        _log.info(
            "Moved %s into memory that can be saved; the guest stood still for %.0f ms",
            machine.spec.name,
            (pause or 0) * 1000,
        )
    return moved(os.open(find_memory(machine), os.O_RDWR | os.O_CLOEXEC))


def _move_memory(machine: Machine) -> float | None:
    with _changing(machine):
        return hand_over(machine, SHARED)


def find_memory(machine: Machine) -> Path:
    """Find the file of a machine's shared memory; its path is good as long as its QEMU lives.

    Raises:
        MachineEndedError: It is off.
        CloudError: Its memory is of another kind.
    """
    pid = machine.pid
    file = None if pid is None else find_shared_memory(pid)
    if file is None:
        machine.check_on()
        raise CloudError(f"The memory of {machine.spec.name} cannot be found")
    return file


def _has_shared_memory(machine: Machine) -> bool:
    return any(
        device["id"] == BACKEND and device.get("share")
        for device in machine.execute("query-memdev")
    )


def _describe(machine: Machine, image: Path, helper: bool) -> SavedMachine:
    host = savedmachine.host_fingerprint(machine.binary, machine.spec.accelerator)
    return SavedMachine(image, machine.spec, machine.rundir.read_login(), host, helper, time.time())


def _write(saved: SavedMachine, rundir: RunDirectory) -> SavedMachine:
    """Put beside the memory what goes with it."""
    for source, target in (
        (rundir.seed, saved.seed),
        (rundir.known_hosts, saved.known_hosts),
    ):
        if source.exists():
            copy_private(source, target)
    login = saved.login
    for key in (login.public_key_path, login.private_key_path):
        bring_along(key, rundir.path, saved.directory)
    return savedmachine.write_facts(
        saved, savedmachine.relocate(saved, saved.directory, saved.directory)
    )
