"""Saves a machine while it runs: its disk, its memory and its state, all of one moment.

The machine is read where it is, and continues in the same process. What takes long is done while it
runs; the guest is paused only for what has changed meanwhile.

    guest    runs ──────────────────────────────┤ is paused ├ runs ────────────▶
    memory   copied ──────────────────────▶ what has changed
    disk     the next overlay is opened ──────────▶ switched
    state    that of a machine like it, once ───────▶ read ────▶ composed
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import copy_private
from pycloudlib._base.tools import uninterrupted
from pycloudlib.errors import CloudError, PycloudlibTimeoutError
from pycloudlib.images import store, uses
from pycloudlib.key import copy_kept_file
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import make_name
from pycloudlib.qemu.vm import livedisk
from pycloudlib.qemu.vm.guest import Guest
from pycloudlib.qemu.vm.hotplug import list_added, list_plugged
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.memory import check_machine
from pycloudlib.qemu.vm.qmp import Event, QmpError, QmpSession
from pycloudlib.qemu.vm.running import NEEDED_SPACE, MachineEndedError, RunningQemu, State

if TYPE_CHECKING:
    from pycloudlib.qemu.saved.capture import Capture

_log = logging.getLogger(__name__)

# Seconds after which a paused guest is resumed, whatever else has happened; and for each GiB of its
# memory, which may all have to be copied.
PAUSE_LIMIT = 60.0
_PAUSE_LIMIT_OF_GIB = 10.0
_EVENT_LIMIT = 5.0


def save(
    machine: Machine,
    image_name: str,
    *,
    ask_helper: Callable[[], bool] | None,
    pause_limit: float = PAUSE_LIMIT,
) -> SavedMachine:
    """Save a running machine, which then continues.

    Args:
        machine: The machine.
        image_name: The name of the image's file, without its directory.
        ask_helper: Has the helper in its guest prepare for the pause, and returns whether it did;
            None where there is none.
        pause_limit: Seconds for which it may be paused, and some more for each GiB of memory.

    Raises:
        MachineEndedError: It is off.
        KeptMemoryError: It has a device that would change the memory of its copies.
        CloudError: It could not be saved, and continues; says why.
    """
    from pycloudlib.qemu.saved import capture  # noqa: PLC0415 - for saves alone

    store = layers.LayerStore(machine.rundir.path.parent)
    limit = pause_limit + _PAUSE_LIMIT_OF_GIB * machine.spec.instance_type.memory_mib / 1024
    with machine.changing(), contextlib.ExitStack() as undo:
        _check_can_be_saved(machine)
        qemu = machine.qemu()
        for disk in machine.spec.own_disks:
            livedisk.merge_layers(qemu, disk.device, disk.beside(machine.rundir.disk))
        image = store.reserve(image_name, undo)
        with savedmachine.new_directory(savedmachine.directory_of(image)) as directory:
            with capture.choose(machine, directory) as reading:
                helper = uninterrupted(lambda: _prepare(reading, ask_helper))
                check_space(directory)
                pause = uninterrupted(lambda: _freeze(machine, image, reading, undo, limit))
                uninterrupted(reading.finish)
            saved = _write(_describe(machine, image, helper), machine.rundir)
            # The saved facts say which kernel it needs.
            layers.record_uses(image)
            store.complete(image, machine.rundir.path)
        undo.pop_all()
    took = "" if pause is None else f"; the guest was paused for {pause * 1000:.0f} ms"
    _log.info("Saved %s as %s, its memory read %s%s", machine.spec.name, image, reading.way, took)
    return saved


def _prepare(reading: Capture, ask_helper: Callable[[], bool] | None) -> bool:
    """Do what can be done while the guest runs; return whether its helper does."""
    if ask_helper is None:
        reading.prepare()
        return False
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ask_helper)
        reading.prepare()
        return asked.result()


def _freeze(
    machine: Machine, image: Path, reading: Capture, undo: contextlib.ExitStack, limit: float
) -> float | None:
    """Pause the guest and save that moment; return the seconds of the pause, if known."""
    rundir, qemu = machine.rundir, machine.qemu()
    store = layers.LayerStore(rundir.path.parent)
    seen = qemu.events
    disks = machine.spec.own_disks
    images = {disk.beside(rundir.disk): disk.kept_beside(image) for disk in disks}
    with store.freezing(images, in_use=True) as frozen, qemu.session() as session:
        _check_runs(machine, session)
        fresh = [(disk, layer.fresh) for disk, layer in zip(disks, frozen, strict=True)]
        # So that the next program resumes the machine, if this one is killed.
        rundir.write_saving({disk.suffix: file for disk, file in fresh})
        by_device = {disk.device: file for disk, file in fresh}
        try:
            with (
                livedisk.switching(session, by_device) as switch_disks,
                paused(machine, session, limit),
            ):
                reading.read_memory()
                switch_disks()
                for layer in frozen:
                    layer.exchange()
                reading.read_state()
            session.take_back_all()
        except BaseException:
            livedisk.recover(rundir, session)
            raise
        rundir.forget_saving()
        pause = measure_pause(qemu, seen)
        machine.paused_by_saves += pause or 0.0
    undo.callback(uses.forget, image)
    for file in images.values():
        undo.callback(file.unlink)
    return pause


@contextlib.contextmanager
def paused(machine: Machine, session: QmpSession, limit: float) -> Iterator[None]:
    """Pause the guest in the block; it is resumed whatever happens.

    Raises:
        CloudError: The block took too long: the guest was resumed before its end.
    """
    too_late = threading.Event()

    def give_up() -> None:
        too_late.set()
        _resume(machine, session)

    timer = threading.Timer(limit, give_up)
    timer.daemon = True
    try:
        timer.start()
        session.execute("stop")
        yield
        timer.cancel()
        session.execute("cont")
    except BaseException:
        timer.cancel()
        _resume(machine, session)
        raise
    if too_late.is_set():
        raise CloudError(f"{machine.spec.name} was paused for {limit:.0f} s, and continues unsaved")


def _resume(machine: Machine, session: QmpSession) -> None:
    """Resume the guest after an error, which is raised: an error of this is only logged."""
    try:
        session.execute("cont")
    except (QmpError, MachineEndedError) as error:
        _log.error("%s cannot be resumed: %s", machine.spec.name, error)


def measure_pause(qemu: RunningQemu, seen: tuple[Event, ...]) -> float | None:
    """Return how long the guest was paused, by QEMU's own timestamps."""

    def is_resume(event: Event) -> bool:
        return event.name == "RESUME" and event not in seen

    with contextlib.suppress(PycloudlibTimeoutError):
        resumed = qemu.wait_for_event(is_resume, Deadline.after(_EVENT_LIMIT))
        stops = [event for event in qemu.events if event.name == "STOP" and event not in seen]
        return resumed.timestamp - stops[0].timestamp if stops else None
    return None


