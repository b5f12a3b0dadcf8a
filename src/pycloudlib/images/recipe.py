"""What a locally built image consists of: the recipe, its packages, its files, its digest.

Nothing here touches the disk. The content of an image is a function of its recipe, so that the
digest (`BuildRecipe.key`) shows whether a stored image is the one asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pycloudlib.images.download import shown_url

RELEASES = ("bookworm", "trixie")
"""The Debian releases that can be built."""

ROOT_LABEL = "cloudimg-rootfs"
"""Label of the root file system, Ubuntu's: kernel command lines name the root disk by it."""

RECIPE_VERSION = 1
"""Raised when the way an image is made changes in a manner that the rest of the key misses."""

BASE_PACKAGES = (
    # What a machine needs to boot and be reached.
    "systemd-sysv",
    "udev",  # without it systemd waits 90 s for /dev/ttyS0
    "initramfs-tools",
    "zstd",  # the initrd's compression: unpacked twice as fast as gzip in emulation
    "dbus",
    "libpam-systemd",
    "login",
    "passwd",
    "netplan.io",
    "systemd-resolved",
    "libnss-resolve",
    "systemd-timesyncd",
    "openssh-server",
    "cloud-init",
    "cloud-guest-utils",  # growpart
    "fdisk",  # growpart uses it
    "e2fsprogs",
    "python3",
    "sudo",
    "ca-certificates",
    # Small things that users of a cloud image take for granted.
    "curl",
    "gpg",
    "iproute2",
    "iputils-ping",
    "less",
    "locales",  # for a user-data's `locale:`; nothing is generated ahead
    "netbase",
    "procps",
    "tzdata",
)
"""Installed into every image, beside the kernel."""

# They cost boot time or hold apt's lock in a machine that lives for minutes. Disabled, not masked:
# `systemctl enable` still works.
_DISABLED_UNITS = (
    "multi-user.target.wants/e2scrub_reap.service",  # only does something on LVM
    "timers.target.wants/apt-daily.timer",
    "timers.target.wants/apt-daily-upgrade.timer",
)

_UNWANTED_FILES = (
    # Every machine makes its own of these.
    "/etc/hostname",
    "/etc/ssh/ssh_host_*_key*",
    "/var/lib/dbus/machine-id",
    "/var/lib/systemd/random-seed",
    # Left by the installation.
    "/etc/dpkg/dpkg.cfg.d/99mmdebstrap",
    "/initrd.img.old",
    "/vmlinuz.old",
    *(f"/etc/systemd/system/{unit}" for unit in _DISABLED_UNITS),
)

_USER_GROUPS = (
    *("adm", "audio", "cdrom", "dialout", "dip", "floppy", "netdev", "plugdev", "sudo", "video"),
)
"""Groups of the default user, as on Ubuntu."""

_DEFAULT_MIRROR = "http://deb.debian.org/debian"

_PACKAGE_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")  # Debian policy 5.6.1
_USER_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")  # what adduser and useradd accept
_MIRROR = re.compile(r"https?://[^\s\[\]\"'\\]+")
_MIN_DISK_GIB, _MAX_DISK_GIB = 2, 2048  # 2048: more than that fits no GPT tool's 32 bits of sectors


