"""Launches of the QEMU cloud that do not begin at the beginning: what came before is kept ready."""

from __future__ import annotations

import dataclasses
import time
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pycloudlib._base.files import is_file
from pycloudlib.errors import (
    CloudError,
    InstanceExistsError,
    PycloudlibException,
    PycloudlibTimeoutError,
)
from pycloudlib.images import store, uses
from pycloudlib.qemu.host.resources import PortRegistry
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching import copies, startingpoint
from pycloudlib.qemu.launching.request import Beginning, LaunchOptions, LaunchRequest, PowerOn
from pycloudlib.qemu.launching.startingpoint import FirstBoot, UnfitImageError
from pycloudlib.qemu.launching.warmcache import (
    TooLargeError,
    Unfit,
    WarmCache,
    WarmImage,
    build_key,
    build_start_key,
)
from pycloudlib.qemu.live import QemuLive
from pycloudlib.qemu.prune import Pruning
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import make_name
from pycloudlib.qemu.vm.memory import KeptMemoryError, check_machine

# Seconds after which an image that took too long is tried again: the host may have been busy.
_TRY_AGAIN = 24 * 3600.0

# How often something is looked for that others drop, or damage, just when it is to be used.
_TRIES = 3

Launch = Callable[[Path, LaunchOptions], QemuInstance]


