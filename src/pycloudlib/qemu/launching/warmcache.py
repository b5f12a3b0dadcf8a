"""Machines that are kept ready: saved once when they had booted, found again by what made them.

A cache below `working_dir`: each entry is a saved machine in a directory named by a digest of
everything that decides what the machine is like. What does not match is not found again, and is
dropped when space is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.documents import decode, parse_json
from pycloudlib._base.files import allocated_size, create_private_directory, is_file, write_private
from pycloudlib._base.locks import exclusive_lock, try_lock
from pycloudlib._version import __version__
from pycloudlib.errors import CloudError, ImageInUseError
from pycloudlib.images import store, uses
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.launching.beginning import Host
from pycloudlib.qemu.launching.request import (
    LaunchOptions,
    LaunchRequest,
    make_seed,
)
from pycloudlib.qemu.parts.part import Part
from pycloudlib.qemu.saved import restoring
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.savedmachine import SavedMachine

_log = logging.getLogger(__name__)

_DIRECTORY = "warm"
_DISK = "disk.img"
_UNFIT = ".unfit"
_GONE = ".gone"
# Between a key and what tells apart a second machine under it, while the first one's disk is used.
_AGAIN = "+"


@dataclass(frozen=True, slots=True)
class WarmImage:
    """A machine that is kept ready.

    Attributes:
        key: The digest by which it is found.
        image_id: Its id.
        base: The image that it was launched from.
        instance_type: Its size.
        size: Bytes that it takes on disk.
        last_used: When a copy of it was last launched, in seconds since the epoch.
        first_boot: Whether it is where first boots begin (`launch(..., fast_boot=True)`), not a
            machine that has booted (`warm=True`).
    """

    key: str
    image_id: str
    base: str
    instance_type: str
    size: int
    last_used: float
    first_boot: bool = False


def build_key(image: Path, options: LaunchOptions, host: Host, parts: Sequence[Part]) -> str:
    """Digest everything that decides what a machine is like when it has booted.

    Args:
        image: The image.
        options: What was asked for.
        host: What it runs on.
        parts: The parts that are asked for, checked.
    """
    return _digest(image, host, parts, options=options.to_plain())


def build_start_key(request: LaunchRequest, host: Host) -> str:
    """Digest everything that decides what a machine is like before it reads its seed."""
    # Its kernel has seen the disk by then.
    disk = {} if request.disk_size is None else {"disk_size": request.disk_size}
    return _digest(
        request.image.path,
        host,
        request.parts,
        instance_type=str(request.instance_type),
        volume_length=make_seed(request).volume_length,
        **disk,
    )


def _digest(image: Path, host: Host, parts: Sequence[Part], **more: object) -> str:
    """Digest what decides what a machine is like.

    Args:
        image: The image that it is launched from.
        host: What it runs on.
        parts: The parts that are asked for, beside those that every machine has.
        **more: What else decides it.
    """
    record = store.find_record(image)
    facts = {
        "format": savedmachine.FORMAT,
        "package": __version__,
        "host": savedmachine.host_fingerprint(host.binary, host.accelerator),
        "without": host.accelerator.slow_features,
        "image": _facts(image),
        "digest": record.sha256 if record else "",
        "parts": [[dict(part.key), [_facts(file) for file in part.needs]] for part in parts],
        **more,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]


class TooLargeError(CloudError):
    """A machine takes more than all that are kept ready may take.

    Attributes:
        size: Bytes that it takes.
    """

    def __init__(self, size: int, bound: int) -> None:
        self.size = size
        super().__init__(
            f"it takes {_mib(size)} MiB, and warm machines may take {bound >> 20} MiB in all "
            "(warm_cache_mib in [qemu])"
        )


@dataclass(frozen=True, slots=True)
class Unfit:
    """That a machine cannot be kept ready, so that no launch tries again.

    Attributes:
        reason: Why.
        until: When it is worth another try, in seconds since the epoch; None for never.
        size: Bytes that it takes, when the cache is too small for it.
    """

    reason: str
    until: float | None = None
    size: int = 0

    def holds(self, bound: int) -> bool:
        """Whether that still holds, with a cache of so many bytes."""
        return (self.until is None or time.time() < self.until) and not 0 < self.size <= bound


@dataclass(frozen=True, slots=True)
class WarmCache:
    """The machines that are kept ready for one user.

    Attributes:
        working_dir: Where the directories of clouds are; the cache is beside them.
        bound: Bytes that it may take on disk.
    """

    working_dir: Path
    bound: int

    @property
    def directory(self) -> Path:
        """Where the entries are."""
        return self.working_dir / _DIRECTORY

    @contextlib.contextmanager
    def making(self, key: str, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Keep others that ask for the same machine waiting while it is made."""
        lock = self._lock(key)
        with contextlib.ExitStack() as stack:
            while True:
                create_private_directory(self.directory)
                # Somebody who prunes may remove the directory that has nothing in it yet.
                with contextlib.suppress(FileNotFoundError):
                    stack.enter_context(exclusive_lock(lock, on_wait, remove=True))
                    break
            yield

    def _lock(self, key: str) -> Path:
        return self.directory / f"{key}.lock"

    def find(self, key: str, host: Host) -> SavedMachine | None:
        """Find a machine; None when there is none, or it cannot be restored here."""
        for entry in self._entries_of(key):
            image = entry / _DISK
            saved = savedmachine.find(image)
            if saved is None:
                continue
            files = (file for tip in layers.list_disks(image) for file in layers.chain(tip))
            missing = [str(file) for file in files if not file.is_file()]
            obstacle = saved.find_obstacle(
                savedmachine.host_fingerprint(host.binary, host.accelerator)
            ) or (f"{missing[0]} is missing" if missing else None)
            if obstacle is not None:
                _log.warning("The warm machine %s is not used: %s", image, obstacle)
                self.retire(saved)
                continue
            # When it was last used is told by the time of its directory, which may go just now.
            with contextlib.suppress(OSError):
                os.utime(entry)
            return saved
        return None

    def add(self, key: str, saved: SavedMachine) -> None:
        """Keep a machine that was saved; the least used are dropped to free space.

        Raises:
            TooLargeError: It is larger than the cache may be.
            OSError: It could not be written.
        """
        size = _size(saved.image)
        if size > self.bound:
            raise TooLargeError(size, self.bound)
        self.prune(self.bound - size)
        create_private_directory(self.directory)
        # Not one name for all: another that makes the same, without the lock, keeps its own.
        made = self.directory / f".{key}{_AGAIN}{secrets.token_hex(4)}.new"
        made.mkdir(mode=0o700)
        # What is there already was not found, so it is of no use.
        self.drop(key)
        entry = self.directory / key
        if os.path.lexists(entry):
            # Machines of today are built on its disk, which stays where it is.
            entry = entry.with_name(made.name[1:].removesuffix(".new"))
        try:
            # The same file under another name, as with every layer of a disk.
            os.link(saved.image, made / _DISK)
            restoring.copy_beside(saved, made / _DISK, entry / _DISK)
            made.rename(entry)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise

    def retire(self, saved: SavedMachine) -> None:
        """Hide a machine from launches; its disk stays while machines are built on that."""
        if not self._drop_entry(saved.image.parent):
            with contextlib.suppress(OSError):  # it is being removed
                savedmachine.delete(saved.image)

    def note_success(self, saved: SavedMachine) -> None:
        """Remember that a machine was restored from one."""
        with contextlib.suppress(OSError):  # it is being removed, or the disk is full
            self._success(saved).touch(mode=0o600)

    def has_worked(self, saved: SavedMachine) -> bool:
        """Whether a machine was ever restored from one."""
        return is_file(self._success(saved))

    @staticmethod
    def _success(saved: SavedMachine) -> Path:
        return saved.image.with_name("worked")

    def note_unfit(self, key: str, unfit: Unfit) -> None:
        """Remember that a machine cannot be kept ready."""
        try:
            create_private_directory(self.directory)
            write_private(self._unfit(key), json.dumps(dataclasses.asdict(unfit)))
        except OSError as error:
            # It is tried again then, which takes time and does no harm.
            _log.warning("%s cannot be written: %s", self._unfit(key), error)

    def why_unfit(self, key: str) -> str | None:
        """Return why a machine cannot be kept ready, if that is known."""
        try:
            unfit = decode(Unfit, parse_json(self._unfit(key).read_bytes()))
        except (OSError, ValueError):
            return None  # a damaged one says nothing
        return unfit.reason if unfit.holds(self.bound) else None

    def _unfit(self, key: str) -> Path:
        return self.directory / f"{key}{_UNFIT}"

    def entries(self) -> list[WarmImage]:
        """List the machines, the one that was used last first."""
        found = []
        for image in self._list(f"*/{_DISK}"):
            # Any of them may be dropped by another process, at any moment.
            with contextlib.suppress(FileNotFoundError):
                saved = savedmachine.find(image)
                if saved is not None and not image.parent.name.startswith("."):
                    found.append(_describe(image, saved))
        return sorted(found, key=lambda warm: warm.last_used, reverse=True)

    def prune(self, bound: int) -> list[str]:
        """Drop the machines that were used longest ago until the rest fits into `bound` bytes.

        With none left, what could not be kept is forgotten, too. One that a machine of today is
        built on stays.

        Returns:
            The keys of what was dropped.
        """
        dropped, taken = [], 0
        for warm in self.entries():
            taken += warm.size
            if taken > bound and self._drop_entry(Path(warm.image_id).parent):
                taken -= warm.size
                dropped.append(warm.key)
        self.remove_useless(forget=bound == 0)
        return dropped

    def remove_useless(self, *, forget: bool = False) -> None:
        """Remove what is no whole machine: damaged, of another format, cut off."""
        for entry in self._list("[!.]*"):
            if entry.is_dir() and savedmachine.find(entry / _DISK) is None:
                self._drop_entry(entry)
        for gone in self._list(f".*{_GONE}"):
            _remove_tree(gone)
        if forget:
            for note in self._list(f"*{_UNFIT}"):
                note.unlink(missing_ok=True)
        made = self._list(".*.new")
        keys = {left.name[1:].removesuffix(".new").partition(_AGAIN)[0] for left in made}
        for key in keys | {lock.stem for lock in self._list("*.lock")}:
            with (
                contextlib.suppress(FileNotFoundError),
                try_lock(self._lock(key)) as held,
            ):
                if held:  # its maker is gone
                    for left in made:
                        if left.name.startswith((f".{key}{_AGAIN}", f".{key}.new")):
                            _remove_tree(left)
                    self._lock(key).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something is in it, or it is not there
            self.directory.rmdir()

    def forget(self, image: Path) -> None:
        """Drop an image that was deleted, if it is here, and the machines that are built on it."""
        if image.parent.parent == self.directory:
            self._drop_entry(image.parent)
        for warm in self.entries():
            if layers.is_built_on(Path(warm.image_id), image):
                self._drop_entry(Path(warm.image_id).parent)

    def drop(self, key: str) -> bool:
        """Remove what is kept under a key; False when machines are built on it, which keep it."""
        kept = [entry for entry in self._entries_of(key) if not self._drop_entry(entry)]
        return not kept

    def _drop_entry(self, entry: Path) -> bool:
        image = entry / _DISK
        try:
            # Launches that begin from it hold it.
            with uses.removing(image, by_name=True, find_more=lambda: self._find_users(image)):
                gone = entry.with_name(f".{entry.name}.{secrets.token_hex(4)}{_GONE}")
                # At once, so that no launch finds half of it.
                entry.rename(gone)
        except ImageInUseError:
            return False
        except FileNotFoundError:
            return True  # dropped by another process
        _remove_tree(gone)
        return True

    def _find_users(self, image: Path) -> list[str]:
        others = (other for other in self._list(f"*/{_DISK}") if other.parent != image.parent)
        return [
            *layers.find_users(image, self.working_dir),
            *(other.parent.name for other in others if layers.is_built_on(other, image)),
        ]

    def _entries_of(self, key: str) -> list[Path]:
        """List the directories that are kept under a key: the first one, and those made later."""
        first = self.directory / key
        return [*([first] if os.path.lexists(first) else []), *self._list(f"{key}{_AGAIN}*")]

    def _list(self, pattern: str) -> list[Path]:
        """List what is in the cache, which another process may remove meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            return [*self.directory.glob(pattern)]
        return []


def _remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _mib(size: int) -> int:
    return -(-size >> 20)


def _facts(file: Path) -> list[str | int]:
    found = file.stat()
    return [str(file.resolve()), found.st_size, found.st_mtime_ns]


def _describe(image: Path, saved: SavedMachine) -> WarmImage:
    return WarmImage(
        key=image.parent.name.partition(_AGAIN)[0],
        image_id=str(image),
        base=str(layers.chain(image)[-1]),
        instance_type=str(saved.spec.instance_type),
        size=_size(image),
        last_used=image.parent.stat().st_mtime,
        first_boot=saved.is_starting_point,
    )


def _size(image: Path) -> int:
    directory = savedmachine.directory_of(image)
    return allocated_size(image, *layers.list_kept_disks(image), *directory.iterdir())