@dataclass(frozen=True, slots=True)
class GuestFile:
    """A file of the image that no package brings.

    Attributes:
        path: Absolute path in the guest.
        content: What is in it.
        link: Where it points to, when it is a symbolic link.
        mode: Its permission bits.
    """

    path: str
    content: str = ""
    link: str = ""
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class BuildRecipe:
    """Everything that decides what is built.

    Attributes:
        release: Debian release: "bookworm" or "trixie".
        packages: Names of further Debian packages to install; their order does not matter.
        default_user: The login user that cloud-init creates.
        kernel: The kernel's package: "linux-image-cloud-amd64" is small and has virtio only,
            "linux-image-amd64" is the generic one with IDE, AHCI and e1000.
        disk_size_gib: Virtual size of the disk; the guest grows its file system into a larger one.
        mirror: Debian mirror, also written into the guest's apt sources.

    Raises:
        ValueError: A value that nothing can be built from; names it and what is expected.
    """

    release: str = "bookworm"
    packages: tuple[str, ...] = ()
    default_user: str = "ubuntu"
    kernel: str = "linux-image-cloud-amd64"
    disk_size_gib: int = 3
    mirror: str = _DEFAULT_MIRROR

    def __post_init__(self) -> None:
        if self.release not in RELEASES:
            raise ValueError(
                f"Cannot build an image of {self.release!r}: known releases are "
                f"{', '.join(RELEASES)}"
            )
        if isinstance(self.packages, str):
            raise ValueError(f"packages is a sequence of names, not the string {self.packages!r}")
        for name in (*self.packages, self.kernel):
            if not isinstance(name, str) or not _PACKAGE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a Debian package")
        if not _USER_NAME.fullmatch(self.default_user) or self.default_user == "root":
            raise ValueError(
                f"{self.default_user!r} cannot be the default user: expected a name of 1 to 32 "
                "characters of a-z 0-9 _ - that begins with a letter, and not root"
            )
        size = self.disk_size_gib
        if type(size) is not int or not _MIN_DISK_GIB <= size <= _MAX_DISK_GIB:
            raise ValueError(
                f"disk_size_gib is {size!r}: expected a whole number from {_MIN_DISK_GIB} to "
                f"{_MAX_DISK_GIB}"
            )
        if "@" in self.mirror:
            raise ValueError(
                f"mirror carries a name or a password for {shown_url(self.mirror)}, which every "
                "user of the image could read, and of this host during the build; name one "
                "that asks for none, or a proxy (http_proxy)"
            )
        if not _MIRROR.fullmatch(self.mirror):
            raise ValueError(
                f"mirror is {self.mirror!r}: expected an address such as {_DEFAULT_MIRROR}"
            )
        # One spelling for one set of packages: they decide what is built, not how it was written.
        object.__setattr__(self, "packages", tuple(sorted(set(self.packages))))
        object.__setattr__(self, "mirror", self.mirror.rstrip("/"))

    @property
    def key(self) -> str:
        """Digest of everything that goes into the image: equal keys, equal recipes."""
        return _key(self)

    @property
    def image_name(self) -> str:
        """File name of the image, in the manner of Ubuntu's."""
        return f"{self.release}-server-cloudimg-amd64.img"


@functools.cache
def _key(recipe: BuildRecipe) -> str:
    # Of no build in particular: a newer build of the same recipe has the same key.
    return compute_key(recipe, list_guest_files(recipe, serial=""))


def compute_key(recipe: BuildRecipe, files: Iterable[GuestFile]) -> str:
    """Return the key of a recipe whose images get these files."""
    ingredients = (
        RECIPE_VERSION,
        dataclasses.astuple(recipe),
        list_packages(recipe),
        list_apt_sources(recipe),
        [dataclasses.astuple(file) for file in files],
        _UNWANTED_FILES,
        CONFIGURE_SCRIPT,
    )
    return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:16]


def list_packages(recipe: BuildRecipe) -> tuple[str, ...]:
    """Return the packages to install, beside the ones every Debian system has."""
    return tuple(dict.fromkeys((recipe.kernel, *BASE_PACKAGES, *recipe.packages)))


def list_apt_sources(recipe: BuildRecipe) -> tuple[str, ...]:
    """Write the lines of apt's sources, for the installation and for the guest."""
    release, mirror = recipe.release, recipe.mirror
    return (
        f"deb {mirror} {release} main",
        f"deb {mirror} {release}-updates main",
        f"deb {_security_mirror(mirror)} {release}-security main",
    )


def _security_mirror(mirror: str) -> str:
    # Mirrors have the security archive beside the main one, if they have it. A mirror at an
    # unusual place is not guessed about.
    if mirror.endswith("/debian"):
        return f"{mirror}-security"
    return f"{_DEFAULT_MIRROR}-security"


def list_unwanted_files() -> tuple[str, ...]:
    """Return what the installation leaves and the image must not have, as shell patterns."""
    return _UNWANTED_FILES


