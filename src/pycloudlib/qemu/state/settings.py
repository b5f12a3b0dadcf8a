"""Section `[qemu]` of the configuration, parsed once into values."""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycloudlib._base.documents import nearest, safe_repr
from pycloudlib._base.files import expand_user, is_directory, is_file
from pycloudlib.errors import CloudSetupError
from pycloudlib.qemu.host.accelerator import AUTO, SETTINGS
from pycloudlib.qemu.host.budget import Budget, Capacity
from pycloudlib.qemu.host.ownership import Orphans

_log = logging.getLogger(__name__)

CLOUD_PREFIX = "pycl-qemu-"
"""How the names of clouds' directories begin, in `working_dir`; their tags follow."""
COMMAND_LINE_TAG = "cli"
"""The tag of the command line's own cloud."""
DEFAULT_BINARY = "qemu-system-x86_64"
_KNOWN_KEYS = (
    "accelerator",
    "artifacts_dir",
    "budget_memory_mib",
    "budget_processors",
    "fast_boot",
    "image_dir",
    "image_keyring",
    "image_lock",
    "image_mirror",
    "image_verification",
    "key_name",
    "offline",
    "orphans",
    "private_key_path",
    "public_key_path",
    "qemu_binary",
    "state_dir",
    "warm_cache_mib",
    "working_dir",
)
DEFAULT_WARM_CACHE_MIB = 20 * 1024
SIGNED = "signed"
_VERIFICATIONS = (SIGNED, "disabled")
_ORPHANS = tuple(orphans.value for orphans in Orphans)


@dataclass(frozen=True, slots=True)
class QemuSettings:
    """What can be configured of the QEMU cloud.

    Attributes:
        image_dir: Where images are looked up and stored.
        working_dir: Where instance directories go.
        state_dir: Where all other lasting files go.
        cache_dir: Where files go that can be made again.
        qemu_binary: Path or name of the QEMU binary.
        accelerator: `auto`, `kvm` or `tcg`.
        image_mirror: Base URL of the image server; None for Ubuntu's.
        image_keyring: File of the keys to trust for it; None for Ubuntu's, which are shipped.
        image_verification: `signed`, or `disabled`: then any server is believed.
        image_lock: File that pins builds; it need not exist. None for `pycloudlib.lock` in the
            directory that the program runs in.
        warm_cache_mib: MiB of disk that machines kept ready (`launch(..., warm=True)` and
            `fast_boot=True`) may use.
        fast_boot: Whether first boots begin at cloud-init, by default of `launch`.
        offline: Whether image servers are not asked.
        orphans: What becomes of a program's machines when it ends without deleting them.
        artifacts_dir: Where logs go when something fails; it need not exist. None for nowhere.
        budget_processors: How many processors machines may use at once, of all programs that wait
            until their machines fit; None for all that this program may use.
        budget_memory_mib: As much of the memory, in MiB; None for most of it.
    """

    image_dir: Path
    working_dir: Path
    state_dir: Path
    cache_dir: Path
    qemu_binary: str = DEFAULT_BINARY
    accelerator: str = AUTO
    image_mirror: str | None = field(default=None, repr=False)
    image_keyring: Path | None = None
    image_verification: str = SIGNED
    image_lock: Path | None = None
    warm_cache_mib: int = DEFAULT_WARM_CACHE_MIB
    fast_boot: bool = False
    offline: bool = False
    orphans: Orphans = Orphans.REAP_AFTER_CRASH
    artifacts_dir: Path | None = None
    budget_processors: int | None = None
    budget_memory_mib: int | None = None

    @classmethod
    def parse(cls, section: Mapping[str, Any], source: str) -> QemuSettings:
        """Read the section.

        Args:
            section: Keys and values as TOML has them.
            source: The file it comes from, for messages.

        Raises:
            ValueError: A value is of a wrong type, is none of the possible ones, or names a
                directory or file that does not exist; names the key, the value and the file.
            CloudSetupError: A directory is not configured, and there is no home where it would be.
        """
        _warn_of_unknown(section, source)
        reader = _Reader(section, source)
        image_dir, working_dir, state_dir, cache_dir = _find_directories(reader)
        return cls(
            image_dir=image_dir,
            working_dir=working_dir,
            state_dir=state_dir,
            cache_dir=cache_dir,
            qemu_binary=reader.path_or_name("qemu_binary") or DEFAULT_BINARY,
            accelerator=reader.one_of("accelerator", SETTINGS) or AUTO,
            image_mirror=reader.text("image_mirror"),
            image_keyring=reader.trusted_file("image_keyring"),
            image_verification=reader.one_of("image_verification", _VERIFICATIONS) or SIGNED,
            image_lock=reader.path("image_lock"),
            warm_cache_mib=reader.number("warm_cache_mib", DEFAULT_WARM_CACHE_MIB),
            fast_boot=reader.boolean("fast_boot", default=False),
            offline=reader.boolean("offline", default=False),
            artifacts_dir=reader.path("artifacts_dir"),
            orphans=Orphans(reader.one_of("orphans", _ORPHANS) or Orphans.REAP_AFTER_CRASH.value),
            budget_processors=reader.positive("budget_processors"),
            budget_memory_mib=reader.positive("budget_memory_mib"),
        )

    @property
    def capacity(self) -> Capacity:
        """What machines may use at once."""
        host = Capacity.of_host()
        return Capacity(
            self.budget_processors or host.processors, self.budget_memory_mib or host.memory_mib
        )

    def budget(self, whole: Capacity | None = None) -> Budget:
        """Return the budget that all programs of this user share.

        Args:
            whole: What machines may use at once; by default as configured.
        """
        return Budget(self.state_dir / "budget", whole or self.capacity)

    @contextlib.contextmanager
    def naming(self, *keys: str) -> Iterator[None]:
        """Name the key to set where an error is due to a directory that cannot be used.

        Args:
            keys: The keys of the directories that the block writes to.

        Raises:
            CloudSetupError: One of them cannot be written to.
        """
        try:
            yield
        except (OSError, CloudSetupError) as error:
            for key in keys:
                directory = getattr(self, key)
                obstacle = find_obstacle(directory)
                if obstacle is not None and _may_concern(error, directory):
                    raise CloudSetupError(
                        f"{key} {directory} cannot be used: {obstacle}. Let {key}, or state_dir "
                        "for all that is kept, in [qemu] name a directory of yours"
                    ) from error
            raise


