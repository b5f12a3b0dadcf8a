"""Saved machines: what is kept of a running machine so that others can continue from that moment.

Beside the image of its disk, `NAME.img`, stands a directory, `NAME.img.live`:

    memory       the guest's memory, sparse; machines map it copy-on-write
    state        the state of processors and devices, as QEMU's migration writes it
    seed.iso     the seed it was started with
    known_hosts  its SSH host keys
    console.log  what it had written to its console, of one that was stopped in its first boot
    id_*         the SSH key to log in with, if it is one that goes with the machine
    saved.json   what machine it is, and what is needed to restore it

Memory and state contain the guest's secrets: only their owner can read them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.documents import decode, parse_json, read_kernel_file
from pycloudlib._base.files import (
    is_directory,
    is_not_found,
    replace_atomically,
    write_private,
)
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.parts.standard import CONSOLE_LOG, SEED_FILE
from pycloudlib.qemu.state.rundir import LoginFacts
from pycloudlib.qemu.state.spec import MachineSpec

_log = logging.getLogger(__name__)

FORMAT = 2
"""Changes with all that decides whether a saved machine can be restored: above all the devices."""

_SUFFIX = ".live"
_FACTS = "saved.json"


@dataclass(frozen=True, slots=True)
class SavedMachine:
    """A machine that was saved, from which others can continue.

    Attributes:
        image: The image of its disk.
        spec: What machine it was.
        login: How to log in.
        host: The host that it needs; see `host_fingerprint`.
        helper: Whether the helper runs in it.
        saved_at: When it was saved, in seconds since the epoch.
        rtc_lag: Seconds by which its real-time clock is behind the host's, for a starting point: a
            machine that was stopped before it read its seed. None for any other.
        memory_mark: Shows a change of its memory: size and time, since reading all of it would take
            longer than all else together.
        state_mark: The same of its state.
        disk_mark: The same of the image; empty of one that was saved by an older version.
        further_marks: The same of its other disks, in the order of its parts.
    """

    image: Path
    spec: MachineSpec
    login: LoginFacts
    host: str
    helper: bool
    saved_at: float
    rtc_lag: float | None = None
    memory_mark: str = ""
    state_mark: str = ""
    disk_mark: str = ""
    further_marks: tuple[str, ...] = ()

    @property
    def is_starting_point(self) -> bool:
        """Whether it is where first boots begin, not a machine that has booted."""
        return self.rtc_lag is not None

    @property
    def directory(self) -> Path:
        """Where its files are."""
        return directory_of(self.image)

    @property
    def memory(self) -> Path:
        """Its memory."""
        return self.directory / "memory"

    @property
    def state(self) -> Path:
        """The state of its processors and devices."""
        return self.directory / "state"

    @property
    def seed(self) -> Path:
        """The seed it was started with."""
        return self.directory / SEED_FILE

    @property
    def further_disks(self) -> tuple[Path, ...]:
        """Its disks beside the root disk."""
        return tuple(disk.kept_beside(self.image) for disk in self.spec.own_disks if disk.suffix)

    @property
    def console_log(self) -> Path:
        """What it had written to its console, where that is part of what comes after."""
        return self.directory / CONSOLE_LOG

    @property
    def known_hosts(self) -> Path:
        """Its SSH host keys."""
        return self.directory / "known_hosts"

    def find_obstacle(self, host: str) -> str | None:
        """Return why it cannot be restored here; None when it can."""
        if host != self.host:
            return "it was saved by another QEMU, on another processor or with another accelerator"
        marks = {
            self.memory: self.memory_mark,
            self.state: self.state_mark,
            self.image: self.disk_mark,
            **dict(zip(self.further_disks, self.further_marks, strict=False)),
        }
        for file, mark in marks.items():
            try:
                changed = mark and _mark(file) != mark
            except OSError as error:
                if not is_not_found(error):
                    raise
                return f"{file} is missing"
            if changed:
                return f"{file} was changed since"
        return None


@dataclass(frozen=True, slots=True)
class _KeptFacts:
    """What is written in its file of a saved machine; see `SavedMachine`."""

    spec: MachineSpec
    login: LoginFacts
    host: str
    helper: bool
    saved_at: float
    rtc_lag: float | None
    memory_mark: str
    state_mark: str
    disk_mark: str = ""
    further_marks: tuple[str, ...] = ()


def directory_of(image: Path) -> Path:
    """Return the directory of what is kept beside an image; it need not exist."""
    return image.with_name(f"{image.name}{_SUFFIX}")


def find(image: Path) -> SavedMachine | None:
    """Find the saved machine that belongs to an image; None for an image of a disk alone."""
    try:
        if not _is_own(directory_of(image)):
            return None
        facts = parse_json((directory_of(image) / _FACTS).read_bytes())
        if isinstance(facts, dict) and facts.pop("format", None) != FORMAT:
            _log.warning("%s was saved in another format; only its disk is used", image)
            return None
        kept = decode(_KeptFacts, facts)
        return SavedMachine(image, **{key: getattr(kept, key) for key in _KeptFacts.__slots__})
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and is_not_found(error):
            return None
        _log.warning("%s is damaged (%s); only its disk is used", directory_of(image), error)
        return None


def _is_own(directory: Path) -> bool:
    """Whether a directory is this user's alone: what is in it is run as this user."""
    facts = directory.lstat()
    own = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid()
    if not own or facts.st_mode & 0o022:
        _log.warning("%s is not this user's alone; only the disk beside it is used", directory)
        return False
    return True