def check_space(directory: Path) -> None:
    """Make sure, before the guest is paused, that there is space for what it changes meanwhile."""
    free = shutil.disk_usage(directory).free
    if free < NEEDED_SPACE:
        raise CloudError(
            f"No space for a saved machine in {directory.parent}: {free >> 20} MiB are free beside "
            f"its memory, and {NEEDED_SPACE >> 20} MiB are needed"
        )


def _check_runs(machine: Machine, session: QmpSession) -> None:
    """Make sure that no other program has paused it since the first check: it would be resumed."""
    status = session.execute("query-status")
    if not status["running"]:
        raise CloudError(
            f"{machine.spec.name} was paused meanwhile ({status['status']}); it can be saved when "
            "it runs"
        )


def _check_can_be_saved(machine: Machine) -> None:
    machine.check_on()
    if machine.state is not State.RUNNING:
        raise CloudError(
            f"{machine.spec.name} is {machine.state.value}; it can be saved when it runs"
        )
    if machine.rundir.is_being_saved:
        # Only the mark of that save says which disk it uses.
        raise CloudError(
            f"{machine.spec.name} cannot be saved before a save that was cut off is undone, for "
            "which its QEMU did not answer"
        )
    for part in machine.spec.parts:
        if part.save_obstacle is not None:
            raise CloudError(f"{machine.spec.name} cannot be saved: {part.save_obstacle}")
    with machine.session() as session:
        check_machine(machine.spec.name, session)
    plugged = list_plugged(machine)
    if plugged:
        raise CloudError(
            f"{machine.spec.name} cannot be saved while network interfaces are plugged in "
            f"({', '.join(plugged)}): remove_network_interface() first"
        )
    # Disks are among the machine's parts, whenever they were added.
    known = {disk.device for disk in machine.spec.own_disks}
    added = [name for name in list_added(machine) if name not in known]
    if added:
        raise CloudError(
            f"{machine.spec.name} cannot be saved while it has devices that were added to it "
            f"({', '.join(added)}), which its copies would not have: device_del first"
        )


