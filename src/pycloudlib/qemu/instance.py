"""A QEMU machine as clients see it: power, SSH, files, console."""

from __future__ import annotations

import contextlib
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pycloudlib._base.deadline import Deadline, use_deadline
from pycloudlib._base.locks import renew_in_children
from pycloudlib.diagnosis import Diagnosis
from pycloudlib.errors import (
    CloudError,
    InstanceNotFoundError,
    PycloudlibError,
    PycloudlibTimeoutError,
)
from pycloudlib.guest.access import ssh
from pycloudlib.guest.access.commands import command_in_errors
from pycloudlib.guest.access.portstream import FilePort
from pycloudlib.guest.boot.bootlines import PhaseStart
from pycloudlib.guest.boot.readiness import ready_limit
from pycloudlib.instance import BaseInstance
from pycloudlib.key import KeyPair
from pycloudlib.progress import ProgressCallback
from pycloudlib.qemu.disk.layers import LayerStore
from pycloudlib.qemu.failure.explaining import Explainer
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.host.resources import LOOPBACK, PortLease, PortRegistry
from pycloudlib.qemu.launching import admission
from pycloudlib.qemu.launching.request import look_at
from pycloudlib.qemu.parts.furtherdisk import Disk, parse_disk
from pycloudlib.qemu.saved import restoring
from pycloudlib.qemu.vm import hotplug
from pycloudlib.qemu.vm.guest import SHUTDOWN_LIMIT, Guest
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.running import MachineEndedError, State
from pycloudlib.result import Result

# What programs name beside the instance: what it raises.
__all__ = ["MachineEndedError", "QemuInstance"]

if TYPE_CHECKING:
    import paramiko

    from pycloudlib.qemu.cloud import Qemu

# Minutes until a machine has to be ready: many times what a boot takes on a busy host.
_READY_MINUTES = {Accelerator.KVM: 10.0, Accelerator.TCG: 20.0}


# The first that is leased in QEMU's user-mode network (qemu(1), -netdev user, dhcpstart).
_GUEST_ADDRESS = "10.0.2.15"
_SHOWN_COMMAND = 100


