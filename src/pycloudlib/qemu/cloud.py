"""The QEMU cloud as clients see it; it reads as the story of a launch."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pycloudlib._base.tools import find_tool
from pycloudlib.config import ConfigFile
from pycloudlib.errors import InstanceExistsError, InstanceNotFoundError
from pycloudlib.guest.access import loginkey
from pycloudlib.guest.access.hostkeys import HostKeyPool
from pycloudlib.guest.data import seed as nocloud
from pycloudlib.images import store, uses
from pycloudlib.key import KeyPair, generate_key_pair
from pycloudlib.qemu.diagnosed import explaining_launch
from pycloudlib.qemu.disk import diskimage, layers
from pycloudlib.qemu.host.accelerator import choose_accelerator
from pycloudlib.qemu.host.ownership import Orphans, create_owned_directory
from pycloudlib.qemu.host.resources import PortRegistry
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching.request import (
    Beginning,
    Host,
    LaunchOptions,
    LaunchRequest,
    SeedRequest,
    create_run_directory,
    find_kernel_boot,
    parse_launch_args,
    start_machine,
)
from pycloudlib.qemu.live import check_new, key_of_machine
from pycloudlib.qemu.ready import QemuReady
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import LoginFacts, RunDirectory
from pycloudlib.qemu.state.settings import parse_orphans
from pycloudlib.qemu.state.spec import DEFAULT_INSTANCE_TYPE, InstanceType, check_name, make_name
from pycloudlib.qemu.vm import recovery
from pycloudlib.qemu.vm.machine import Machine, MachineEndedError, State

# No machine can be called so.
_KEYS = ".keys"


class Qemu(QemuReady):
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
        # The directory of a key that goes with this object, and what removes it.
        self._keys: Path | None = None
        self._remove_own_keys: weakref.finalize[..., Qemu] | None = None
        super().__init__(tag, timestamp_suffix, config_file)
        self.orphans = self.settings.orphans if orphans is None else parse_orphans(orphans)
        self.qemu_binary = str(find_tool(self.settings.qemu_binary))
        find_tool("qemu-img")

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
            fresh_identity: Whether a copy is somebody of its own: host name, machine-id,
                instance-id and SSH host key. By default, a warm one is, and others are not.
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
        if username is not None and not isinstance(username, str):
            raise TypeError(f"username must be a text, not {username!r}")
        options = LaunchOptions(
            instance_type,
            user_data,
            meta_data,
            vendor_data,
            network_config,
            kernel_cmdline,
            kernel_path,
            no_seed_iso,
            username,
            launch_args,
            None if name is None else self._check_name(name),
            disk_size_gib,
        )
        with uses.holding_image(image_id, self.image_dir) as image:
            return self._launch(image, options, warm, fast_boot, fresh_identity)

    def _launch(
        self,
        image: Path,
        options: LaunchOptions,
        warm: bool,
        fast_boot: bool | None,
        fresh_identity: bool | None,
    ) -> QemuInstance:
        """Start a machine from an image that nobody deletes meanwhile."""
        fast = self.settings.fast_boot if fast_boot is None else fast_boot
        with explaining_launch(), self.settings.naming("working_dir", "state_dir"):
            saved = savedmachine.find(image)
            if saved is not None:
                return self._launch_saved(saved, options, fresh_identity=bool(fresh_identity))
            launch_new = self._launch_fast if fast else self._launch_cold
            if warm:
                return self._launch_warm(
                    image, options, launch_new, fresh_identity=fresh_identity is not False
                )
            if fresh_identity:
                self._log.info("fresh_identity: %s boots, so it is somebody of its own", image)
            return launch_new(image, options)

    def _check_name(self, name: str) -> str:
        directory = self.parent_dir / check_name(name)
        if os.path.lexists(directory):
            raise InstanceExistsError(name, directory)
        return name

    def _check_launch(self, image: Path, options: LaunchOptions) -> LaunchRequest:
        """Check what is asked for as a whole."""
        data = (
            options.user_data,
            options.meta_data,
            options.vendor_data,
            options.network_config,
        )
        if options.no_seed_iso and data != (None,) * len(data):
            self._log.warning("no_seed_iso leaves out the seed, and the data given for it")
        if not options.no_seed_iso:
            # Once more: its files may have come, or gone, since it was chosen.
            loginkey.prove(self.key_pair, "the cloud's SSH key")
        seed = SeedRequest(self.key_pair.public_key_line, *data)
        base = diskimage.inspect_image(image, self.working_dir)
        return LaunchRequest(
            name=options.name_with(self.tag),
            instance_type=InstanceType.parse(
                DEFAULT_INSTANCE_TYPE if options.instance_type is None else options.instance_type
            ),
            launch_args=parse_launch_args(options.launch_args),
            kernel_boot=find_kernel_boot(image, options.kernel_cmdline, options.kernel_path),
            seed=None if options.no_seed_iso else seed,
            image=base,
            disk_size=diskimage.parse_size(options.disk_size_gib, base),
        )

    def _start(self, beginning: Beginning, username: str | None) -> QemuInstance:
        """Start a machine from a request that was checked.

        Args:
            beginning: The machine, and where it begins.
            username: The login user; by default the image's own.
        """
        request = beginning.request
        store.record_use(request.image.path)
        user = username or _default_user(request.image.path)
        with uses.holding(*request.needs), contextlib.ExitStack() as stack:
            # Whatever goes wrong from here on, Ctrl-C included, the stack takes back what was made.
            rundir = create_run_directory(self.parent_dir / request.name, stack, self.orphans)
            key = self._key_for(rundir)
            rundir.write_login(LoginFacts.of(user, key))
            beginning.write_files(self._host, rundir)
            machine = start_machine(
                self._host,
                rundir,
                lambda lease: beginning.describe(self._host, rundir, lease),
                stack,
                beginning.switch_on,
            )
            layers.record_uses(rundir.disk)
            instance = self._make_instance(machine, key, user)
            self.created_instances.append(instance)
            stack.pop_all()
        self._host.host_keys.fill()
        self._tell_launched(instance, f"from {request.image.path}")
        return instance

    def get_instance(
        self, instance_id: str, username: str | None = None, **kwargs: Any
    ) -> QemuInstance:
        """Find an instance again, from any process, by its id.

        Raises:
            InstanceNotFoundError: It does not exist (any more), or this is not an instance's id.
        """
        rundir = RunDirectory.of_id(str(instance_id))
        spec = rundir.read_spec()
        if instance_id != rundir.instance_id(spec):
            raise InstanceNotFoundError(
                instance_id,
                message=f"{instance_id!r} is not the id of the instance in {rundir.path}; an id "
                "has the form <path>::<ssh port>::<telnet port>",
            )
        login = rundir.read_login()
        recovery.settle_abandoned(rundir)
        machine = Machine(rundir, spec, Path(self.qemu_binary))
        key_pair = KeyPair(login.public_key_path, login.private_key_path, self._key_name)
        return self._make_instance(machine, key_pair, username or login.username)

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

        For an image of the disk, the instance is shut down and stays usable: `start()` goes on
        with it. One that is off is saved as it is, without a boot. For an image of the whole
        machine it stands still for milliseconds, and its connections live on; machines launched
        from the image go on from that moment, and nothing boots.

        Args:
            instance: The instance.
            clean: Whether to `instance.clean()` first, so that machines of the image find nothing
                of its boots. A machine that is off cannot be cleaned, which is logged: machines
                of the image have its machine-id and its logs then; cloud-init does a first boot
                in them all the same, as each has an instance-id of its own. Of no meaning with
                `memory`, since nothing boots.
            memory: Whether to save the running machine, memory and all.
            path: Where a saved machine is kept beyond this cloud's end; a new file, beside which
                a directory `<path>.live` is made.
            **kwargs: Accepted for older programs.

        Returns:
            The image's id, its path.

        Raises:
            InstanceNotFoundError: The instance is deleted.
            MachineEndedError: It is to be saved and does not run.
            CloudError: It could not be saved, and goes on; says why.
            FileExistsError: There is something at `path` already; it stays as it is.
            FileNotFoundError: The directory of `path` does not exist.
        """
        if kwargs:
            self._log.info("Ignored by snapshot(): %s", ", ".join(sorted(kwargs)))
        instance.check_exists()
        if path is not None and not memory:
            raise ValueError("path is for a saved machine (memory=True); see export_image()")
        with instance.explaining(f"a snapshot of {instance.name}"):
            if memory:
                return self._save(instance, None if path is None else check_new(path))
            return self._snapshot_disk(instance, clean=clean)

    def _snapshot_disk(self, instance: QemuInstance, *, clean: bool) -> str:
        if clean and not self._clean_running(instance):
            self._log.warning(
                "%s is off and is saved as it is: it cannot be cleaned without a boot",
                instance.name,
            )
        instance.shutdown()
        # Who switches it on meanwhile would have it write into the image.
        with instance.machine.staying_off():
            base = layers.chain(instance.instance_path)[-1]
            image = layers.LayerStore(instance.instance_dir.parent).freeze(
                instance.instance_path, f"{make_name(instance.name)}.img"
            )
        store.inherit(image, base, source=f"snapshot of {instance.name}")
        self.created_images.append(str(image))
        self._log.info("Snapshot of %s: %s", instance.name, image)
        return str(image)

    def _clean_running(self, instance: QemuInstance) -> bool:
        """Clean an instance; False when it is off, or was told to go off and does so meanwhile."""
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

    def clean(self) -> list[Exception]:
        """Delete every instance and image that this cloud made, and its directory.

        Returns:
            The errors met on the way; empty when nothing is left.
        """
        errors = super().clean()
        try:
            if self._remove_own_keys is not None:
                self._remove_own_keys()
                own, self._keys, self._remove_own_keys = self._keys, None, None
                # One that was set by use_key() stays.
                if self._key_pair is not None and _is_in(self._key_pair, own):
                    self._key_pair = None
            layers.LayerStore(self.parent_dir).remove_if_empty()
            self.parent_dir.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                errors.append(error)
            elif not errors:
                # Another cloud of the same tag works here, too.
                with contextlib.suppress(FileNotFoundError):  # they were about to remove it
                    others = ", ".join(sorted(file.name for file in self.parent_dir.iterdir()))
                    self._log.info("%s is kept: others have %s in it", self.parent_dir, others)
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

    def _make_instance(self, machine: Machine, key_pair: KeyPair, username: str) -> QemuInstance:
        instance = QemuInstance(key_pair, machine, self._ports, username, self)
        instance.artifacts_dir = self.settings.artifacts_dir
        return instance

    def _key_for(self, rundir: RunDirectory) -> KeyPair:
        """Return the key to keep with a machine: a copy of one that goes with this object."""
        key_pair = self.key_pair
        if self._keys is None:
            return key_pair
        return key_of_machine(key_pair, self._keys, rundir)

    def forget(self, instance: QemuInstance) -> None:
        """Take note that an instance is deleted; called by the instance."""
        with contextlib.suppress(ValueError):
            self.created_instances.remove(instance)

    def _make_key_pair(self, name: str) -> KeyPair:
        # One of its own for each cloud object: several may share the tag, and each cleans up.
        with self.settings.naming("working_dir"):
            keys = create_owned_directory(
                self.parent_dir / f"{_KEYS}-{secrets.token_hex(4)}", Orphans.REAP
            )
        # Gone with this object at the latest; machines that live on have a copy.
        self._keys = keys
        self._remove_own_keys = weakref.finalize(self, _remove_keys, keys, os.getpid())
        return generate_key_pair(keys, name)


def _remove_keys(directory: Path, owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        return  # a forked child's copy of the object
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):  # there is something else in it
        directory.parent.rmdir()


def _is_in(key_pair: KeyPair, directory: Path | None) -> bool:
    path = key_pair.public_key_path
    return path is not None and Path(path).parent == directory


def _default_user(image: Path) -> str:
    record = store.find_record(image)
    return record.default_user if record else store.DEFAULT_USER
