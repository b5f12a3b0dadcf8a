"""Images made of instances: of the disk of one that is off, or of a whole one that runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from pycloudlib.images import store
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.saved import checkpoint
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import make_name
from pycloudlib.qemu.vm.guest import Guest
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.running import MachineEndedError, State

_log = logging.getLogger(__name__)


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
    saved = checkpoint.save(machine, f"{make_name(instance.name)}.img", ask_helper=ask)
    on_saved(str(saved.image))
    fixes.correct_clock()
    store.inherit(saved.image, base, source=f"saved from {instance.name}")
    return saved
