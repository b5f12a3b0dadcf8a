"""What is asked of a launch: read and checked whole, before anything is made."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pycloudlib._base.files import expand_user, is_file
from pycloudlib.errors import MissingKernelError
from pycloudlib.guest.access import hostkeys, loginkey
from pycloudlib.guest.data import seed as nocloud
from pycloudlib.images import store
from pycloudlib.key import KeyPair
from pycloudlib.qemu.disk import diskimage, layers
from pycloudlib.qemu.parts.furtherdisk import Disk, FurtherDisk, parse_disks
from pycloudlib.qemu.parts.part import Part
from pycloudlib.qemu.parts.standard import InstanceType, KernelBoot
from pycloudlib.qemu.state.spec import (
    DEFAULT_INSTANCE_TYPE,
    MachineSpec,
    complete_cmdline,
    make_name,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SeedRequest:
    """What the caller wants cloud-init to be given; see `guest.seed.build_seed`."""

    public_key: str
    user_data: str | bytes | None = None
    meta_data: nocloud.Document = None
    vendor_data: nocloud.Document = None
    network_config: nocloud.Document = None

    @property
    def decides_host_keys(self) -> bool:
        """Whether the caller's data says anything of SSH host keys, or may."""
        documents = {"user_data": self.user_data, "vendor_data": self.vendor_data}
        return any(
            hostkeys.are_decided_by(nocloud.encode_document(name, document) or b"", name)
            for name, document in documents.items()
        )


@dataclass(frozen=True, slots=True)
class AskedParts:
    """The parts that are asked for, beside those that every machine has; checked.

    Attributes:
        kernel_boot: The kernel to load directly; None to boot from the disk.
        disks: Disks beside the root disk.
    """

    kernel_boot: KernelBoot | None = None
    disks: tuple[FurtherDisk, ...] = ()

    @property
    def all(self) -> tuple[Part, ...]:
        """All of them."""
        return (*self.disks, *(() if self.kernel_boot is None else (self.kernel_boot,)))


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What the caller of a launch asks for, as it was given; see `Qemu.launch`."""

    instance_type: str | None = DEFAULT_INSTANCE_TYPE
    user_data: str | bytes | None = None
    meta_data: nocloud.Document = None
    vendor_data: nocloud.Document = None
    network_config: nocloud.Document = None
    kernel_cmdline: str = ""
    kernel_path: str | Path | None = None
    no_seed_iso: bool = False
    username: str | None = None
    launch_args: Sequence[str] | None = None
    name: str | None = None
    disk_size_gib: int | None = None
    disks: Sequence[int | Disk] | None = None

    def __post_init__(self) -> None:
        if self.username is not None and not isinstance(self.username, str):
            raise TypeError(f"username must be a text, not {self.username!r}")
        for name in ("user_data", "meta_data", "vendor_data", "network_config"):
            nocloud.check_type(name, getattr(self, name))

    def to_plain(self) -> dict[str, str]:
        """Return each option that decides what the machine is like, as text."""
        decisive = (name for name in LaunchOptions.__slots__ if name != "name")
        return {name: repr(getattr(self, name)) for name in decisive}

    def name_with(self, tag: str) -> str:
        """Return the machine's name: the chosen one, or one made from its cloud's tag."""
        return make_name(tag) if self.name is None else self.name

    def find_parts(self, image: Path, working_dir: Path) -> AskedParts:
        """Check the parts that are asked for, beside those that every machine has.

        Args:
            image: The image of the root disk.
            working_dir: Where the directories of clouds are; see `look_at`.

        Raises:
            ValueError: One of them cannot be.
            FileNotFoundError: A file of one is not there.
            MissingKernelError: There is no kernel for `kernel_cmdline`.
        """
        look = partial(look_at, working_dir=working_dir, root=image)
        return AskedParts(
            find_kernel_boot(image, self.kernel_cmdline, self.kernel_path),
            parse_disks(self.disks, look),
        )

    def changes_to(self, spec: MachineSpec) -> list[str]:
        """Name the options that ask for another machine than one that exists already."""
        changes = [name for name in _MACHINE_OPTIONS if getattr(self, name)]
        if self.instance_type not in (None, DEFAULT_INSTANCE_TYPE, str(spec.instance_type)):
            changes.insert(0, "instance_type")
        return changes


_MACHINE_OPTIONS = (
    "meta_data",
    "vendor_data",
    "network_config",
    "kernel_cmdline",
    "kernel_path",
    "no_seed_iso",
    "launch_args",
    "disk_size_gib",
    "disks",
)


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """A machine as it is asked for, everything in it checked.

    Attributes:
        name: The instance's name.
        image: The image to start from.
        instance_type: Processors and memory.
        seed: Data for cloud-init; None for a machine without a seed.
        kernel_boot: The kernel to load directly; None to boot from the disk.
        launch_args: Further arguments for QEMU.
        disk_size: Length of its disk in bytes; None for the usual one.
        disks: Disks beside the root disk.
    """

    name: str
    image: diskimage.BaseImage
    instance_type: InstanceType
    seed: SeedRequest | None
    kernel_boot: KernelBoot | None
    launch_args: tuple[str, ...]
    disk_size: int | None = None
    disks: tuple[FurtherDisk, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that are asked for, beside those that every machine has."""
        return AskedParts(self.kernel_boot, self.disks).all

    @property
    def needs(self) -> tuple[Path, ...]:
        """The files that must not be deleted meanwhile, beside the image."""
        return tuple(file for part in self.parts for file in part.needs)


