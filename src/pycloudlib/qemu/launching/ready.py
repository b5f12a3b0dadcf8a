"""Machines that are kept ready, so that later launches begin with what came before."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
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
from pycloudlib.images import uses
from pycloudlib.qemu.launching import startingpoint
from pycloudlib.qemu.launching.beginning import PowerOn
from pycloudlib.qemu.launching.copies import Copy
from pycloudlib.qemu.launching.launcher import Launcher
from pycloudlib.qemu.launching.request import LaunchOptions, LaunchRequest
from pycloudlib.qemu.launching.startingpoint import FirstBoot, UnfitImageError
from pycloudlib.qemu.launching.warmcache import (
    TooLargeError,
    Unfit,
    WarmCache,
    build_key,
    build_start_key,
)
from pycloudlib.qemu.saved.snapshots import Instance
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import make_name
from pycloudlib.qemu.vm.memory import KeptMemoryError, check_machine

_log = logging.getLogger(__name__)

# Seconds after which an image that took too long is tried again: the host may have been busy.
_TRY_AGAIN = 24 * 3600.0

# How often something is looked for that others drop, or damage, just when it is to be used.
_TRIES = 3


T = TypeVar("T", bound=Instance)

Launch = Callable[[Path, LaunchOptions], T]


@dataclass(frozen=True, slots=True)
class Ready(Generic[T]):
    """Launches with what is kept ready, and keeps it.

    Attributes:
        launcher: Starts machines.
        cache: What is kept.
        save: Saves a machine that is ready, until the block ends.
    """

    launcher: Launcher[T]
    cache: WarmCache
    save: Callable[[T], contextlib.AbstractContextManager[SavedMachine]]

    def launch(
        self,
        image: Path,
        options: LaunchOptions,
        fresh_identity: bool | None,
        *,
        warm: bool,
        fast: bool,
    ) -> T:
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

    def launch_fast(self, image: Path, options: LaunchOptions) -> T:
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
                    continue  # dropped meanwhile, to make room
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
        self, image: Path, options: LaunchOptions, launch_new: Launch[T], *, fresh_identity: bool
    ) -> T:
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
        key = build_key(image, options, host)
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

    def _keep_warm(self, instance: T, key: str) -> None:
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