def _may_concern(error: OSError | CloudSetupError, directory: Path) -> bool:
    """Whether an error may be of a directory: it names a path inside or above it."""
    named = getattr(error, "filename", None)
    if not isinstance(named, (str, bytes, os.PathLike)):
        return True
    path = Path(os.fsdecode(named))
    return path.is_relative_to(directory) or directory.is_relative_to(path)


DIRECTORIES = ("image_dir", "working_dir", "state_dir")
"""The keys of directories that are written to."""


def _find_directories(reader: _Reader) -> tuple[Path, Path, Path, Path]:
    """Find the four directories: those without a key of their own are below `state_dir`, if set."""
    image_dir, working_dir, state_dir = map(reader.directory, DIRECTORIES)
    if state_dir is not None:
        return (
            image_dir or state_dir / "images",
            working_dir or state_dir / "instances",
            state_dir,
            state_dir / "cache",
        )
    try:
        state = find_state_directory()
        return (
            image_dir or find_data_directory() / "images",
            working_dir or state / "instances",
            state,
            find_cache_directory(),
        )
    except CloudSetupError as error:
        raise CloudSetupError(
            f"{error}. Let state_dir in [qemu] name a directory of yours ({reader.source}; "
            "$PYCLOUDLIB_CONFIG may name a configuration file)"
        ) from None


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads values of one section; every error names the key, the value and the file."""

    section: Mapping[str, Any]
    source: str

    def error(self, key: str, expected: str) -> ValueError:
        from pycloudlib.images.download import shown_url  # noqa: PLC0415 - seldom

        value = safe_repr(self.section[key])
        # A value of a wrong type may contain a right one, with its password.
        told = shown_url(value) if key == "image_mirror" else value
        return ValueError(f"{key} in [qemu] of {self.source} is {told}, expected {expected}")

    def text(self, key: str) -> str | None:
        value = self.section.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise self.error(key, "a text")
        return value

    def number(self, key: str, default: int) -> int:
        value = self.section.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(key, "a whole number, not negative")
        return value

    def positive(self, key: str) -> int | None:
        if key not in self.section:
            return None
        value = self.section[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, "a whole number from 1")
        return value

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.section.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "true or false")
        return default if value is None else value

    def one_of(self, key: str, possible: tuple[str, ...]) -> str | None:
        value = self.text(key)
        if value is not None and value not in possible:
            raise self.error(key, f"one of {', '.join(possible)}")
        return value

    def path(self, key: str) -> Path | None:
        value = self.text(key)
        return None if value is None else expand_user(os.path.expandvars(value))

    def directory(self, key: str) -> Path | None:
        path = self.path(key)
        if path is not None and not is_directory(path):
            raise self.error(key, f"a directory that exists ({path} is not one)")
        return None if path is None else path.absolute()

    def file(self, key: str) -> Path | None:
        path = self.path(key)
        if path is not None and not is_file(path):
            raise self.error(key, f"a file that exists ({path} is not one)")
        return path

    def trusted_file(self, key: str) -> Path | None:
        """Read the path of a file that decides what is trusted.

        With a relative one, the directory in which a program happens to run would decide.
        """
        path = self.file(key)
        if path is not None and not path.is_absolute():
            raise self.error(key, "an absolute path, or one that begins with ~ or a variable")
        return path

    def path_or_name(self, key: str) -> str | None:
        path = self.path(key)
        return None if path is None else str(path)


def parse_orphans(value: str) -> Orphans:
    """Parse what becomes of a program's machines; raise ValueError for any other value."""
    if value not in _ORPHANS:
        raise ValueError(f"orphans is {value!r}, expected one of {', '.join(_ORPHANS)}")
    return Orphans(value)