def look_at(
    image: Path, write: bool, *, working_dir: Path, root: Path | None = None
) -> diskimage.BaseImage:
    """Look at the image of a further disk before it is trusted.

    Args:
        image: The image.
        write: Whether the machine is to write to it.
        working_dir: Where the directories of clouds are.
        root: The image of the root disk, if the disk is one of a new machine.

    Raises:
        ValueError: It is damaged or unsafe, or machines are made of it and it would change.
        ImageInUseError: It would change under instances or snapshots that are built on it.
    """
    if write:
        place = image.resolve()
        kept = store.find_record(image) is not None or place.is_relative_to(working_dir.resolve())
        if kept or (root is not None and place == root.resolve()):
            raise ValueError(
                f"The image {image} is one that machines are made of, and with write=True it would "
                "change: leave that out, or copy the image and give the copy"
            )
        with layers.deleting(image, working_dir):
            pass  # nothing is built on it, which is what the deletion of an image needs, too
    return diskimage.inspect_image(image, working_dir)


def parse_launch_args(launch_args: Sequence[str] | None) -> tuple[str, ...]:
    """Check the caller's arguments for QEMU.

    Raises:
        TypeError: They are not a list of texts.
        ValueError: One of them is none that a program can be given.
    """
    if launch_args is None:
        return ()
    if (
        isinstance(launch_args, (str, bytes))
        or not isinstance(launch_args, Iterable)
        or not all(isinstance(argument, str) for argument in launch_args)
    ):
        raise TypeError(
            f"launch_args must be a list of texts such as ['-device', 'pvpanic'], "
            f"not {launch_args!r}"
        )
    for argument in launch_args:
        _check_argument("launch_args", argument)
    return tuple(launch_args)


def find_kernel_boot(
    image: Path, kernel_cmdline: str, kernel_path: str | Path | None
) -> KernelBoot | None:
    """Find the kernel to load directly, when one is asked for.

    Args:
        image: The image; beside it may be its own kernel and initrd.
        kernel_cmdline: The caller's kernel command line.
        kernel_path: The caller's kernel, if any.

    Raises:
        MissingKernelError: A command line without a kernel to give it to.
        ValueError: A command line that no program can be given.
        TypeError: One of them is neither a text nor a path.
        FileNotFoundError: The caller's kernel is not there.
    """
    if not kernel_cmdline and kernel_path is None:
        return None
    _check_kernel_types(kernel_cmdline, kernel_path)
    kernel = store.kernel_path(image) if kernel_path is None else expand_user(kernel_path)
    if not is_file(kernel):
        if kernel_path is not None:
            raise FileNotFoundError(f"kernel_path {str(kernel_path)!r} is not a file")
        raise MissingKernelError(
            f"kernel_cmdline {kernel_cmdline!r} needs a kernel: give kernel_path, or use an image "
            f"that was downloaded or built by this package (there is no {kernel})"
        )
    initrd = _find_initrd(kernel)
    return KernelBoot(
        kernel.absolute(), initrd, complete_cmdline(kernel_cmdline, has_initrd=initrd is not None)
    )


