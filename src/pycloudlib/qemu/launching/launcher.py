"""Launches: in which way a machine begins, the steps of that, and what is kept ready for it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pycloudlib._base.files import is_file
from pycloudlib.errors import (
    CloudError,
    InstanceExistsError,
    PycloudlibException,
    PycloudlibTimeoutError,
)
from pycloudlib.guest.data import runconfig
from pycloudlib.images import uses
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.host.ownership import Orphans
from pycloudlib.qemu.host.resources import HostLimits
from pycloudlib.qemu.launching import startingpoint
from pycloudlib.qemu.launching.beginning import (
    Beginning,
    Copy,
    Host,
    Launched,
    PowerOn,
    create_run_directory,
    start_machine,
)
from pycloudlib.qemu.launching.login import Keys, Login
from pycloudlib.qemu.launching.request import LaunchOptions, LaunchRequest, check_request
from pycloudlib.qemu.launching.startingpoint import FirstBoot, UnfitImageError
from pycloudlib.qemu.launching.warmcache import (
    TooLargeError,
    Unfit,
    WarmCache,
    build_key,
    build_start_key,
)
from pycloudlib.qemu.parts.standard import InstanceType
from pycloudlib.qemu.saved import restoring
from pycloudlib.qemu.saved.checkpoint import Instance
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import LoginFacts
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import make_name
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.memory import KeptMemoryError, check_machine

_log = logging.getLogger(__name__)

# Seconds after which an image that took too long is tried again: the host may have been busy.
_TRY_AGAIN = 24 * 3600.0
# How often something is looked for that others drop, or damage, just when it is to be used.
_TRIES = 3

Started = TypeVar("Started", bound=Launched)
Kept = TypeVar("Kept", bound=Instance)
Launch = Callable[[Path, LaunchOptions], Kept]


@dataclass(frozen=True, slots=True)
class Launcher(Generic[Started]):
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
    register: Callable[[Machine, Login], Started]

    def check(self, image: Path, options: LaunchOptions) -> LaunchRequest:
        """Check what is asked for as a whole; errors are those of `check_request`."""
        return check_request(options, image, self.keys.find(), self.tag, self.working_dir)

    def boot(self, image: Path, options: LaunchOptions) -> Started:
        """Start a machine that boots."""
        return self.start(PowerOn(self.check(image, options)), options.username)

    def start(self, beginning: Beginning, username: str | None) -> Started:
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

    def check_copy(self, saved: SavedMachine, options: LaunchOptions) -> None:
        """Check that a saved machine can be copied as it is asked for.

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

    def copy(self, saved: SavedMachine, options: LaunchOptions, *, fresh_identity: bool) -> Started:
        """Start a copy of a saved machine; where it cannot be restored, it boots from its disk.

        Raises the errors of `check_copy`.
        """
        self.check_copy(saved, options)
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

    def try_copy(self, beginning: Copy, username: str | None) -> Started | None:
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
        _log.warning("%s cannot be restored here: %s", saved.image, obstacle)
        return None

    def stand_in(self, saved: SavedMachine) -> Started:
        """Start a copy of a saved machine that has its name, and is not told from it.

        Raises:
            CloudError: It cannot be restored here.
        """
        copy = self.try_copy(Copy(make_name(saved.spec.name), saved, stands_in=True), None)
        if copy is None:
            raise CloudError(f"{saved.image} cannot be restored here, so nothing stands in for it")
        return copy

    def fork(
        self, saved: SavedMachine, count: int, names: Sequence[str], *, fresh_identity: bool
    ) -> list[Started]:
        """Start copies of a saved machine at once: all of them, or none.

        Args:
            saved: The saved machine.
            count: How many.
            names: Their names, checked; none for names made of the tag.
            fresh_identity: Whether each gets a new hostname, machine-id and host key.

        Raises:
            CloudError: One did not start.
        """

        def start(number: int) -> Started:
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


