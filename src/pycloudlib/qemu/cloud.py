"""The QEMU cloud as clients see it: each method hands on to what it is about."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pycloudlib._base.tools import find_tool
from pycloudlib.cloud import BaseCloud, ImageType
from pycloudlib.config import ConfigFile
from pycloudlib.errors import InstanceExistsError
from pycloudlib.guest.access.hostkeys import HostKeyPool
from pycloudlib.guest.data import seed as nocloud
from pycloudlib.images import store, uses
from pycloudlib.images.store import StoredImage
from pycloudlib.key import KeyPair
from pycloudlib.progress import ProgressCallback
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.failure.explaining import explaining_launch
from pycloudlib.qemu.host.accelerator import choose_accelerator
from pycloudlib.qemu.host.resources import PortRegistry
from pycloudlib.qemu.imageshelf import ImageShelf, check_new
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching.beginning import Host
from pycloudlib.qemu.launching.launcher import Launcher
from pycloudlib.qemu.launching.login import Keys, Login, OwnKeys
from pycloudlib.qemu.launching.ready import Ready
from pycloudlib.qemu.launching.request import LaunchOptions
from pycloudlib.qemu.launching.warmcache import WarmCache, WarmImage
from pycloudlib.qemu.prune import Pruning
from pycloudlib.qemu.saved import snapshots
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.settings import QemuSettings, parse_orphans
from pycloudlib.qemu.state.spec import DEFAULT_INSTANCE_TYPE, check_name
from pycloudlib.qemu.vm import recovery
from pycloudlib.qemu.vm.machine import Machine


class Qemu(BaseCloud):
    """Launches cloud images as local QEMU virtual machines.

    A context manager: leaving it deletes every instance and snapshot it made.

    Args:
        tag: Names what this cloud makes: 1 to 63 characters of a-z, 0-9 and '-'.
        timestamp_suffix: Whether the time is appended to the tag.
        config_file: The configuration file, a path or an open text.
        orphans: What becomes of its machines when this program ends without deleting them:
            `reap-after-crash`, `keep` or `reap`; by default what `orphans` in `[qemu]` says.

    Raises:
        InvalidTagNameError: The tag breaks the rules; lists which.
        MissingPrerequisiteError: QEMU is not installed; names the package.
        ValueError: The configuration has a wrong value; names it.

    Example:
        with Qemu(tag="example") as cloud:
            instance = cloud.launch(cloud.build_image("bookworm"))
            instance.wait()
            print(instance.execute("uname -a"))
    """

    _type = "qemu"

    def __init__(
        self,
        tag: str,
        timestamp_suffix: bool = True,
        config_file: ConfigFile | None = None,
        *,
        orphans: str | None = None,
    ) -> None:
        super().__init__(tag, timestamp_suffix, config_file)
        self.orphans = self.settings.orphans if orphans is None else parse_orphans(orphans)
        self.qemu_binary = str(find_tool(self.settings.qemu_binary))
        find_tool("qemu-img")

    @cached_property
    def settings(self) -> QemuSettings:
        """Section `[qemu]` of the configuration."""
        return QemuSettings.parse(self.config, self._config_file.source)

    @property
    def image_dir(self) -> Path:
        """Where images are looked up and stored."""
        return self.settings.image_dir

    @property
    def working_dir(self) -> Path:
        """Where the directories of clouds go."""
        return self.settings.working_dir

    @property
    def parent_dir(self) -> Path:
        """The directory of everything that this cloud makes."""
        return layers.cloud_directory(self.working_dir, self.tag)

    def launch(
        self,
        image_id: str,
        instance_type: str | None = DEFAULT_INSTANCE_TYPE,
        user_data: str | bytes | None = None,
        meta_data: nocloud.Document = None,
        vendor_data: nocloud.Document = None,
        network_config: nocloud.Document = None,
        kernel_cmdline: str = "",
        kernel_path: str | Path | None = None,
        no_seed_iso: bool = False,
        username: str | None = None,
        launch_args: Sequence[str] | None = None,
        *,
        warm: bool = False,
        fast_boot: bool | None = None,
        fresh_identity: bool | None = None,
        name: str | None = None,
        disk_size_gib: int | None = None,
        **kwargs: Any,
    ) -> QemuInstance:
        """Start a machine from an image, without waiting for its boot.

        From the image of a saved machine (`snapshot(..., memory=True)`) a copy of that machine is
        started, which runs at once: nothing boots.

        Args:
            image_id: The image: an absolute path, or one below `image_dir`.
            instance_type: `c<cpus>m<MiB of memory>`.
            user_data: For cloud-init, of any kind; reaches the guest byte for byte. In a copy of
                a saved machine, which does not boot, `wait()` does what a boot would do with it.
            meta_data: For cloud-init: a YAML mapping; what is missing in it is added.
            vendor_data: For cloud-init; takes effect beside the machine's own.
            network_config: For cloud-init.
            kernel_cmdline: Boots the kernel directly; a root file system and a serial console
                are added if it names none.
            kernel_path: The kernel; by default the one stored beside the image.
            no_seed_iso: Whether to leave out the seed: no SSH key, no host key, no user-data.
            username: The login user; by default the image's own.
            launch_args: Further arguments for QEMU.
            warm: Whether to start a copy of a machine that was launched with just these arguments
                before, and was saved when it was ready. The first such launch boots, waits and
                saves; see `warm_images`.
            fast_boot: Whether the machine's first boot begins where its cloud-init opens the seed:
                all that comes before is done once for an image and kept. By default as
                `fast_boot` in `[qemu]` says, which is no if it says nothing.
            fresh_identity: Whether a copy gets a host name, machine-id, instance-id and SSH host
                key of its own. By default, a warm one does, and others do not.
            name: What it is called, which is its guest's host name, too: 1 to 63 characters of
                a-z, 0-9 and '-'. By default one is made from the tag.
            disk_size_gib: GiB that its disk has, not less than the image. By default 10, or what
                the image has.
            **kwargs: Accepted for older programs, and logged.

        Raises:
            ImageNotFoundError: There is no such image.
            InstanceExistsError: This cloud has an instance of that name.
            ValueError: One of the arguments is malformed, or the image is damaged or unsafe.
            InvalidKeyError: A file of the cloud's SSH key is missing, or is no key.
            MissingKernelError: There is no kernel for `kernel_cmdline`.
            TypeError: One of the arguments is of a wrong type.
            FileNotFoundError: There is no file at `kernel_path`.
            CloudSetupError: KVM is asked for in the configuration and does not work.
            CloudError: No free port, or QEMU refused (`LaunchError`, with its own words).
        """
        if kwargs:
            self._log.info("Ignored by launch(): %s", ", ".join(sorted(kwargs)))
        options = LaunchOptions(
            instance_type=instance_type,
            user_data=user_data,
            meta_data=meta_data,
            vendor_data=vendor_data,
            network_config=network_config,
            kernel_cmdline=kernel_cmdline,
            kernel_path=kernel_path,
            no_seed_iso=no_seed_iso,
            username=username,
            launch_args=launch_args,
            name=None if name is None else self._check_name(name),
            disk_size_gib=disk_size_gib,
        )
        fast = self.settings.fast_boot if fast_boot is None else fast_boot
        with (
            uses.holding_image(image_id, self.image_dir) as image,
            explaining_launch(),
            self.settings.naming("working_dir", "state_dir"),
        ):
            return self._ready.launch(image, options, fresh_identity, warm=warm, fast=fast)

    def _check_name(self, name: str) -> str:
        directory = self.parent_dir / check_name(name)
        if os.path.lexists(directory):
            raise InstanceExistsError(name, directory)
        return name

    def get_instance(
        self, instance_id: str, username: str | None = None, **kwargs: Any
    ) -> QemuInstance:
        """Find an instance again, from any process, by its id.

        Raises:
            InstanceNotFoundError: It does not exist (any more), or this is not an instance's id.
        """
        rundir, spec = RunDirectory.find(instance_id)
        login = rundir.read_login()
        recovery.settle_abandoned(rundir)
        machine = Machine(rundir, spec, Path(self.qemu_binary))
        key_pair = KeyPair(login.public_key_path, login.private_key_path, self._key_name)
        return self._make_instance(machine, Login(username or login.username, key_pair))

    def snapshot(
        self,
        instance: QemuInstance,
        clean: bool = True,
        *,
        memory: bool = False,
        path: str | Path | None = None,
        **kwargs: Any,
    ) -> str:
        """Make an image of an instance: of its disk, or of the whole running machine.

        For an image of the disk, the instance is shut down; `start()` starts it again. One that is
        off is saved as it is. For an image of the whole machine it is paused for milliseconds, and
        its connections stay; machines launched from the image begin at that moment: nothing boots.

        Args:
            instance: The instance.
            clean: Whether to `instance.clean()` first, so that machines of the image find nothing
                of its boots. A machine that is off cannot be cleaned, which is logged: machines
                of the image have its machine-id and logs, and do a first boot all the same.
                Without meaning with `memory`, since nothing boots.
            memory: Whether to save the running machine, memory and all.
            path: Where a saved machine is kept beyond this cloud's end; a new file, beside which
                a directory `<path>.live` is made.
            **kwargs: Accepted for older programs.

        Returns:
            The image's id, its path.

        Raises:
            InstanceNotFoundError: The instance is deleted.
            MachineEndedError: It is to be saved and does not run.
            CloudError: It could not be saved, and runs on; says why.
            FileExistsError: There is something at `path` already; it stays as it is.
            FileNotFoundError: The directory of `path` does not exist.
        """
        if kwargs:
            self._log.info("Ignored by snapshot(): %s", ", ".join(sorted(kwargs)))
        instance.check_exists()
        if path is not None and not memory:
            raise ValueError("path is for a saved machine (memory=True); see export_image()")
        keep = self.created_images.append
        with instance.explaining(f"a snapshot of {instance.name}"):
            if not memory:
                return snapshots.snapshot_disk(instance, keep, clean=clean)
            if path is None:
                return str(snapshots.save_running(instance, keep).image)
            target = check_new(path)
            image = str(snapshots.save_running(instance, keep).image)
            try:
                self.export_image(image, target, compress=False)
            finally:
                self._shelf.delete_soon(image, self.created_images)
            return str(target)

    def fork(
        self,
        instance: QemuInstance,
        count: int,
        fresh_identity: bool = False,
        names: Sequence[str] = (),
    ) -> list[QemuInstance]:
        """Start copies of a running instance; see `QemuInstance.fork`."""
        chosen = [self._check_name(name) for name in names]
        saved = snapshots.save_running(instance, self.created_images.append)
        try:
            copies = self._launcher.fork(saved, count, chosen, fresh_identity=fresh_identity)
        except BaseException:
            self._shelf.delete_soon(str(saved.image), self.created_images)
            raise
        # The copies have its memory open; the disk that they are built on goes with the cloud.
        try:
            savedmachine.delete(saved.image)
        except OSError as error:
            self._log.warning("%s stays until clean(): %s", saved.directory, error)
        return copies

    def find_saved(self, image_id: str) -> SavedMachine:
        """Find the saved machine that an image id stands for.

        Raises:
            ImageNotFoundError: There is no such image.
            CloudError: It is an image of a disk alone, or where first boots begin.
        """
        return self._shelf.find_saved(image_id)

    def export_image(
        self,
        image_id: str,
        path: str | Path,
        compress: bool = True,
        *,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        """Write an image, and all that it is built on, as one qcow2 file that needs no other.

        Args:
            image_id: The image.
            path: The new file.
            compress: Whether its content is compressed: smaller, and slower to write.
            on_progress: Told how much is done, in percent; by default shown.

        Raises:
            ImageNotFoundError: There is no such image.
            FileExistsError: There is a file at `path` already; it stays as it is.
            FileNotFoundError: The directory of `path` does not exist.
        """
        self._shelf.export(image_id, path, compress, on_progress)

    def build_image(
        self,
        release: str = "bookworm",
        packages: Sequence[str] = (),
        *,
        on_progress: ProgressCallback | None = None,
        refresh: bool = False,
        **options: Any,
    ) -> str:
        """Build a cloud image from a distribution's signed packages; no image server is needed.

        An image that was built of the same parts before is used again, and two processes that
        ask for the same one build it once.

        Args:
            release: `bookworm` or `trixie`, of Debian.
            packages: Packages to install besides those that a cloud image has.
            on_progress: Told of each step; by default shown.
            refresh: Whether to build anew, with the distribution's latest packages.
            **options: More about the image; see `pycloudlib.images.build.BuildRecipe`.

        Returns:
            The image's id, its path.

        Raises:
            ValueError: There is no such release, or an option is malformed.
            MissingPrerequisiteError: A tool for building is not installed; names the package.
            ImageBuildError: A step failed; names it, with the tool's own last lines.
        """
        return self._shelf.build(release, packages, options, on_progress, refresh=refresh)

    def released_image(
        self,
        release: str,
        *,
        image_type: ImageType = ImageType.GENERIC,
        refresh: bool = False,
        on_progress: ProgressCallback | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the latest released image of an Ubuntu release; downloaded if there is none yet.

        Args:
            release: A series (`noble`) or a version (`24.04`).
            image_type: `GENERIC` or `MINIMAL`.
            refresh: Whether to ask the server for a newer one than there is.
            on_progress: Told how much of a download is done, in bytes. By default a terminal has
                a bar, and the log a line now and then.
            **kwargs: Accepted for older programs.

        Returns:
            The image's id, its path.

        Raises:
            ValueError: There is no such release, or no image of that type.
            ImageNotFoundError: There is none here, and `offline` is configured.
            ImageBuildError: The download failed.
            ImageVerificationError: What the server sent is not what its publisher signed.
        """
        return self._shelf.find_released(release, image_type, on_progress, refresh=refresh)

    def daily_image(
        self,
        release: str,
        *,
        image_type: ImageType = ImageType.GENERIC,
        on_progress: ProgressCallback | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the latest daily image of an Ubuntu release; downloaded unless it is there.

        When the server cannot be reached, the newest one that is here is used, and the log says so.

        Arguments, result and errors are those of `released_image`.
        """
        return self._shelf.find_daily(release, image_type, on_progress)

    def lock_image(
        self,
        release: str,
        *,
        daily: bool = False,
        image_type: ImageType = ImageType.GENERIC,
    ) -> str:
        """Pin a release to its newest build, which is had from then on and no other.

        The lock is `image_lock` of the configuration, or `pycloudlib.lock` in the directory that
        the program runs in; it is for a project's version control.

        Args:
            release: A series or a version.
            daily: Whether its daily image is meant, not the released one.
            image_type: `GENERIC` or `MINIMAL`.

        Returns:
            The serial of the build.

        Raises:
            ValueError: There is no such release, or the lock is damaged.
            ImageBuildError: The server could not be asked.
            ImageVerificationError: What it says is not what its publisher signed.
        """
        return self._shelf.lock(release, image_type, daily=daily)

    def update_image_lock(self) -> list[str]:
        """Pin all that is pinned to the newest builds; return their serials.

        Errors are those of `lock_image`; the lock stays as it was then.
        """
        return self._shelf.update_lock()

    def images(self) -> list[StoredImage]:
        """List the images in `image_dir`, downloaded or built, of each the newest build first."""
        return self._shelf.list_all()

    def prune_images(self, keep: int = 1) -> list[str]:
        """Delete old builds in `image_dir` that no instance and no snapshot is built on.

        Args:
            keep: How many builds of each image stay: the newest ones.

        Returns:
            The ids of what was deleted.

        Raises:
            ValueError: `keep` is negative.
        """
        return self._shelf.prune(keep, self.created_images)

    def get_image_id_from_name(self, name: str) -> str:
        """Return the id of the image that has a name.

        Args:
            name: The file name of a snapshot that this cloud made, or of an image in `image_dir`,
                of which the newest build is meant; without its suffix, too.

        Raises:
            ImageNotFoundError: There is none.
        """
        return self._shelf.find_by_name(name, self.created_images)

    def image_serial(self, image_id: str) -> str:
        """Return the build serial of an image.

        Raises:
            ImageNotFoundError: There is no such image, or nothing tells its serial.
        """
        return self._shelf.find_serial(image_id)

    def delete_image(self, image_id: str, **kwargs: Any) -> None:
        """Delete an image and what belongs to it; one that is not there is no error.

        Raises:
            ImageInUseError: Instances or snapshots are built on it; names them.
        """
        self._shelf.delete(image_id, self.created_images)

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

    def clean(self) -> list[Exception]:
        """Delete every instance and image that this cloud made, and its directory.

        Returns:
            The errors met on the way; empty when nothing is left.
        """
        errors = super().clean()
        if self._own_keys.holds(self._key_pair):  # one that was set by use_key() stays
            self._key_pair = None
        self._own_keys.remove()
        try:
            layers.LayerStore(self.parent_dir).remove_cloud_directory()
        except OSError as error:
            errors.append(error)
        return errors

    @cached_property
    def _host(self) -> Host:
        """What machines run on; found out at the first launch."""
        binary = Path(self.qemu_binary)
        host_keys = HostKeyPool(self.settings.state_dir / "host-keys")
        # Begun before what takes a while on a host that is new to this package.
        host_keys.fill()
        choice = choose_accelerator(self.settings.accelerator, binary, self.settings.cache_dir)
        return Host(binary, choice.accelerator, self._ports, host_keys)

    @property
    def _ports(self) -> PortRegistry:
        return PortRegistry(self.settings.state_dir / "ports")

    @property
    def _warm_cache(self) -> WarmCache:
        return WarmCache(self.working_dir, self.settings.warm_cache_mib << 20)

    @property
    def _shelf(self) -> ImageShelf:
        return ImageShelf(self.settings, self._warm_cache)

    @cached_property
    def _own_keys(self) -> OwnKeys:
        return OwnKeys(self.parent_dir)

    @property
    def _launcher(self) -> Launcher[QemuInstance]:
        # Made for each launch: it holds on to this object, whose end removes its keys.
        return Launcher(
            host=self._host,
            parent_dir=self.parent_dir,
            working_dir=self.working_dir,
            image_dir=self.image_dir,
            tag=self.tag,
            keys=Keys(lambda: self.key_pair, self._key_name, self._own_keys),
            orphans=self.orphans,
            register=self._register,
        )

    @property
    def _ready(self) -> Ready[QemuInstance]:
        return Ready(self._launcher, self._warm_cache, self._saving)

    @contextlib.contextmanager
    def _saving(self, instance: QemuInstance) -> Iterator[SavedMachine]:
        """Save a running instance until the block ends."""
        saved = snapshots.save_running(instance, self.created_images.append)
        try:
            yield saved
        finally:
            self.delete_image(str(saved.image))

    def _register(self, machine: Machine, login: Login) -> QemuInstance:
        """Make an instance of a machine that was launched, and keep it for `clean()`."""
        instance = self._make_instance(machine, login)
        instance.guest.fixes.fix_up_soon()
        self.created_instances.append(instance)
        return instance

    def _make_instance(self, machine: Machine, login: Login) -> QemuInstance:
        instance = QemuInstance(login.key, machine, self._ports, login.username, self)
        instance.artifacts_dir = self.settings.artifacts_dir
        return instance

    def forget(self, instance: QemuInstance) -> None:
        """Forget an instance that is deleted; called by the instance."""
        with contextlib.suppress(ValueError):
            self.created_instances.remove(instance)

    def _make_key_pair(self, name: str) -> KeyPair:
        with self.settings.naming("working_dir"):
            return self._own_keys.make(name)
