"""Launches: which way a machine begins, and the steps by which it does."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pycloudlib.errors import InstanceExistsError, PycloudlibException
from pycloudlib.guest.data import runconfig
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.host.ownership import Orphans
from pycloudlib.qemu.host.resources import HostLimits
from pycloudlib.qemu.launching.beginning import (
    Beginning,
    Host,
    Launched,
    PowerOn,
    create_run_directory,
    start_machine,
)
from pycloudlib.qemu.launching.copies import Copy
from pycloudlib.qemu.launching.login import Keys, Login
from pycloudlib.qemu.launching.request import LaunchOptions, LaunchRequest, check_request
from pycloudlib.qemu.saved import restoring
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import LoginFacts
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import make_name
from pycloudlib.qemu.vm.machine import Machine

_log = logging.getLogger(__name__)

T = TypeVar("T", bound=Launched)


@dataclass(frozen=True, slots=True)
class Launcher(Generic[T]):
    """Starts machines for one cloud.

    Attributes:
        host: What machines run on.
        parent_dir: The directory of everything that the cloud makes.
        working_dir: Where the directories of clouds are.
        image_dir: Where images are looked up.
        tag: The cloud's tag.
        keys: The SSH key that guests let in.
        orphans: What becomes of machines when this program ends.
        register: Makes an instance of a machine that was started, and keeps it for the cloud.
    """

    host: Host
    parent_dir: Path
    working_dir: Path
    image_dir: Path
    tag: str
    keys: Keys
    orphans: Orphans
    register: Callable[[Machine, Login], T]

    def check(self, image: Path, options: LaunchOptions) -> LaunchRequest:
        """Check what is asked for as a whole; errors are those of `check_request`."""
        return check_request(options, image, self.keys.find(), self.tag, self.working_dir)

    def boot(self, image: Path, options: LaunchOptions) -> T:
        """Start a machine that boots."""
        return self.start(PowerOn(self.check(image, options)), options.username)

    def start(self, beginning: Beginning, username: str | None) -> T:
        """Start a machine.

        Args:
            beginning: The machine, and how it begins; everything in it is checked.
            username: The login user, if one was asked for.

        Raises:
            InstanceExistsError: The cloud has an instance of that name.
            ImageNotFoundError: What it begins from is deleted.
            CloudError: It did not start; nothing is left of it.
        """
        with beginning.holding(self.image_dir), contextlib.ExitStack() as stack:
            # Whatever goes wrong from here on, Ctrl-C included, the stack takes back what was made.
            rundir = create_run_directory(self.parent_dir / beginning.name, stack, self.orphans)
            login = beginning.choose_login(self.keys, username, rundir)
            rundir.write_login(LoginFacts.of(login.username, login.key))
            beginning.write_files(self.host, rundir, login)
            machine = start_machine(
                self.host,
                rundir,
                lambda lease: beginning.describe(self.host, rundir, lease),
                stack,
                beginning.switch_on,
            )
            layers.record_uses(rundir.disk)
            instance = self.register(machine, login)
            stack.pop_all()
        self.host.host_keys.fill()
        _log.info(
            "Launched %s %s: %s, telnet %s %s",
            instance.name,
            beginning.origin,
            instance.login_command(),
            instance.ip,
            instance.telnet_port,
        )
        return instance

    def copy(self, saved: SavedMachine, options: LaunchOptions, *, fresh_identity: bool) -> T:
        """Start a copy of a saved machine; where it cannot be restored, it boots from its disk.

        Raises:
            ValueError: The options ask for another machine, or it is where first boots begin.
        """
        restoring.check_has_booted(saved, ValueError)
        changes = options.changes_to(saved.spec)
        if changes:
            raise ValueError(
                f"{saved.image} is a saved machine, which cannot be changed by "
                f"{', '.join(changes)}: launch it without, or the image that it was made from"
            )
        user_data = options.user_data
        beginning = Copy(
            options.name_with(self.tag),
            saved,
            fresh_identity,
            user_data=user_data.encode() if isinstance(user_data, str) else user_data,
            first_run="" if user_data is None else runconfig.build_script(user_data),
        )
        copy = self.try_copy(beginning, options.username)
        if copy is not None:
            return copy
        _log.warning("%s boots from the disk of %s", beginning.name, saved.image)
        return self.start(dataclasses.replace(beginning, boots=True), options.username)

    def try_copy(self, beginning: Copy, username: str | None) -> T | None:
        """Start a copy that is restored; None where that cannot be, which is logged."""
        saved, host = beginning.saved, self.host
        fingerprint = savedmachine.host_fingerprint(host.binary, host.accelerator)
        obstacle = saved.find_obstacle(fingerprint)
        if obstacle is None:
            try:
                return self.start(beginning, username)
            except InstanceExistsError:
                raise
            except (PycloudlibException, ValueError, OSError) as error:
                # A damaged file shows itself in many ways; what else is wrong shows in a boot, too.
                obstacle = str(error)
        _log.warning("%s cannot go on here: %s", saved.image, obstacle)
        return None

    def fork(
        self, saved: SavedMachine, count: int, names: Sequence[str], *, fresh_identity: bool
    ) -> list[T]:
        """Start copies of a saved machine at once: all of them, or none.

        Args:
            saved: The saved machine.
            count: How many.
            names: Their names, checked; none for names made of the tag.
            fresh_identity: Whether each gets a new hostname, machine-id and host key.

        Raises:
            CloudError: One did not start.
        """

        def start(number: int) -> T:
            name = names[number] if names else make_name(self.tag)
            return self.start(Copy(name, saved, fresh_identity), None)

        with ThreadPoolExecutor(min(count, 2 * HostLimits.read().processors)) as threads:
            attempts = [threads.submit(start, number) for number in range(count)]
        failed = [attempt for attempt in attempts if attempt.exception() is not None]
        copies = [attempt.result() for attempt in attempts if attempt not in failed]
        if failed:
            for copy in copies:
                for error in copy.delete():
                    _log.warning("%s stays until clean(): %s", copy.name, error)
            failed[0].result()
        return copies