def list_guest_files(recipe: BuildRecipe, serial: str) -> tuple[GuestFile, ...]:
    """Write the files of the image that no package brings, for the build with this serial."""
    return (
        GuestFile("/etc/apt/sources.list", "\n".join(list_apt_sources(recipe)) + "\n"),
        GuestFile("/boot/grub/grub.cfg", _GRUB_CFG),
        # Which build this is, where Ubuntu's images say it and programs look.
        GuestFile("/etc/cloud/build.info", f"build_name: server\nserial: {serial}\n"),
        # Sorted after the packages' own files and before a user's 99-….cfg.
        GuestFile("/etc/cloud/cloud.cfg.d/91_pycloudlib.cfg", _cloud_cfg(recipe)),
        GuestFile("/etc/default/locale", "LANG=C.UTF-8\n"),
        GuestFile("/etc/fstab", f"LABEL={ROOT_LABEL} / ext4 discard,errors=remount-ro 0 1\n"),
        GuestFile("/etc/hosts", _HOSTS),
        # Empty, not missing: an id is made at boot without the ceremony of systemd's first boot.
        GuestFile("/etc/machine-id", mode=0o444),
        GuestFile("/etc/resolv.conf", link="../run/systemd/resolve/stub-resolv.conf"),
        # Ubuntu's setting; cloud-init's own file (50-…) comes first when a user asks otherwise.
        GuestFile(
            "/etc/ssh/sshd_config.d/60-cloudimg-settings.conf", "PasswordAuthentication no\n"
        ),
        # It asks questions on the console.
        GuestFile("/etc/systemd/system/systemd-firstboot.service", link="/dev/null"),
        # It would mount the EFI system partition, which is empty, at /efi.
        GuestFile("/etc/systemd/system-generators/systemd-gpt-auto-generator", link="/dev/null"),
    )


def _cloud_cfg(recipe: BuildRecipe) -> str:
    # JSON is YAML, and a value needs no quoting rules of its own.
    default_user = {
        "name": recipe.default_user,
        "gecos": recipe.default_user.capitalize(),
        "lock_passwd": True,
        "shell": "/bin/bash",
        "sudo": ["ALL=(ALL) NOPASSWD:ALL"],
        "groups": list(_USER_GROUPS),
    }
    lines = (
        "# How this image differs from the cloud-init package's defaults.",
        # Anything else is searched for by probing the network, for minutes.
        "datasource_list: [ NoCloud, None ]",
        # Debian's default is made by locale-gen, which is slow and not installed.
        "locale: C.UTF-8",
        f"system_info: {json.dumps({'default_user': default_user})}",
    )
    return "\n".join(lines) + "\n"


# The symbolic links follow the newest kernel, so this file never has to be made again.
_GRUB_CFG = f"""\
serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
set timeout=0
menuentry "Debian GNU/Linux" {{
    linux /vmlinuz root=LABEL={ROOT_LABEL} ro console=tty1 console=ttyS0
    initrd /initrd.img
}}
"""

_HOSTS = """\
127.0.0.1 localhost

::1 ip6-localhost ip6-loopback
fe00::0 ip6-localnet
ff00::0 ip6-mcastprefix
ff02::1 ip6-allnodes
ff02::2 ip6-allrouters
"""

# $1 is the system's directory, $2 the handover directory; the rest are patterns of files to remove.
CONFIGURE_SCRIPT = """\
set -eu
rootfs=$1 handover=$2
shift 2
for pattern; do
    rm -f -- "$rootfs"$pattern
done
tar --extract --file="$handover/guest-files.tar" --directory="$rootfs" --unlink-first
# Made by cloud-init otherwise, with the id that the default user should have.
chroot "$rootfs" groupadd --system --force netdev
# Everything is up to date: without these systemd runs ldconfig and others at the first boot.
touch "$rootfs/etc/.updated" "$rootfs/var/.updated"
cat "$rootfs/vmlinuz" >"$handover/kernel"
cat "$rootfs/initrd.img" >"$handover/initrd"
"""
"""Makes a cloud image of an installed system; a shell script."""