def _describe(machine: Machine, image: Path, helper: bool) -> SavedMachine:
    host = savedmachine.host_fingerprint(machine.binary, machine.spec.accelerator)
    return SavedMachine(image, machine.spec, machine.rundir.read_login(), host, helper, time.time())


def _write(saved: SavedMachine, rundir: RunDirectory) -> SavedMachine:
    """Write all other files of a saved machine beside its memory."""
    for source, target in (
        *((rundir.path / name, saved.directory / name) for name in saved.spec.kept_files),
        (rundir.known_hosts, saved.known_hosts),
    ):
        if source.exists():
            copy_private(source, target)
    login = saved.login
    for key in (login.public_key_path, login.private_key_path):
        copy_kept_file(key, rundir.path, saved.directory)
    return savedmachine.write_facts(
        saved, savedmachine.relocate(saved, saved.directory, saved.directory)
    )


class Instance(Protocol):
    """What is asked of an instance here, and by launches that keep one ready."""

    machine: Machine
    guest: Guest
    username: str
    telnet_port: str

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def ip(self) -> str:
        """The address of its ports."""

    def login_command(self) -> str:
        """Return the command line by which people log in."""

    def check_exists(self) -> None:
        """Raise when it is deleted."""

    def wait(self) -> None:
        """Wait until it is ready."""

    def wait_until_well(self) -> None:
        """Wait until it is ready, and cloud-init has not failed."""

    def clean(self) -> None:
        """Make its next boot a first boot."""

    def shutdown(self) -> None:
        """Power it off."""

    def delete(self) -> list[Exception]:
        """Delete it; return the errors met on the way."""


def snapshot_disk(instance: Instance, on_saved: Callable[[str], None], *, clean: bool) -> str:
    """Power an instance off and make an image of its disk.

    Args:
        instance: The instance.
        on_saved: Called with the image's id as soon as there is one.
        clean: Whether to clean it first; one that is off cannot be, which is logged.

    Returns:
        The image's id.

    Raises:
        CloudError: Another program has switched it on meanwhile.
    """
    if clean and not _clean_running(instance):
        _log.warning(
            "%s is off and is saved as it is: it cannot be cleaned without a boot", instance.name
        )
    instance.shutdown()
    machine = instance.machine
    disk = machine.rundir.disk
    # Were it switched on meanwhile, it would write to the image.
    with machine.staying_off():
        left_out = [file.name for file in layers.list_disks(disk)[1:]]
        if left_out:
            _log.warning(
                "The snapshot of %s is of its root disk alone, without %s (memory=True saves all)",
                instance.name,
                ", ".join(left_out),
            )
        base = layers.chain(disk)[-1]
        image = layers.LayerStore(machine.rundir.path.parent).freeze(
            disk, f"{make_name(instance.name)}.img"
        )
    store.inherit(image, base, source=f"snapshot of {instance.name}")
    on_saved(str(image))
    _log.info("Snapshot of %s: %s", instance.name, image)
    return str(image)


def _clean_running(instance: Instance) -> bool:
    """Clean an instance; return False when it is off, or powers off meanwhile."""
    if instance.machine.state is State.OFF:
        return False
    try:
        instance.wait()
    except MachineEndedError as error:
        if error.end is not None and error.end.exit_status:
            raise
        return False
    instance.clean()
    return True


def save_running(instance: Instance, on_saved: Callable[[str], None]) -> SavedMachine:
    """Save a running instance, memory and all.

    Args:
        instance: The instance.
        on_saved: Called with the image's id as soon as there is one.

    Raises:
        InstanceNotFoundError: It is deleted.
        MachineEndedError: It is off.
        CloudError: It could not be saved, and runs on; says why.
    """
    instance.check_exists()
    machine, fixes, username = instance.machine, instance.guest.fixes, instance.username
    has_helper = fixes.start_helper(username)
    ask = (lambda: fixes.sync(username)) if has_helper else None
    base = layers.chain(machine.rundir.disk)[-1]
    saved = save(machine, f"{make_name(instance.name)}.img", ask_helper=ask)
    on_saved(str(saved.image))
    fixes.correct_clock()
    store.inherit(saved.image, base, source=f"saved from {instance.name}")
    return saved