@dataclass(frozen=True, slots=True)
class Ready(Generic[Kept]):
    """Launches with what is kept ready, and keeps it.

    Attributes:
        launcher: Starts machines.
        cache: What is kept.
        save: Saves a machine that is ready, until the block ends.
    """

    launcher: Launcher[Kept]
    cache: WarmCache
    save: Callable[[Kept], contextlib.AbstractContextManager[SavedMachine]]

    def check(self, image: Path, options: LaunchOptions) -> InstanceType:
        """Check what is asked for as a whole, before anything is done; return the size."""
        saved = savedmachine.find(image)
        if saved is None:
            return self.launcher.check(image, options).instance_type
        self.launcher.check_copy(saved, options)
        return saved.spec.instance_type

    def launch(
        self,
        image: Path,
        options: LaunchOptions,
        fresh_identity: bool | None,
        *,
        warm: bool,
        fast: bool,
    ) -> Kept:
        """Start a machine in the way that is asked for; see `Qemu.launch`."""
        saved = savedmachine.find(image)
        if saved is not None:
            return self.launcher.copy(saved, options, fresh_identity=bool(fresh_identity))
        launch_new = self.launch_fast if fast else self.launcher.boot
        if warm:
            fresh = fresh_identity is not False
            return self.launch_warm(image, options, launch_new, fresh_identity=fresh)
        if fresh_identity:
            _log.info("fresh_identity: %s boots, so it has an identity of its own", image)
        return launch_new(image, options)

    def launch_fast(self, image: Path, options: LaunchOptions) -> Kept:
        """Start a machine whose first boot begins at cloud-init, where that can be."""
        request = self.launcher.check(image, options)
        for _ in range(_TRIES):
            start = self._find_start(request)
            if start is None:
                break
            try:
                with uses.holding(start.image):
                    instance = self.launcher.start(FirstBoot(request, start), options.username)
            except InstanceExistsError:
                raise
            except (PycloudlibException, ValueError, OSError) as error:
                if not is_file(start.image):
                    continue  # dropped meanwhile, to free space
                _log.warning("%s cannot begin at cloud-init: %s", request.name, error)
                instance = self.launcher.start(PowerOn(request), options.username)
                # The machine is all right, so it is what was kept.
                self._give_up_start(request, start, error)
                return instance
            self.cache.note_success(start)
            return instance
        return self.launcher.start(PowerOn(request), options.username)

    def _give_up_start(
        self, request: LaunchRequest, start: SavedMachine, error: BaseException
    ) -> None:
        """Remove where first boots began, which did not work; the next launch makes it anew."""
        cache = self.cache
        if not cache.has_worked(start):
            # It would be no better. But the host may have been busy.
            unfit = Unfit(
                f"what was made to begin at did not work: {error}", time.time() + _TRY_AGAIN
            )
            cache.note_unfit(build_start_key(request, self.launcher.host), unfit)
        cache.retire(start)

    def _find_start(self, request: LaunchRequest) -> SavedMachine | None:
        """Find where a machine's first boot can begin; made if need be; None where it cannot."""
        cache, host = self.cache, self.launcher.host
        obstacle = startingpoint.find_obstacle(request)
        if obstacle is None and not cache.bound:
            obstacle = "no machines are kept ready (warm_cache_mib = 0 in [qemu])"
        if obstacle is not None:
            _log.info("%s boots from its beginning: %s", request.name, obstacle)
            return None
        key = build_start_key(request, host)
        start = cache.find(key, host)
        if start is None and cache.why_unfit(key) is None:
            with cache.making(key, _log_waiting):
                start = cache.find(key, host)
                if start is None and cache.why_unfit(key) is None:
                    start = self._make_start(key, request)
        if start is None and (unfit := cache.why_unfit(key)) is not None:
            _log.warning("%s boots from its beginning: %s", request.name, unfit)
        return start

    def _make_start(self, key: str, request: LaunchRequest) -> SavedMachine | None:
        """Make what first boots begin at, for later launches; None where that does not work."""
        cache, host = self.cache, self.launcher.host
        _log.info("Booting %s up to cloud-init once, for all later launches", request.image.path)
        template = dataclasses.replace(request, name=make_name(self.launcher.tag))
        try:
            with startingpoint.make_starting_point(
                host, template, self.launcher.parent_dir
            ) as made:
                cache.add(key, made)
        except UnfitImageError as error:
            until = time.time() + _TRY_AGAIN if error.timed_out else None
            cache.note_unfit(key, Unfit(str(error), until))
        except TooLargeError as error:
            cache.note_unfit(key, Unfit(str(error), size=error.size))
        except (CloudError, PycloudlibTimeoutError, OSError) as error:
            _log.warning("%s boots from its beginning: %s", request.name, error)
        return cache.find(key, host)

    def launch_warm(
        self, image: Path, options: LaunchOptions, launch_new: Launch[Kept], *, fresh_identity: bool
    ) -> Kept:
        """Start a copy of a machine that was launched alike before; the first one is kept.

        Args:
            image: The image.
            options: What was asked for.
            launch_new: Starts a machine that boots.
            fresh_identity: Whether the copy gets a new hostname, machine-id and host key.
        """
        cache, host = self.cache, self.launcher.host
        if not cache.bound:
            _log.info("No machines are kept ready (warm_cache_mib = 0 in [qemu])")
            return launch_new(image, options)
        parts = options.find_parts(image, self.launcher.working_dir).all
        for part in parts:
            if part.save_obstacle is not None:
                _log.warning("Nothing is kept ready: %s", part.save_obstacle)
                return launch_new(image, options)
        key = build_key(image, options, host, parts)
        refused: SavedMachine | None = None
        for _ in range(_TRIES):
            saved = cache.find(key, host)
            if saved is None or saved == refused:
                if cache.why_unfit(key) is not None:
                    break
                with cache.making(key, _log_waiting):
                    saved = cache.find(key, host)
                    if saved in (None, refused) and cache.why_unfit(key) is None:
                        instance = launch_new(image, options)
                        if saved is not None:
                            # The machine is all right, so it is what was kept.
                            cache.retire(saved)
                        self._keep_warm(instance, key)
                        return instance
            if saved is None:
                break
            # What the user-data asks for has been done in the saved machine.
            beginning = Copy(options.name_with(self.launcher.tag), saved, fresh_identity)
            copy = self.launcher.try_copy(beginning, options.username)
            if copy is not None:
                return copy
            refused = saved
        if (unfit := cache.why_unfit(key)) is not None:
            _log.warning("Nothing is kept ready: %s", unfit)
        return launch_new(image, options)

    def _keep_warm(self, instance: Kept, key: str) -> None:
        """Save a machine when it is ready, for later launches; without it, they boot."""
        import paramiko  # noqa: PLC0415 - heavy

        _log.info("Booting %s, to be saved for later launches", instance.name)
        try:
            with instance.machine.session() as session:
                check_machine(instance.name, session)
            instance.wait_until_well()
            with self.save(instance) as saved:
                self.cache.add(key, saved)
        except KeptMemoryError as error:
            self.cache.note_unfit(key, Unfit(str(error)))
            _log.warning("%s is not kept for later launches: %s", instance.name, error)
        except (PycloudlibException, OSError, paramiko.SSHException) as error:
            _log.warning("%s is not kept for later launches: %s", instance.name, error)
        except BaseException:
            # Nobody has got it yet.
            instance.delete()
            raise


def _log_waiting(holder: str) -> None:
    _log.info("Waiting for another launch of the same machine to boot it: %s", holder)
