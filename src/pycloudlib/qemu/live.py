"""The saved machines of the QEMU cloud as clients see them: saved, copied, found again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pycloudlib.errors import CloudError, PycloudlibError, PycloudlibTimeoutError
from pycloudlib.guest import runconfig
from pycloudlib.guest.helper import NewKey
from pycloudlib.images import store
from pycloudlib.key import KeyPair
from pycloudlib.progress import ProgressCallback, ignore_progress
from pycloudlib.qemu import checkpoint, copies, disk, layers
from pycloudlib.qemu.checkpoint import SavedMachine
from pycloudlib.qemu.images import QemuImages
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launch import (
    Host,
    LaunchOptions,
    LaunchRequest,
    create_run_directory,
    start_machine,
)
from pycloudlib.qemu.machine import Machine
from pycloudlib.qemu.rundir import LoginFacts, RunDirectory
from pycloudlib.qemu.spec import make_name
from pycloudlib.qemu.warm import WarmCache, WarmImage, build_key

_NO_OPTIONS = LaunchOptions()


class QemuLive(QemuImages):
    """What the QEMU cloud does with machines that are saved while they run."""

    @property
    @abstractmethod
    def _host(self) -> Host:
        """What machines run on."""

    @abstractmethod
    def _make_instance(
        self, machine: Machine, key_pair: KeyPair, username: str
    ) -> QemuInstance: ...

    @abstractmethod
    def _launch_cold(self, image: Path, options: LaunchOptions) -> QemuInstance: ...

    @abstractmethod
    def _start(
        self,
        request: LaunchRequest,
        username: str,
        key_pair: KeyPair | None = None,
        first_run: str | None = None,
    ) -> QemuInstance: ...

    @abstractmethod
    def _key_for(self, rundir: RunDirectory) -> KeyPair: ...

    def fork(
        self, instance: QemuInstance, count: int, fresh_identity: bool = False
    ) -> list[QemuInstance]:
        """Start copies of a running instance; see `QemuInstance.fork`."""
        image = Path(self._save(instance))
        saved = self.find_saved(str(image))

        def start(_number: int) -> QemuInstance:
            return self._launch_copy(saved, fresh_identity=fresh_identity)

        with ThreadPoolExecutor(min(count, 2 * (os.cpu_count() or 1))) as threads:
            attempts = [threads.submit(start, number) for number in range(count)]
        failed = [attempt for attempt in attempts if attempt.exception() is not None]
        copies_made = [attempt.result() for attempt in attempts if attempt not in failed]
        if failed:
            for copy in copies_made:
                copy.delete()
            failed[0].result()
        return copies_made

    def warm_images(self) -> list[WarmImage]:
        """List the machines that are kept ready for launches with `warm=True`."""
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

    @property
    def _warm_cache(self) -> WarmCache:
        return WarmCache(self.working_dir, self.settings.warm_cache_mib << 20)

    def find_saved(self, image_id: str) -> SavedMachine:
        """Find the saved machine that an image id stands for.

        Raises:
            ImageNotFoundError: There is no such image.
            CloudError: It is an image of a disk alone.
        """
        saved = checkpoint.find(store.resolve(image_id, self.image_dir))
        if saved is None:
            raise CloudError(
                f"{image_id} is not a saved machine, but an image of a disk; machines are saved "
                "by snapshot(instance, memory=True)"
            )
        return saved

    def export_image(
        self,
        image_id: str,
        path: str | Path,
        compress: bool = True,
        *,
        on_progress: ProgressCallback = ignore_progress,
    ) -> None:
        """Write an image, and all that it is built on, as one qcow2 file that needs no other.

        What is kept of a saved machine goes with it, into the directory `<path>.live`.

        Arguments and errors are those of `QemuImages.export_image`.
        """
        saved = checkpoint.find(store.resolve(image_id, self.image_dir))
        target = Path(path).expanduser().absolute()
        if saved is not None and checkpoint.directory_of(target).exists():
            raise FileExistsError(f"{checkpoint.directory_of(target)} exists already")
        super().export_image(image_id, path, compress, on_progress=on_progress)
        if saved is not None:
            try:
                checkpoint.copy(saved, target)
            except BaseException:
                target.unlink()
                raise

    def delete_image(self, image_id: str, **kwargs: Any) -> None:
        """Delete an image and what belongs to it; one that is not there is no error.

        Raises:
            ImageInUseError: Instances or snapshots are built on it; names them.
        """
        image = store.locate(image_id, self.image_dir)
        super().delete_image(image_id, **kwargs)
        self._warm_cache.forget_base(image)
        checkpoint.delete(image)

    def _save(self, instance: QemuInstance, path: str | Path | None = None) -> str:
        """Save a running instance; give the image's id."""
        instance.check_exists()
        machine = instance.machine
        helper = instance.start_helper()
        base = layers.chain(instance.instance_path)[-1]
        saved = checkpoint.save(machine, f"{make_name(instance.name)}.img", helper=helper)
        instance.has_moved()
        store.inherit(saved.image, base, source=f"saved from {instance.name}")
        self.created_images.append(str(saved.image))
        if path is None:
            return str(saved.image)
        try:
            self.export_image(str(saved.image), path, compress=False)
        finally:
            self.delete_image(str(saved.image))
        return str(Path(path).expanduser().absolute())

    def _launch_saved(
        self, saved: SavedMachine, options: LaunchOptions, *, fresh_identity: bool
    ) -> QemuInstance:
        """Start a copy of a saved machine; one that cannot go on here boots from its disk."""
        changes = options.changes_to(saved.spec)
        if changes:
            raise ValueError(
                f"{saved.image} is a saved machine, which cannot be changed by "
                f"{', '.join(changes)}: launch it without, or the image that it was made from"
            )
        first_run = None if options.user_data is None else runconfig.build_script(options.user_data)
        host = self._host
        obstacle = saved.find_obstacle(checkpoint.host_fingerprint(host.binary, host.accelerator))
        if obstacle is None:
            try:
                return self._launch_copy(
                    saved,
                    fresh_identity=fresh_identity,
                    first_run=first_run,
                    username=options.username,
                )
            except (CloudError, PycloudlibTimeoutError) as error:
                obstacle = str(error)
        self._log.warning(
            "%s boots from its disk, as the saved machine cannot go on here: %s",
            saved.image,
            obstacle,
        )
        request = LaunchRequest(
            name=make_name(self.tag),
            image=disk.inspect_image(saved.image, self.working_dir),
            instance_type=saved.spec.instance_type,
            seed=saved.seed if saved.seed.exists() else None,
            kernel_boot=saved.spec.kernel_boot,
            launch_args=saved.spec.launch_args,
        )
        return self._start(
            request,
            options.username or saved.login.username,
            self._kept_key(saved),
            first_run,
        )

    def _launch_warm(
        self, image: Path, options: LaunchOptions, *, fresh_identity: bool
    ) -> QemuInstance:
        """Start a copy of a machine that was launched alike before; the first one is kept."""
        cache, host = self._warm_cache, self._host
        key = build_key(image, options, host)
        saved = cache.find(key, host)
        if saved is None:

            def tell_waiting() -> None:
                self._log.info("Waiting for another launch of the same machine to boot it")

            with cache.making(key, tell_waiting):
                saved = cache.find(key, host)
                if saved is None:
                    instance = self._launch_cold(image, options)
                    self._keep_warm(instance, key)
                    return instance
        # What the user-data asks for has been done in the saved machine.
        asleep = dataclasses.replace(_NO_OPTIONS, username=options.username)
        return self._launch_saved(saved, asleep, fresh_identity=fresh_identity)

    def _keep_warm(self, instance: QemuInstance, key: str) -> None:
        """Save a machine when it is ready, for later launches; without it, they boot."""
        self._log.info("Booting %s, to be saved for later launches", instance.name)
        try:
            instance.wait_until_well()
            image = self._save(instance)
            try:
                self._warm_cache.add(key, self.find_saved(image))
            finally:
                self.delete_image(image)
        except (PycloudlibError, OSError) as error:
            self._log.warning("%s is not kept for later launches: %s", instance.name, error)

    def _launch_copy(
        self,
        saved: SavedMachine,
        *,
        fresh_identity: bool = False,
        first_run: str | None = None,
        username: str | None = None,
    ) -> QemuInstance:
        """Start a copy of a saved machine.

        Raises:
            CloudError: It did not come to run; nothing is left of it.
        """
        user = username or saved.login.username
        with contextlib.ExitStack() as stack:
            name = make_name(self.tag)
            rundir = create_run_directory(self.parent_dir / name, stack)
            key, new_key = self._key_of_copy(rundir, saved)
            request = copies.CopyRequest(name, saved, fresh_identity, new_key, first_run)
            rundir.write_login(LoginFacts(user, key.public_key_path, key.private_key_path))
            copies.write_files(rundir, request)
            machine = start_machine(
                self._host,
                rundir,
                lambda lease: copies.describe_copy(rundir, request, lease),
                stack,
                lambda machine: copies.wake(machine, saved),
            )
            instance = self._make_instance(machine, key, user)
            instance.put_right_soon()
            self.created_instances.append(instance)
            stack.pop_all()
        self._tell_launched(instance, f"as a copy of {saved.image}")
        return instance

    def _tell_launched(self, instance: QemuInstance, origin: str) -> None:
        self._log.info(
            "Launched %s %s: ssh -p %s %s@%s, telnet %s %s",
            instance.name,
            origin,
            instance.port,
            instance.username,
            instance.ip,
            instance.ip,
            instance.telnet_port,
        )

    def _kept_key(self, saved: SavedMachine) -> KeyPair:
        login = saved.login
        return KeyPair(login.public_key_path, login.private_key_path, self._key_name)

    def _key_of_copy(
        self, rundir: RunDirectory, saved: SavedMachine
    ) -> tuple[KeyPair, NewKey | None]:
        """Give the key to log in to a copy with; another than the saved one is let in first."""
        kept = self._kept_key(saved)
        if not saved.helper:
            # Nobody could let another key in.
            return kept, None
        ours = self._key_for(rundir)
        old, new = (" ".join(key.public_key_content.split()[:2]) for key in (kept, ours))
        return ours, None if old == new else NewKey(saved.login.username, old, new)
