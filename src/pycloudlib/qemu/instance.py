"""A QEMU machine as clients see it: power, SSH, files, console."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.locks import renew_in_children
from pycloudlib.errors import CloudError, PycloudlibTimeoutError
from pycloudlib.guest.boot.bootlines import Phase, PhaseStart
from pycloudlib.guest.boot.readiness import BootWatch, ready_limit, use_deadline
from pycloudlib.guest.data import runconfig
from pycloudlib.key import KeyPair
from pycloudlib.progress import Progress, ProgressCallback
from pycloudlib.qemu.access import GuestAccess
from pycloudlib.qemu.disk.layers import LayerStore
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.host.resources import PortLease, PortRegistry
from pycloudlib.qemu.saved import restoring
from pycloudlib.qemu.state.savedmachine import SavedMachine, host_fingerprint
from pycloudlib.qemu.vm import hotplug
from pycloudlib.qemu.vm.machine import Machine, MachineEndedError, State

# How long a guest may take to power itself off before it is switched off.
_SHUTDOWN_LIMIT = 120.0
_STOP_LOOK = 1.0
# How long it may take to begin a reboot.
_REBOOT_LIMIT = 60.0
# Minutes until a machine has to be ready: many times what a boot takes on a busy host.
_READY_MINUTES = {Accelerator.KVM: 10.0, Accelerator.TCG: 20.0}


class Owner(Protocol):
    """What an instance asks of the cloud that it belongs to."""

    def forget(self, instance: QemuInstance) -> None:
        """Take note that an instance is deleted."""

    def fork(
        self, instance: QemuInstance, count: int, fresh_identity: bool, names: Sequence[str]
    ) -> list[QemuInstance]:
        """Start copies of a running instance."""

    def find_saved(self, image_id: str) -> SavedMachine:
        """Find the saved machine that an image id stands for."""


class QemuInstance(GuestAccess):
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
        owner: Owner | None = None,
    ) -> None:
        super().__init__(key_pair, machine, username)
        self.telnet_port = str(machine.spec.telnet_port)
        self.instance_dir: Path = machine.rundir.path
        self.instance_path: Path = machine.rundir.disk
        self._registry = registry
        self._owner = owner
        self._delete_lock = threading.Lock()
        renew_in_children(self, _delete_lock=threading.Lock)
        self._timeline: tuple[PhaseStart, ...] = ()
        # Where on the console, and when, it was last told to reboot.
        self._reboot = (0, 0.0)

    @property
    def id(self) -> str:
        """`<instance_path>::<ssh_port>::<telnet_port>`, readable after the end, too."""
        return self.machine.rundir.instance_id(self.machine.spec)

    @property
    def boot_timeline(self) -> tuple[PhaseStart, ...]:
        """The phases of the boot that `wait` followed last, with when each began."""
        return self._timeline

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
            MachineEndedError: QEMU is gone (a `PycloudlibTimeoutError`); says how it ended.
            BootFailedError: The boot goes no further (a `PycloudlibTimeoutError`); says why.
            HostDiskFullError: The host has no room for the machine's disk.
            MachinePausedError: It is paused for long (a `PycloudlibTimeoutError`).
            PycloudlibTimeoutError: The machine could not be reached in time.
        """
        # What is wrong with it is told before anything is done.
        deadline = ready_limit(ready_timeout, self.ready_timeout)
        limit = self._tell_limit(ready_timeout)
        with self._watching_boot(on_progress, limit), use_deadline(deadline):
            super().wait(ready_timeout, **kwargs)
            self._run_first()

    def wait_for_restart(self, old_boot_id: str) -> None:
        """Wait until the machine has booted anew and cloud-init has finished.

        Args:
            old_boot_id: What `get_boot_id` said before.

        Raises:
            MachineEndedError: QEMU is gone (a `PycloudlibTimeoutError`); says how it ended.
            BootFailedError: The boot goes no further (a `PycloudlibTimeoutError`); says why.
            PycloudlibTimeoutError: It could not be reached in time, or did not reboot.
        """
        with self._watching_boot(None, self._tell_limit(None)):
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

    def get_status(self) -> str:
        """Say in one word what the machine does: `off`, `starting`, `paused` or `running`.

        Raises:
            InstanceNotFoundError: It is deleted.
        """
        self.check_exists()
        return self.machine.state.value

    def console_log(self) -> str:
        """Give what the machine wrote to its serial console over all its boots."""
        try:
            content = self.machine.rundir.console_log.read_bytes()
        except FileNotFoundError:
            return ""
        return content.decode("utf-8", errors="replace")

    def shutdown(self, wait: bool = True, **kwargs: Any) -> None:
        """Power the machine off: cleanly if the guest answers to its power button, else by force.

        Args:
            wait: Whether to wait until it is off.
            **kwargs: Accepted for older programs.
        """
        self.check_exists()
        self._log.info("Shutting down %s", self.name)
        if wait:
            self._power_off()
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
            self._forget_guest()
            self.machine.power_on_again()
        if wait:
            self.wait()

    def fork(
        self, count: int = 1, *, fresh_identity: bool = False, names: Sequence[str] = ()
    ) -> list[QemuInstance]:
        """Start running copies of this running machine; it goes on itself.

        Args:
            count: How many.
            fresh_identity: Whether each is somebody of its own; see `Qemu.launch`.
            names: What they are called, as many as there are; by default made from the tag.

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
        return self._cloud().fork(self, count, fresh_identity, names)

    def rollback(self, image_id: str) -> None:
        """Go back to the moment at which this machine was saved; as often as wanted.

        What happened since is forgotten. Ports, name and console log stay.

        Args:
            image_id: What `snapshot(..., memory=True)` of this machine gave, or what it was
                launched from, if that is a saved machine.

        Raises:
            ImageNotFoundError: There is no such image.
            CloudError: It is not a saved machine, or another one's, or cannot go on here; then
                nothing has changed.
        """
        self.check_exists()
        saved = self._cloud().find_saved(image_id)
        restoring.check_is_of(saved, self.machine.spec)
        machine = self.machine
        host = host_fingerprint(machine.binary, machine.spec.accelerator)
        obstacle = saved.find_obstacle(host)
        if obstacle is not None:
            raise CloudError(f"{self.name} cannot be rolled back to {image_id}: {obstacle}")
        self._forget_client()
        restoring.roll_back(self.machine, saved)
        LayerStore(self.instance_dir.parent).collect()
        self.put_right_soon()
        self._log.info("Rolled %s back to %s", self.name, image_id)

    def _cloud(self) -> Owner:
        if self._owner is None:
            raise CloudError(f"{self.name} belongs to no cloud")
        return self._owner

    def wait_for_stop(self, **kwargs: Any) -> None:
        """Wait until the machine is off.

        Raises:
            MachinePausedError: It is paused for long (a `PycloudlibTimeoutError`).
            PycloudlibTimeoutError: It still runs after two minutes.
        """
        deadline = Deadline.after(_SHUTDOWN_LIMIT)
        while not self.machine.wait_for_end(Deadline.after(deadline.capped(_STOP_LOOK))):
            if deadline.expired:
                raise PycloudlibTimeoutError(
                    f"{self.name} still runs after {deadline.limit:.0f} s of waiting for its stop"
                )
            # Its guest cannot do anything then.
            with contextlib.suppress(MachineEndedError):
                self.machine.check_pause()

    def add_network_interface(self, **kwargs: Any) -> str:
        """Plug a network interface into the running machine.

        It is in a user-mode network of its own and gets its address by DHCP; the default route
        stays with the first interface. It lasts until it is removed or the machine is switched
        off; a reboot keeps it.

        Args:
            **kwargs: Accepted for programs written for other clouds.

        Returns:
            The address it got in the guest.

        Raises:
            MachineEndedError: The machine is off.
            CloudError: QEMU refused, or the interface got no address; it is unplugged again.
        """
        interface = hotplug.plug_interface(self.machine)
        try:
            result = self.execute(
                runconfig.configure_script(interface.mac),
                use_sudo=True,
                description="configuring a new network interface",
            )
            return runconfig.parse_address(result)
        except BaseException as error:
            hotplug.unplug_interface(self.machine, interface)
            if isinstance(error, ValueError):
                raise CloudError(
                    f"{self.name}: a new interface did not come up: {error}"
                ) from error
            raise

    def remove_network_interface(self, ip_address: str) -> None:
        """Pull out an interface that `add_network_interface` has plugged in.

        Args:
            ip_address: The address that it returned.

        Raises:
            CloudError: No plugged-in interface has that address.
        """
        mac = self.execute(runconfig.find_mac_script(ip_address)).stdout
        if not mac:
            raise CloudError(f"No interface of {self.name} has the address {ip_address!r}")
        interface = hotplug.find_plugged(self.machine, mac)
        hotplug.unplug_interface(self.machine, interface)
        self.execute(runconfig.forget_script(mac), use_sudo=True)

    def wait_for_delete(self, **kwargs: Any) -> None:
        """Wait until the machine is gone; `delete` has seen to that when it returns.

        Raises:
            PycloudlibTimeoutError: It was not deleted.
        """
        if self.instance_dir.exists():
            raise PycloudlibTimeoutError(f"{self.name} was not deleted: {self.instance_dir} exists")

    def delete(self, wait: bool = True) -> list[Exception]:
        """End the machine and remove its directory; a deleted one is deleted again for free.

        Args:
            wait: Accepted for older programs; it is always waited for, as it takes a moment.

        Returns:
            The errors met on the way; empty when nothing is left.
        """
        with self._delete_lock:
            try:
                self.machine.delete()
            except Exception as error:  # noqa: BLE001 - told, and its ports stay its own
                return [error]
            errors: list[Exception] = []
            for step in (
                self._forget_client,
                self._release_ports,
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
        """Begin a reboot: by the guest itself, or by a power cycle when it cannot be asked."""
        import paramiko  # noqa: PLC0415 - heavy

        log = self.machine.rundir.console_log
        self._reboot = (log.stat().st_size if log.exists() else 0, time.monotonic())
        try:
            # A guest that obeys may take the connection with it: then there is no exit status.
            result = self.execute("systemctl reboot", use_sudo=True, timeout=_REBOOT_LIMIT)
            problem = result.stderr if result.return_code > 0 else None
        except (paramiko.SSHException, PycloudlibTimeoutError) as error:
            problem = str(error)
        if problem is not None:
            self._log.warning("%s does not reboot by itself (%s): power cycle", self.name, problem)
            self._power_off()
            self.machine.power_on_again()
        self._forget_guest()

    def _release_ports(self) -> None:
        spec = self.machine.spec
        self._registry.release(PortLease(spec.ssh_port, spec.telnet_port), self.instance_dir)

    def _power_off(self) -> None:
        took = self.machine.power_off(Deadline.after(_SHUTDOWN_LIMIT))
        self._forget_guest()
        self._log.info("%s is off (%s)", self.name, took.value)

    @contextlib.contextmanager
    def _watching_boot(self, on_progress: ProgressCallback | None, limit: str) -> Iterator[None]:
        """Follow the console while waiting: it may decide the outcome, and tells the phases."""
        machine = self.machine
        boots = (self._reboot, (machine.console_start, machine.powered_on))
        # The latest: a machine that was never told to reboot has been so at 0, in no time at all.
        console_start, begun = max(boots)

        def report(phase: Phase | None, line: str) -> None:
            if on_progress is not None:
                elapsed = time.monotonic() - begun
                activity = f"booting: {phase.value if phase else 'power-on'}"
                on_progress(Progress(activity, line, done=elapsed, unit="s"))

        watch = BootWatch(machine.console, console_start, begun, report)
        outer, self._watch = self._watch, watch
        try:
            with self.explaining("the machine to be ready", limit, ask=True), watch:
                yield
        finally:
            self._watch = outer
            self._timeline = watch.timeline