def host_fingerprint(binary: Path, accelerator: Accelerator) -> str:
    """Return a digest of what a saved state depends on: QEMU build, accelerator, processor."""
    build = binary.stat()
    facts = [str(binary.resolve()), build.st_size, build.st_mtime_ns, accelerator.value]
    for line in read_kernel_file("/proc/cpuinfo").splitlines():
        if line.startswith(("model name", "flags")):
            facts.append(line)
        if not line:  # the first processor stands for all
            break
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def delete(image: Path) -> None:
    """Remove what is kept beside an image; a directory of another kind stays."""
    directory = directory_of(image)
    if is_directory(directory) and any(
        (directory / name).exists() for name in (_FACTS, "state", "memory")
    ):
        shutil.rmtree(directory)
    elif is_directory(directory):
        with contextlib.suppress(OSError):  # something else is in it
            directory.rmdir()


def relocate(saved: SavedMachine, directory: Path, final: Path) -> LoginFacts:
    """Return how to log in with the keys in a directory, by the name that it is going to have."""

    def there(path: str | None) -> str | None:
        kept = path is not None and (directory / Path(path).name).exists()
        return str(final / Path(path).name) if kept and path is not None else path

    login = saved.login
    return LoginFacts(login.username, there(login.public_key_path), there(login.private_key_path))


def _mark(file: Path) -> str:
    facts = file.stat()
    return f"{facts.st_size} {facts.st_mtime_ns}"


def write_facts(saved: SavedMachine, login: LoginFacts) -> SavedMachine:
    """Write what machine it is; return it as it was written."""
    marked = dataclasses.replace(
        saved,
        login=login,
        memory_mark=_mark(saved.memory),
        state_mark=_mark(saved.state),
        disk_mark=_mark(saved.image),
        further_marks=tuple(map(_mark, saved.further_disks)),
    )
    plain = {"spec": json.loads(saved.spec.to_json()), "login": dataclasses.asdict(login)}
    facts = {key: plain.get(key, getattr(marked, key)) for key in _KeptFacts.__slots__}
    # Written last: with it, the saved machine is complete.
    with replace_atomically(saved.directory / _FACTS) as temporary:
        write_private(temporary, json.dumps({"format": FORMAT, **facts}, indent=1) + "\n")
    return marked


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Make a private directory; it is removed when the block fails."""
    path.mkdir(mode=0o700)
    try:
        yield path
    except BaseException:
        shutil.rmtree(path)
        raise