class QemuInstance(BaseInstance):
    """One QEMU machine.

    Made by `Qemu.launch` and `Qemu.get_instance`. Safe to use from several threads.

    Attributes:
        port: The local port of the guest's SSH server, as text.
        telnet_port: The local port of the serial console, as text.
        instance_dir: The directory of all its files.
        instance_path: Its disk, an overlay on the image.
    """

    _type = "qemu"

    def __init__(
        self,
        key_pair: KeyPair,
        machine: Machine,
        registry: PortRegistry,
        username: str | None = None,
        cloud: Qemu | None = None,
    ) -> None:
        super().__init__(key_pair, username)
        self.machine = machine
        self.guest = Guest(machine, self._connections, self.execute)
        self._keeps_connection = False
        self._explainer = Explainer(self.guest)
        self.port = str(machine.spec.ssh_port)
        self.telnet_port = str(machine.spec.telnet_port)
        self.instance_dir: Path = machine.rundir.path
        self.instance_path: Path = machine.rundir.disk
        self._registry = registry
        self._owner = cloud
        self._delete_lock = threading.Lock()
        renew_in_children(self, _delete_lock=threading.Lock)

    @property
    def name(self) -> str:
        """The instance's name, and the guest's host name unless meta-data said otherwise."""
        return self.machine.spec.name

    @property
    def ip(self) -> str:
        """The address of its ports: this host's loopback."""
        return LOOPBACK

    @property
    def private_ip(self) -> str:
        """The address that QEMU's DHCP server gives its first network card.

        A `network_config` of the caller's may give it another one.
        """
        return _GUEST_ADDRESS

    @property
    def artifacts_dir(self) -> Path | None:
        """Where logs go when something fails; None for nowhere."""
        return self._explainer.artifacts_dir

    @artifacts_dir.setter
    def artifacts_dir(self, directory: Path | None) -> None:
        self._explainer.artifacts_dir = directory

    @property
    def id(self) -> str:
        """`<instance_path>::<ssh_port>::<telnet_port>`, readable after the end, too."""
        return self.machine.rundir.instance_id(self.machine.spec)

    @property
    def boot_timeline(self) -> tuple[PhaseStart, ...]:
        """The phases of the boot that `wait` followed last, with when each began."""
        return self.guest.timeline

    def wait(
        self,
        ready_timeout: float | None = None,
        *,
        on_progress: ProgressCallback | None = None,
        **kwargs: Any,
    ) -> None:
        """Wait until the machine runs, executes commands over SSH, and cloud-init has finished.

        Ends the moment the outcome is decided: a machine that is gone is not waited for.

        Args:
            ready_timeout: Minutes it may take in all; by default 10 with KVM, 20 in emulation.
            on_progress: Called every quarter of a second with the boot's phase, the console's
                latest line, and the seconds since power-on.
            **kwargs: Accepted for older programs.

        Raises:
            PycloudlibTimeoutError: It was not ready in time; as `MachineEndedError`: QEMU is gone,
                `BootFailedError`: the boot failed, `MachinePausedError`: it is paused for long.
            HostDiskFullError: The host has no space for the machine's disk.
        """
        # What is wrong with it is told before anything is done.
        deadline = ready_limit(ready_timeout, self.ready_timeout)
        limit = self._tell_limit(ready_timeout)
        with self._following_boot(on_progress, limit), use_deadline(deadline):
            super().wait(ready_timeout, **kwargs)
            admission.end_boot(self.instance_dir)
            self.guest.run_user_data(self._follow_cloudinit)

    def wait_for_restart(self, old_boot_id: str) -> None:
        """Wait until the machine has booted again and cloud-init has finished.

        Args:
            old_boot_id: What `get_boot_id` returned before.

        Raises:
            PycloudlibTimeoutError: It was not ready in time, or did not reboot; see `wait`.
        """
        with self._following_boot(None, self._tell_limit(None)):
            super().wait_for_restart(old_boot_id)

    @property
    def _default_ready_minutes(self) -> float:
        return _READY_MINUTES[self.machine.spec.accelerator]

    def _tell_limit(self, given: float | None) -> str:
        minutes = self._ready_minutes if given is None else given
        if minutes is not None:
            return f"{minutes * 60:.0f} s (ready_timeout)"
        how = self.machine.spec.accelerator.value
        return f"{self._default_ready_minutes * 60:.0f} s (the default with {how}; ready_timeout)"

    def wait_until_well(self) -> None:
        """Wait until the machine is ready, and cloud-init has ended without an error.

        Raises:
            PycloudlibTimeoutError: It could not be reached in time.
            PycloudlibError: cloud-init failed; in its own words.
        """
        self.wait()
        status = self._follow_cloudinit()
        if status is not None and status.failed:
            raise PycloudlibError(f"cloud-init failed on {self.name}: {status.failure}")

    def diagnose(self) -> Diagnosis:
        """Find out what is going on with the machine, at any time: the facts, and a cause if any.

        The guest is asked, too, when it can be reached at once.
        """
        return self._explainer.diagnose()

    def explaining(
        self, waiting_for: str, limit: str = "", *, ask: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Have an error that leaves a block say what was going on; see `Explainer.explaining`."""
        return self._explainer.explaining(waiting_for, limit, ask=ask)

    def login_command(self) -> str:
        """Return the command line by which people log in by `ssh`, for a shell."""
        return ssh.login_command(self._endpoint(), self.name)

    def check_exists(self) -> None:
        """Raise when the instance is deleted.

        Raises:
            InstanceNotFoundError: It is.
        """
        if not self.machine.rundir.path.is_dir():
            raise InstanceNotFoundError(self.id, message=f"{self.name} is deleted")

    def keep_connection(self) -> None:
        """Use one SSH connection with other programs, from now on.

        It is kept for a minute after its last use. It runs commands only: no files (SFTP).
        """
        self._keeps_connection = True

    def fix_up_before_use(self) -> None:
        """Fix up a copy that is about to be used over SSH; see `FixUps.fix_up_before_use`."""
        self.guest.fixes.fix_up_before_use()

    def check_answers(self) -> None:
        """Raise when the guest cannot answer; see `Guest.check_alive`."""
        self.guest.check_alive()

    def get_status(self) -> str:
        """Return in one word what the machine does: `off`, `starting`, `paused` or `running`.

        Raises:
            InstanceNotFoundError: It is deleted.
        """
        self.check_exists()
        return self.machine.state.value

    def console_log(self) -> str:
        """Return what the machine wrote to its serial console over all its boots."""
        try:
            return self.machine.rundir.console_log.read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def shutdown(self, wait: bool = True, **kwargs: Any) -> None:
        """Power the machine off: cleanly if the guest answers to its power button, else by force.

        Args:
            wait: Whether to wait until it is off.
            **kwargs: Accepted for older programs.
        """
        self.check_exists()
        self._log.info("Shutting down %s", self.name)
        if wait:
            self.guest.power_off()
        elif self.machine.state is not State.OFF:
            self.machine.execute("system_powerdown")

    def start(self, wait: bool = True) -> None:
        """Power the machine on; one that runs already is only waited for.

        Args:
            wait: Whether to wait until it is ready.
        """
        self.check_exists()
        if self.machine.state is State.OFF:
            self._log.info("Starting %s", self.name)
            self.guest.forget()
            self.machine.power_on_again()
        if wait:
            self.wait()

    def fork(
        self, count: int = 1, *, fresh_identity: bool = False, names: Sequence[str] = ()
    ) -> list[QemuInstance]:
        """Start running copies of this running machine, which itself runs on.

        Args:
            count: How many.
            fresh_identity: Whether each gets an identity of its own; see `Qemu.launch`.
            names: Their names, as many as there are; by default made from the tag.

        Raises:
            MachineEndedError: The machine is off.
            InstanceExistsError: A name is another instance's.
            CloudError: It could not be saved, or a copy did not start; then there is none.
            ValueError: `count` is not a positive number, or not that of the names.
        """
        self.check_exists()
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count is {count!r}, expected a positive number of copies")
        if names and len(set(names)) != count:
            raise ValueError(f"names are {names!r}, expected {count} that differ")
        return self._cloud.fork(self, count, fresh_identity, names)

    def rollback(self, image_id: str) -> None:
        """Return to the moment at which this machine was saved; as often as wanted.

        What happened since is lost. Ports, name and console log stay.

        Args:
            image_id: What `snapshot(..., memory=True)` of this machine returned, or what it was
                launched from, if that is a saved machine.

        Raises:
            ImageNotFoundError: There is no such image.
            CloudError: It is no saved machine, or another one's, or cannot be restored here; then
                nothing has changed.
        """
        self.check_exists()
        saved = self._cloud.find_saved(image_id)
        restoring.check_runs_here(saved, self.machine.binary, self.machine.spec.accelerator)
        restoring.check_is_of(saved, self.machine.spec)
        self._forget_client()
        self.guest.keeper.end()
        restoring.roll_back(self.machine, saved)
        LayerStore(self.instance_dir.parent).collect()
        self.guest.fixes.fix_up_soon()
        self._log.info("Rolled %s back to %s", self.name, image_id)

    @property
    def _cloud(self) -> Qemu:
        if self._owner is None:
            raise CloudError(f"{self.name} belongs to no cloud")
        return self._owner

    def wait_for_stop(self, **kwargs: Any) -> None:
        """Wait until the machine is off.

        Raises:
            MachinePausedError: It is paused for long (a `PycloudlibTimeoutError`).
            PycloudlibTimeoutError: It still runs after two minutes.
        """
        self.machine.wait_until_off(Deadline.after(SHUTDOWN_LIMIT))

    def add_network_interface(self, **kwargs: Any) -> str:
        """Plug a network interface into the running machine, in a user-mode network of its own.

        It gets its address by DHCP; the default route stays with the first interface. It lasts
        until it is removed or the machine is switched off; a reboot keeps it.

        Args:
            **kwargs: Accepted for programs written for other clouds.

        Returns:
            The address it got in the guest.

        Raises:
            MachineEndedError: The machine is off.
            CloudError: QEMU refused, or the interface got no address; it is unplugged again.
        """
        return hotplug.add_interface(self.machine, self.execute)

    def remove_network_interface(self, ip_address: str) -> None:
        """Unplug an interface.

        Args:
            ip_address: The address that `add_network_interface` returned.

        Raises:
            CloudError: No plugged-in interface has that address.
        """
        hotplug.remove_interface(self.machine, ip_address, self.execute)

    def add_disk(self, disk: int | Disk) -> Disk:
        """Plug a further disk into the running machine.

        It is a disk of the machine from then on, as one of `launch(disks=[...])`: it stays when the
        machine reboots or is powered off and on, and is saved, copied and rolled back with it.

        Args:
            disk: A number of GiB for an empty disk, or a `Disk`.

        Returns:
            The disk: its `serial` names it for `remove_disk`, its `device` is its path in the
            guest, which is there when the guest has found it.

        Raises:
            MachineEndedError: The machine is off.
            TypeError: The disk, or a part of it, is of a wrong type.
            ValueError: It cannot be: its size, its serial, its image; says why.
            FileNotFoundError: There is no image at its path.
            ImageInUseError: It is to write to an image that others are built on.
            CloudError: QEMU refused.
        """
        self.check_exists()
        look = partial(look_at, working_dir=self.instance_dir.parent.parent)
        added = hotplug.plug_disk(self.machine, lambda others: parse_disk(disk, look, others))
        self._log.info("Added the disk %s to %s", added.serial, self.name)
        return added.asked

    def remove_disk(self, serial: str) -> None:
        """Pull a further disk out of the running machine, and wait until it is gone.

        What is on it is removed, but an image that the machine writes to itself (`write=True`). The
        guest is not asked: unmount what is mounted of it first.

        Args:
            serial: The disk's serial.

        Raises:
            MachineEndedError: The machine is off.
            CloudError: It has no such disk.
            PycloudlibTimeoutError: It is not gone in time.
        """
        self.check_exists()
        hotplug.unplug_disk(self.machine, serial)
        LayerStore(self.instance_dir.parent).collect()
        self._log.info("Removed the disk %s from %s", serial, self.name)

    def wait_for_delete(self, **kwargs: Any) -> None:
        """Check that the machine is gone: `delete` has waited for that.

        Raises:
            PycloudlibTimeoutError: It was not deleted.
        """
        if self.instance_dir.exists():
            raise PycloudlibTimeoutError(f"{self.name} was not deleted: {self.instance_dir} exists")

    def delete(self, wait: bool = True) -> list[Exception]:
        """End the machine and remove its directory; one that is deleted already is no error.

        Args:
            wait: Accepted for older programs; it always waits, which takes a moment.

        Returns:
            The errors met on the way; empty when nothing is left.
        """
        with self._delete_lock:
            self.guest.keeper.end()
            try:
                self.machine.delete()
            except Exception as error:  # noqa: BLE001 - told, and its ports stay its own
                return [error]
            admission.release(self.instance_dir)
            errors: list[Exception] = []
            lease = PortLease(self.machine.spec.ssh_port, self.machine.spec.telnet_port)
            for step in (
                self._forget_client,
                lambda: self._registry.release(lease, self.instance_dir),
                LayerStore(self.instance_dir.parent).collect,
            ):
                try:
                    step()
                except Exception as error:  # noqa: BLE001 - collected: all steps are tried
                    errors.append(error)
            if not errors and self._owner is not None:
                self._owner.forget(self)
        return errors

    def restart(self, wait: bool = True, **kwargs: Any) -> None:
        """Reboot the machine: the same disk, cleanly if the guest can be asked to.

        Args:
            wait: Whether to wait until it has booted anew and cloud-init has finished.
            **kwargs: Accepted for older programs.

        Raises:
            MachineEndedError: The machine is off; `start()` switches it on.
            PycloudlibTimeoutError: It was not ready in time.
        """
        self.check_exists()
        with self.explaining("the machine to boot anew", self._tell_limit(None)):
            self.machine.check_on()
            super().restart(wait, **kwargs)

    def _do_restart(self, **kwargs: Any) -> None:
        self.guest.reboot()

    @contextlib.contextmanager
    def _following_boot(self, on_progress: ProgressCallback | None, limit: str) -> Iterator[None]:
        """Follow the console while waiting: it may decide the outcome, and shows the phases."""
        with (
            self.guest.following_boot(on_progress) as watch,
            self.explaining("the machine to be ready", limit, ask=True),
            watch,
        ):
            yield

    # What follows are the hooks of `BaseInstance`, which subclasses of programs override and call.

    def _wait_for_execute(
        self, old_boot_id: str | None = None, timeout: float | None = None
    ) -> None:
        """Wait until commands can be executed: by the helper, where one runs, or else over SSH."""
        wait_for_ssh = super()._wait_for_execute
        self.guest.wait_for_execute(
            self._deadline(timeout), self.username, old_boot_id, lambda: wait_for_ssh(old_boot_id)
        )

    def _ssh_connect(self) -> paramiko.SSHClient:
        with self.guest.connecting():
            if not self._keeps_connection:
                return super()._ssh_connect()
            return self.guest.keeper.connect(
                self._endpoint(),
                self._host_keys(),
                super()._ssh_connect,
                self._ssh_connect,
                # Those of a boot fail until it is over, and a copy is fixed up before it is used.
                may_start=self.guest.watch is None and not self.machine.rundir.fix_up.exists(),
            )

    def _ssh(
        self,
        command: Sequence[str],
        stdin: str | bytes | None = None,
        get_pty: bool = False,
        timeout: float | None = None,
    ) -> Result:
        run_by_ssh = super()._ssh

        def by_ssh() -> Result:
            return run_by_ssh(command, stdin, get_pty, timeout)

        with self.explaining(
            f"the end of: {command_in_errors(shlex.join(command)[:_SHOWN_COMMAND])}"
        ):
            return self.guest.run(command, self.username, stdin, timeout, by_ssh, get_pty=get_pty)

    @contextlib.contextmanager
    def _ended_early(self) -> Iterator[None]:
        with self.guest.naming_end(), super()._ended_early():
            yield

    def _file_port(self) -> FilePort:
        return self.guest.file_port(self.username)

    def _check_alive(self) -> None:
        self.guest.check_alive()

    def _has_settled(self) -> object:
        return self.guest.has_settled()

    def _was_followed(self) -> bool:
        return self.guest.was_followed

    def _seen_warnings(self) -> Sequence[str]:
        return self.guest.watch.warnings if self.guest.watch else ()

    def _explain_refusal(self) -> str:
        return self.guest.explain_refusal(self.username)

    def _lookout(self) -> Callable[[], None]:
        return self.guest.watchdog()

    def _host_keys(self) -> ssh.HostKeys:
        return self.guest.host_keys()