def _warn_of_unknown(section: Mapping[str, Any], source: str) -> None:
    for key in section:
        if key not in _KNOWN_KEYS:
            near = nearest(key, _KNOWN_KEYS)
            hint = f"; did you mean {near!r}?" if near else ""
            _log.warning("Unknown key %r in [qemu] of %s is ignored%s", key, source, hint)


APPLICATION = "pycloudlib"


def find_home() -> Path:
    """Find the home directory of this user; it need not exist.

    Raises:
        CloudSetupError: There is none; says why.
    """
    home = os.environ.get("HOME")
    if home:
        if not Path(home).is_absolute():
            raise CloudSetupError(f"there is no home directory: $HOME is {home!r}, not absolute")
        return Path(home)
    user = os.getuid()
    try:
        home = pwd.getpwuid(user).pw_dir
    except KeyError:
        raise CloudSetupError(
            f"there is no home directory: $HOME is not set, and user {user} has no entry in passwd"
        ) from None
    if not Path(home).is_absolute():
        raise CloudSetupError(
            f"there is no home directory: $HOME is not set, and user {user} has {home!r} in passwd"
        )
    return Path(home)


def find_data_directory() -> Path:
    """Find where this package's data goes; raises as `find_home` does."""
    return _find("XDG_DATA_HOME", ".local/share")


def find_state_directory() -> Path:
    """Find where this package's state goes; raises as `find_home` does."""
    return _find("XDG_STATE_HOME", ".local/state")


def find_cache_directory() -> Path:
    """Find where this package's cache goes; raises as `find_home` does."""
    return _find("XDG_CACHE_HOME", ".cache")


def _find(variable: str, below_home: str) -> Path:
    # The specification has a relative path ignored.
    named = Path(os.environ.get(variable, ""))
    return (named if named.is_absolute() else find_home() / below_home) / APPLICATION


def find_obstacle(directory: Path) -> str | None:
    """Return why files cannot be made in a directory, which need not exist; None if they can."""
    try:
        place = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
        if not place.is_dir():
            return f"{place} is not a directory"
        if os.access(place, os.R_OK | os.W_OK | os.X_OK):
            return None
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return f"{place} cannot be written to"