class QemuReady(QemuLive):
    """What the QEMU cloud does with machines that are kept ready for later launches."""

    @abstractmethod
    def _check_launch(self, image: Path, options: LaunchOptions) -> LaunchRequest: ...

    @property
    @abstractmethod
    def _ports(self) -> PortRegistry: ...

    @abstractmethod
    def _start(self, beginning: Beginning, username: str | None) -> QemuInstance: ...

    def warm_images(self) -> list[WarmImage]:
        """List what is kept ready for launches with `warm=True` or `fast_boot=True`."""
        return self._warm_cache.entries()

    def prune_warm_images(self, keep_mib: int = 0) -> list[str]:
        """Drop machines that are kept ready, those that were used longest ago first.

        One that a machine of today is built on stays.

        Args:
            keep_mib: How much may stay, in MiB.

        Returns:
            The keys of what was dropped.
        """
        return self._warm_cache.prune(keep_mib << 20)

    def prune(self, *, stopped: bool = False) -> list[str]:
        """Remove what programs have left behind that were killed or crashed, of all clouds.

        Directories of machines, with their QEMU if that runs still, snapshots, keys, and what was
        being made. What belongs to a program that is alive stays, and so does what a program left
        when it ended normally; and whatever was not made by this package.

        Args:
            stopped: Whether to remove machines, too, that were left by a normal end and do not
                run.

        Returns:
            The paths of what was removed.
        """
        removed = Pruning(self.working_dir, self.image_dir, self._ports, stopped).run()
        self._warm_cache.remove_useless()
        store.remove_stale_downloads(self.image_dir)
        return removed

    @property
    def _warm_cache(self) -> WarmCache:
        return WarmCache(self.working_dir, self.settings.warm_cache_mib << 20)

    def delete_image(self, image_id: str, **kwargs: Any) -> None:
        """Delete an image and what belongs to it; one that is not there is no error.

        Raises:
            ImageInUseError: Instances or snapshots are built on it; names them.
        """
        image = store.locate(image_id, self.image_dir)
        super().delete_image(image_id, **kwargs)
        self._warm_cache.forget(image)

    def _launch_cold(self, image: Path, options: LaunchOptions) -> QemuInstance:
        """Start a machine that boots."""
        return self._start(PowerOn(self._check_launch(image, options)), options.username)

    def _launch_fast(self, image: Path, options: LaunchOptions) -> QemuInstance:
        """Start a machine whose first boot begins at cloud-init, where that can be."""
        request = self._check_launch(image, options)
        for _ in range(_TRIES):
            start = self._find_start(request)
            if start is None:
                break
            try:
                with uses.holding(start.image):
                    instance = self._start(FirstBoot(request, start), options.username)
            except InstanceExistsError:
                raise
            except (PycloudlibException, ValueError, OSError) as error:
                if not is_file(start.image):
                    continue  # dropped meanwhile, to make room
                self._log.warning("%s cannot begin at cloud-init: %s", request.name, error)
                instance = self._start(PowerOn(request), options.username)
                # The machine is all right, so it is what was kept.
                self._give_up_start(request, start, error)
                return instance
            self._warm_cache.note_success(start)
            return instance
        return self._start(PowerOn(request), options.username)

    def _give_up_start(
        self, request: LaunchRequest, start: SavedMachine, error: BaseException
    ) -> None:
        """Remove where first boots began, which did not work; the next launch makes it anew."""
        cache = self._warm_cache
        if not cache.has_worked(start):
            # It would be no better. But the host may have been busy.
            unfit = Unfit(
                f"what was made to begin at did not work: {error}", time.time() + _TRY_AGAIN
            )
            cache.note_unfit(build_start_key(request, self._host), unfit)
        cache.retire(start)

    def _find_start(self, request: LaunchRequest) -> SavedMachine | None:
        """Find where a machine's first boot can begin; made if need be; None where it cannot."""
        cache, host = self._warm_cache, self._host
        obstacle = startingpoint.find_obstacle(request)
        if obstacle is None and not cache.bound:
            obstacle = "no machines are kept ready (warm_cache_mib = 0 in [qemu])"
        if obstacle is not None:
            self._log.info("%s boots from its beginning: %s", request.name, obstacle)
            return None
        key = build_start_key(request, host)
        start = cache.find(key, host)
        if start is None and cache.why_unfit(key) is None:
            with cache.making(key, self._tell_waiting):
                start = cache.find(key, host)
                if start is None and cache.why_unfit(key) is None:
                    start = self._make_start(key, request)
        if start is None and (unfit := cache.why_unfit(key)) is not None:
            self._log.warning("%s boots from its beginning: %s", request.name, unfit)
        return start

    def _make_start(self, key: str, request: LaunchRequest) -> SavedMachine | None:
        """Make what first boots begin at, for later launches; None where that does not work."""
        cache, host = self._warm_cache, self._host
        self._log.info(
            "Booting %s up to cloud-init once, for all later launches", request.image.path
        )
        template = dataclasses.replace(request, name=make_name(self.tag))
        try:
            with startingpoint.make_starting_point(host, template, self.parent_dir) as made:
                cache.add(key, made)
        except UnfitImageError as error:
            until = time.time() + _TRY_AGAIN if error.timed_out else None
            cache.note_unfit(key, Unfit(str(error), until))
        except TooLargeError as error:
            cache.note_unfit(key, Unfit(str(error), size=error.size))
        except (CloudError, PycloudlibTimeoutError, OSError) as error:
            self._log.warning("%s boots from its beginning: %s", request.name, error)
        return cache.find(key, host)

    def _launch_warm(
        self, image: Path, options: LaunchOptions, launch_new: Launch, *, fresh_identity: bool
    ) -> QemuInstance:
        """Start a copy of a machine that was launched alike before; the first one is kept.

        Args:
            image: The image.
            options: What was asked for.
            launch_new: Starts a machine that boots.
            fresh_identity: Whether the copy is to be somebody of its own.
        """
        cache, host = self._warm_cache, self._host
        if not cache.bound:
            self._log.info("No machines are kept ready (warm_cache_mib = 0 in [qemu])")
            return launch_new(image, options)
        key = build_key(image, options, host)
        refused: SavedMachine | None = None
        for _ in range(_TRIES):
            saved = cache.find(key, host)
            if saved is None or saved == refused:
                if cache.why_unfit(key) is not None:
                    break
                with cache.making(key, self._tell_waiting):
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
            request = copies.CopyRequest(options.name_with(self.tag), saved, fresh_identity)
            copy = self._try_copy(request, options.username)
            if copy is not None:
                return copy
            refused = saved
        if (unfit := cache.why_unfit(key)) is not None:
            self._log.warning("Nothing is kept ready: %s", unfit)
        return launch_new(image, options)

    def _keep_warm(self, instance: QemuInstance, key: str) -> None:
        """Save a machine when it is ready, for later launches; without it, they boot."""
        import paramiko  # noqa: PLC0415 - heavy

        self._log.info("Booting %s, to be saved for later launches", instance.name)
        try:
            with instance.machine.session() as session:
                check_machine(instance.name, session)
            instance.wait_until_well()
            image = self._save(instance)
            try:
                self._warm_cache.add(key, self.find_saved(image))
            finally:
                self.delete_image(image)
        except KeptMemoryError as error:
            self._warm_cache.note_unfit(key, Unfit(str(error)))
            self._log.warning("%s is not kept for later launches: %s", instance.name, error)
        except (PycloudlibException, OSError, paramiko.SSHException) as error:
            self._log.warning("%s is not kept for later launches: %s", instance.name, error)
        except BaseException:
            # Nobody has got it yet.
            instance.delete()
            raise

    def _tell_waiting(self, holder: str) -> None:
        self._log.info("Waiting for another launch of the same machine to boot it: %s", holder)
