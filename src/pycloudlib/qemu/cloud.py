"""The QEMU cloud as clients see it: each method hands on to what it is about."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from pycloudlib._base.tools import find_tool
from pycloudlib.cloud import BaseCloud
from pycloudlib.config import ConfigFile
from pycloudlib.errors import InstanceExistsError
from pycloudlib.guest.access.hostkeys import HostKeyPool
from pycloudlib.guest.data import seed as nocloud
from pycloudlib.images import store, uses
from pycloudlib.images.store import StoredImage
from pycloudlib.key import KeyPair
from pycloudlib.qemu.ahead import Pool
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.failure.explaining import explaining_launch
from pycloudlib.qemu.host.accelerator import choose_accelerator
from pycloudlib.qemu.host.budget import Capacity
from pycloudlib.qemu.host.resources import PortRegistry
from pycloudlib.qemu.imageshelf import ImageShelf, check_new
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching import admission
from pycloudlib.qemu.launching.beginning import Host
from pycloudlib.qemu.launching.launcher import Launcher, Ready
from pycloudlib.qemu.launching.login import Keys, Login, OwnKeys
from pycloudlib.qemu.launching.request import LaunchOptions
from pycloudlib.qemu.launching.warmcache import WarmCache, WarmImage
from pycloudlib.qemu.parts.furtherdisk import Disk
from pycloudlib.qemu.prune import Pruning
from pycloudlib.qemu.saved import checkpoint
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.settings import QemuSettings, parse_orphans
from pycloudlib.qemu.state.spec import DEFAULT_INSTANCE_TYPE, check_name
from pycloudlib.qemu.vm import livedisk
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.process import LaunchError

# What programs name beside the cloud: what it takes, returns and raises.
__all__ = ["Disk", "LaunchError", "Pool", "Qemu", "StoredImage", "WarmImage"]

P = ParamSpec("P")
R = TypeVar("R")


def _by_shelf(
    method: Callable[Concatenate[ImageShelf, P], R],
) -> Callable[Concatenate[Qemu, P], R]:
    """Make a method of the cloud of one of its image shelf: same arguments, same documentation.

    Each would be three lines of signature, and all of its documentation, for one line that hands
    on.
    """

    @functools.wraps(method)
    def hand_on(cloud: Qemu, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(cloud._shelf, *args, **kwargs)

    return hand_on


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
        self._pools: list[Pool] = []
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
        disks: Sequence[int | Disk] | None = None,
        wait_for_room: bool | Callable[[str], None] = False,
        **kwargs: Any,
    ) -> QemuInstance:
        """Start a machine from an image, without waiting for its boot.

        From the image of a saved machine (`snapshot(..., memory=True)`), start a copy of that
        machine, which runs at once: nothing boots.

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
                before; the first such launch boots, waits and saves; see `warm_images`.
            fast_boot: Whether the first boot begins where cloud-init opens the seed: all before it
                is done once for an image and kept. By default as `fast_boot` in `[qemu]` says.
            fresh_identity: Whether a copy gets a host name, machine-id, instance-id and SSH host
                key of its own. By default, a warm one does, and others do not.
            name: Its name and its guest's host name: 1 to 63 characters of a-z, 0-9 and '-'. By
                default one is made from the tag.
            disk_size_gib: GiB of its disk, not less than the image. By default 10, or the image's.
            disks: Further disks: a number of GiB for an empty one, or a `Disk`.
            wait_for_room: Whether to wait first until the machine fits beside those that boot at
                the moment, of all programs that wait like this: many boots at once end later than
                a few after each other. What to call, once, with who has reserved the processors
                and the memory; with True, that is logged.
            **kwargs: Accepted for older programs, and logged.

        Raises:
            ImageNotFoundError: There is no such image.
            InstanceExistsError: This cloud has an instance of that name.
            ValueError, TypeError: An argument is malformed, or the image is damaged or unsafe.
            InvalidKeyError: A file of the cloud's SSH key is missing, or is no key.
            MissingKernelError, FileNotFoundError: There is no kernel for `kernel_cmdline`, none at
                `kernel_path`, or no image at the path of a disk.
            ImageInUseError: A disk is to write to an image that others are built on.
            CloudSetupError: KVM is asked for in the configuration and does not work.
            CloudError: No free port, or QEMU refused (`LaunchError`, with its own words).
            PycloudlibTimeoutError: It did not fit for an hour (`wait_for_room`); says who has what.
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
            disks=disks,
        )
        fast = self.settings.fast_boot if fast_boot is None else fast_boot
        on_wait = admission.parse_wait(wait_for_room)
        with (
            uses.holding_image(image_id, self.image_dir) as image,
            explaining_launch(),
            self.settings.naming("working_dir", "state_dir"),
        ):
            ready = self._ready
            if on_wait is None:
                return ready.launch(image, options, fresh_identity, warm=warm, fast=fast)
            size = ready.check(image, options)
            with admission.admitting(self.settings.budget(), size, on_wait) as follow:
                instance = ready.launch(image, options, fresh_identity, warm=warm, fast=fast)
                follow(instance.machine, instance.ready_timeout)
            return instance

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
            InstanceNotFoundError: It does not exist, or this is not an instance's id.
        """
        rundir, spec = RunDirectory.find(instance_id)
        login = rundir.read_login()
        livedisk.recover_abandoned(rundir)
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
                of its boots. A machine that is off cannot be cleaned, which is logged. Without
                meaning with `memory`.
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
            FileExistsError, FileNotFoundError: `path` exists, or its directory does not.
        """
        if kwargs:
            self._log.info("Ignored by snapshot(): %s", ", ".join(sorted(kwargs)))
        instance.check_exists()
        if path is not None and not memory:
            raise ValueError("path is for a saved machine (memory=True); see export_image()")
        keep = self.created_images.append
        with instance.explaining(f"a snapshot of {instance.name}"):
            if not memory:
                return checkpoint.snapshot_disk(instance, keep, clean=clean)
            if path is None:
                return str(checkpoint.save_running(instance, keep).image)
            target = check_new(path)
            image = str(checkpoint.save_running(instance, keep).image)
            try:
                self.export_image(image, target, compress=False)
            finally:
                self._shelf.delete_soon(image)
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
        saved = checkpoint.save_running(instance, self.created_images.append)
        try:
            copies = self._launcher.fork(saved, count, chosen, fresh_identity=fresh_identity)
        except BaseException:
            self._shelf.delete_soon(str(saved.image))
            raise
        # The copies have its memory open; the disk that they are built on goes with the cloud.
        try:
            savedmachine.delete(saved.image)
        except OSError as error:
            self._log.warning("%s stays until clean(): %s", saved.directory, error)
        return copies

    def stand_in(self, image_id: str) -> QemuInstance:
        """Start a copy of a saved machine that has its name, too.

        Programs that return to a saved machine again and again have the next one ready with it,
        while they use the one before.

        Args:
            image_id: The saved machine.

        Raises:
            ImageNotFoundError: There is no such image.
            CloudError: It is no saved machine, or cannot be restored here.
        """
        return self._launcher.stand_in(self.find_saved(image_id))

    def pool(self, image_id: str, size: int = 1, **options: Any) -> Pool:
        """Keep machines ready before they are asked for, each with an identity of its own.

        They are launched and waited for in threads, as far as the budget has room, and end when
        others wait for room, when the pool is closed or the cloud cleaned, and with this program.

        Args:
            image_id: The image; copies of a saved machine are ready in a second.
            size: How many machines wait at most.
            **options: Further options of `launch`, but the name.

        Returns:
            The pool, a context manager; `take()` returns a machine.

        Raises:
            ImageNotFoundError: There is no such image.
            ValueError, TypeError: The size is not a positive number, or an option is malformed.

        Example:
            with cloud.pool(ready, size=2) as pool:
                machine = pool.take()
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size is {size!r}, expected a positive number of machines")
        for option in {"name", "wait_for_room"} & options.keys():
            raise ValueError(
                f"{option} is {options[option]!r}, but a pool decides that for each machine"
            )
        asked = {name: options[name] for name in LaunchOptions.__slots__ if name in options}
        with uses.holding_image(image_id, self.image_dir) as image:
            capacity = Capacity.of_machine(self._ready.check(image, LaunchOptions(**asked)))
            if savedmachine.find(image) is not None:
                options = {"fresh_identity": True, **options}

        def launch(name: str) -> QemuInstance:
            return self.launch(image_id, name=name, **options)

        pool = Pool(self, launch, size, capacity, self.settings.budget())
        self._pools.append(pool)
        return pool

    # What it does with images is the shelf's, documentation and all.
    export_image = _by_shelf(ImageShelf.export_image)
    build_image = _by_shelf(ImageShelf.build_image)
    released_image = _by_shelf(ImageShelf.released_image)
    daily_image = _by_shelf(ImageShelf.daily_image)
    lock_image = _by_shelf(ImageShelf.lock_image)
    update_image_lock = _by_shelf(ImageShelf.update_image_lock)
    images = _by_shelf(ImageShelf.images)
    prune_images = _by_shelf(ImageShelf.prune_images)
    get_image_id_from_name = _by_shelf(ImageShelf.get_image_id_from_name)
    image_serial = _by_shelf(ImageShelf.image_serial)
    delete_image = _by_shelf(ImageShelf.delete_image)
    find_saved = _by_shelf(ImageShelf.find_saved)

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
        """Remove what programs that were killed or crashed have left behind, of all clouds.

        That is directories of machines, with their QEMU if it still runs, snapshots, keys, and what
        was being made. What belongs to a living program stays, and what one left by a normal end.

        Args:
            stopped: Whether to remove also machines that a normal end has left and that do not run.

        Returns:
            The paths of what was removed.
        """
        removed = Pruning(self.working_dir, self.image_dir, self._ports, stopped).run()
        self._warm_cache.remove_useless()
        store.remove_stale_downloads(self.image_dir)
        return removed

    def clean(self) -> list[Exception]:
        """Delete every instance and image that this cloud made, and its directory; close its pools.

        Returns:
            The errors met on the way; empty when nothing is left.
        """
        for pool in self._pools:
            pool.close()
        self._pools.clear()
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
        return ImageShelf(self.settings, self._warm_cache, self.created_images)

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
        saved = checkpoint.save_running(instance, self.created_images.append)
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