def _check_kernel_types(kernel_cmdline: str, kernel_path: str | Path | None) -> None:
    if not isinstance(kernel_cmdline, str):
        raise TypeError(f"kernel_cmdline must be a text, not {kernel_cmdline!r}")
    _check_argument("kernel_cmdline", kernel_cmdline)
    if kernel_path is not None and not isinstance(kernel_path, (str, os.PathLike)):
        raise TypeError(f"kernel_path must be a path, not {kernel_path!r}")


def _check_argument(name: str, text: str) -> None:
    """Make sure that a text can be handed to a program (execve(2))."""
    try:
        possible = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ValueError(f"{name} holds {text!r}, which no program can be given")


def _find_initrd(kernel: Path) -> Path | None:
    """Find what stands beside a kernel under the names that distributions give it."""
    for name in ("initrd", "initrd.img"):
        initrd = kernel.with_name(kernel.name.replace("vmlinuz", name))
        if initrd.name != kernel.name and is_file(initrd):
            return initrd.absolute()
    return None


def make_seed(
    request: LaunchRequest,
    host_keys: Sequence[hostkeys.HostKey] = (),
    boothook: bytes | None = None,
) -> nocloud.Seed:
    """Build the seed of a machine that has one; errors are those of `build_seed`."""
    assert request.seed is not None
    seed = nocloud.build_seed(
        instance_id=f"iid-{uuid.uuid4()}",
        hostname=request.name,
        host_keys=host_keys,
        public_key=request.seed.public_key,
        user_data=request.seed.user_data,
        meta_data=request.seed.meta_data,
        vendor_data=request.seed.vendor_data,
        network_config=request.seed.network_config,
        boothook=boothook,
    )
    for part in request.parts:
        seed = part.complete_seed(seed)
    return seed


def check_request(
    options: LaunchOptions, image: Path, key: KeyPair, tag: str, working_dir: Path
) -> LaunchRequest:
    """Check what is asked for as a whole.

    Args:
        options: What was asked for.
        image: The image.
        key: The SSH key that the guest is to let in.
        tag: The cloud's tag, from which a name is made.
        working_dir: Where a copy of an image's beginning may be looked at; see `inspect_image`.

    Raises:
        ValueError: One of the options is malformed, or the image is damaged or unsafe.
        InvalidKeyError: A file of the key is missing, or is no key.
        MissingKernelError: There is no kernel for `kernel_cmdline`.
    """
    data = (options.user_data, options.meta_data, options.vendor_data, options.network_config)
    if options.no_seed_iso and data != (None,) * len(data):
        _log.warning("no_seed_iso leaves out the seed, and the data given for it")
    if not options.no_seed_iso:
        # Once more: its files may have come, or gone, since it was chosen.
        loginkey.prove(key, "the cloud's SSH key")
    seed = SeedRequest(key.public_key_line, *data)
    base = diskimage.inspect_image(image, working_dir)
    asked = options.find_parts(image, working_dir)
    return LaunchRequest(
        name=options.name_with(tag),
        instance_type=InstanceType.parse(
            DEFAULT_INSTANCE_TYPE if options.instance_type is None else options.instance_type
        ),
        launch_args=parse_launch_args(options.launch_args),
        seed=None if options.no_seed_iso else seed,
        image=base,
        disk_size=diskimage.parse_size(options.disk_size_gib, base),
        kernel_boot=asked.kernel_boot,
        disks=asked.disks,
    )
