"""An instance's directory: all its file names, and its state on disk."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.documents import decode, parse_json
from pycloudlib._base.files import (
    is_not_found,
    make_socket,
    opened,
    replace_atomically,
    write_private,
)
from pycloudlib._base.locks import exclusive_lock, is_locked, try_lock
from pycloudlib.errors import InstanceNotFoundError
from pycloudlib.guest.access import kept
from pycloudlib.images import uses
from pycloudlib.key import KeyPair
from pycloudlib.qemu.host.ownership import owner_file
from pycloudlib.qemu.host.processes import ProcessIdentity, ProcessRecord, find_proc_directory
from pycloudlib.qemu.parts.part import SUFFIX
from pycloudlib.qemu.parts.standard import (
    ATTACH_SOCKET,
    CONSOLE_LOG,
    HELPER_SOCKET,
    QMP_SOCKET,
    SEED_FILE,
)
from pycloudlib.qemu.state.spec import MachineSpec

_log = logging.getLogger(__name__)

_SPEC_FILE = "machine.json"
_ID_SEPARATOR = "::"
# How often the removal of a directory is tried while another program adds files to it.
_REMOVALS = 100
_FRESH = re.compile(rf"(?P<name>\.[0-9a-f]{{16}}\.qcow2)(?: (?P<suffix>{SUFFIX}))?")


@dataclass(frozen=True, slots=True)
class LoginFacts:
    """What another process needs to log in, written beside the machine."""

    username: str
    public_key_path: str | None
    private_key_path: str | None

    @classmethod
    def of(cls, username: str, key_pair: KeyPair) -> LoginFacts:
        """Describe a user and a key by absolute paths: others read them in other directories."""
        public, private = key_pair.public_key_path, key_pair.private_key_path
        return cls(
            username,
            None if public is None else str(Path(public).absolute()),
            None if private is None else str(Path(private).absolute()),
        )


class _File:
    """The path of a file in a run directory."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, rundir: RunDirectory, _owner: type) -> Path:
        return rundir.path / self.name


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory of one instance, readable by its owner alone."""

    path: Path

    seed = _File(SEED_FILE)
    """The NoCloud volume."""
    known_hosts = _File("known_hosts")
    """The machine's SSH host keys."""
    console_log = _File(CONSOLE_LOG)
    """What the machine wrote to its serial console, over all its boots."""
    qemu_log = _File("qemu.log")
    """What QEMU itself wrote to stdout and stderr, over all its starts."""
    qmp_socket = _File(QMP_SOCKET)
    """Where any program may connect to the machine's QMP."""
    attach_socket = _File(ATTACH_SOCKET)
    """Where processes that did not start the machine control it."""
    helper_socket = _File(HELPER_SOCKET)
    """Where programs connect to the helper in the guest."""
    helper_mark = _File("helper")
    """Exists as long as the helper is believed to run in the guest; holds its user's name."""
    lent_mark = _File("lent")
    """Exists while the helper lends its port, and after that until it is known to have it back."""
    fix_up = _File("fix-up.json")
    """What has to be fixed up in a copy before it is used; removed when that is done."""
    fixed_up = _File("fixed-up.json")
    """What was fixed up in it."""
    first_run = _File("first-run")
    """A script that has to run once in a copy."""
    first_boot = _File("first-boot.py")
    """Fixes up a machine whose first boot began in the middle; removed when it has."""
    kept_ssh = _File(kept.DIRECTORY)
    """A directory of the SSH connection that is kept for programs that run one after another."""
    base_state = _File("base-state")
    """A whole state of a machine of this description: the one that it was started from."""
    _lock_file = _File("power.lock")
    _spec_file = _File(_SPEC_FILE)
    _process_file = _File("process.json")
    _programs_file = _File("programs.json")
    _saving_file = _File("saving")
    _console_start_file = _File("console-start")
    _login_file = _File("login.json")

    @classmethod
    def list_in(cls, parent: Path) -> list[RunDirectory]:
        """List the directories of instances in a cloud's directory."""
        return [cls(file.parent) for file in sorted(parent.glob(f"*/{_SPEC_FILE}"))]

    @classmethod
    def find(cls, instance_id: str) -> tuple[RunDirectory, MachineSpec]:
        """Find the directory of the instance that has an id, and what machine it is.

        Raises:
            InstanceNotFoundError: It does not exist (any more), or this is not an instance's id.
        """
        # From the right: the path may hold the separator, the ports cannot.
        rundir = cls(Path(str(instance_id).rsplit(_ID_SEPARATOR, 2)[0]).parent)
        spec = rundir.read_spec()
        if instance_id != rundir.instance_id(spec):
            raise InstanceNotFoundError(
                instance_id,
                message=f"{instance_id!r} is not the id of the instance in {rundir.path}; an id "
                "has the form <path>::<ssh port>::<telnet port>",
            )
        return rundir, spec

    def instance_id(self, spec: MachineSpec) -> str:
        """Return the instance's id: `<path of its disk>::<ssh port>::<telnet port>`."""
        return _ID_SEPARATOR.join((str(self.disk), str(spec.ssh_port), str(spec.telnet_port)))

    @property
    def created(self) -> float:
        """When the machine was made, in seconds since the epoch.

        Raises:
            OSError: There is none (any more).
        """
        return self._spec_file.stat().st_mtime

    @property
    def disk(self) -> Path:
        """The overlay that is the root disk."""
        return self.path / f"{self.path.name}.qcow2"

    def write_spec(self, spec: MachineSpec, *, created: float | None = None) -> None:
        """Write what machine this is.

        Args:
            spec: The machine.
            created: When it was made, in seconds since the epoch, if that was not just now.
        """
        with replace_atomically(self._spec_file) as temporary:
            write_private(temporary, spec.to_json() + "\n")
            if created is not None:
                os.utime(temporary, (created, created))

    def read_spec(self) -> MachineSpec:
        """Read what machine this is.

        Raises:
            InstanceNotFoundError: There is no machine in this directory.
        """
        with self._naming(self._spec_file):
            return MachineSpec.from_json(self._read(self._spec_file))

    def write_login(self, login: LoginFacts) -> None:
        """Write how to log in."""
        facts = {name: getattr(login, name) for name in LoginFacts.__slots__}
        _write(self._login_file, json.dumps(facts, indent=1))

    def read_login(self) -> LoginFacts:
        """Read how to log in.

        Raises:
            InstanceNotFoundError: There is no machine in this directory.
        """
        with self._naming(self._login_file):
            return decode(LoginFacts, parse_json(self._read(self._login_file)))

    def write_process(self, identity: ProcessIdentity) -> None:
        """Write which process runs the machine."""
        # Not synced: no process survives the host, and this one may be paused meanwhile.
        _write(self._process_file, json.dumps(identity.to_plain()), synced=False)

    def write_programs(self, identities: Sequence[ProcessIdentity]) -> None:
        """Write which programs serve the machine beside QEMU."""
        if identities or self._programs_file.exists():
            text = json.dumps([identity.to_plain() for identity in identities])
            _write(self._programs_file, text, synced=False)

    def find_programs(self) -> list[ProcessIdentity]:
        """Read which programs serve the machine beside QEMU, or did so last."""
        file = self._programs_file
        try:
            records = decode(tuple[ProcessRecord, ...], parse_json(file.read_bytes()))
            return [record.identity() for record in records]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            _log.warning("%s is damaged (%s): it tells of no programs", file, error)
            return []

    def find_process(self) -> ProcessIdentity | None:
        """Read which process runs the machine, or ran it last; None, and a log, if damaged."""
        file = self._process_file
        try:
            return decode(ProcessRecord, parse_json(file.read_bytes())).identity()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            # As after a crash of the host, which no process survives.
            _log.warning("%s is damaged (%s): it tells of no process", file, error)
            return None

    def write_console_start(self, offset: int) -> None:
        """Write where the machine's present run begins in the console log, in bytes."""
        _write(self._console_start_file, str(offset), synced=False)

    def read_console_start(self) -> int:
        """Read where the machine's present run begins in the console log; 0 if unknown."""
        try:
            return max(0, int(self._console_start_file.read_bytes()))
        except (OSError, ValueError):
            return 0

    def write_saving(self, fresh: Mapping[str, Path]) -> None:
        """Mark that the machine is being saved, and to which overlays its disks are switched.

        Args:
            fresh: The overlays, by the suffixes of the disks (`OwnDisk.suffix`).
        """
        lines = (f"{file.name} {suffix}".rstrip() for suffix, file in fresh.items())
        _write(self._saving_file, "\n".join(lines), synced=False)

    @property
    def is_being_saved(self) -> bool:
        """Whether the machine is being saved, or was when that was cut off."""
        return self._saving_file.exists()

    def find_fresh_overlays(self) -> dict[str, Path]:
        """Find the overlays to which the disks of a machine that is being saved are switched.

        Returns:
            The overlays, by the suffixes of the disks.
        """
        with contextlib.suppress(OSError, ValueError):
            lines = self._saving_file.read_text(encoding="utf-8").splitlines()
            found = filter(None, map(_FRESH.fullmatch, lines))
            return {match["suffix"] or "": self.path / match["name"] for match in found}
        return {}

    def forget_saving(self) -> None:
        """Remove the mark that the machine is being saved."""
        self._saving_file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def power_lock(self) -> Iterator[None]:
        """Keep other threads and processes from switching on or deleting the machine.

        Raises:
            InstanceNotFoundError: The instance is deleted, or is being deleted.
        """
        with self.lock():
            # Deleting removes the lock's file while it is held: this may be another file.
            if not self._spec_file.exists():
                raise self._deleted()
            yield

    def is_locked(self) -> bool:
        """Whether the power lock is held, as it is while the machine is saved or copied."""
        return is_locked(self._lock_file)

    @contextlib.contextmanager
    def try_lock(self) -> Iterator[bool]:
        """Take the lock of `power_lock` if it is free now; yield whether it was.

        Raises:
            InstanceNotFoundError: The instance is deleted.
        """
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(try_lock(self._lock_file))
            except FileNotFoundError:
                raise self._deleted() from None
            yield held and self._spec_file.exists()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Take the lock as `power_lock` does, also of a directory without a machine.

        Raises:
            InstanceNotFoundError: The directory does not exist.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(exclusive_lock(self._lock_file))
            except FileNotFoundError:
                raise self._deleted() from None
            yield

    def remove(self) -> None:
        """Remove the directory and all in it; one that is gone already is no error.

        Its description goes first: who waits for its lock then sees that it is deleted. Its owner's
        mark goes last: so `prune` finds a directory whose removal was cut off.
        """
        if self.path.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "a link, not a directory", str(self.path))
        with contextlib.suppress(FileNotFoundError):
            self._spec_file.unlink()
        # First, so that what is cut off here uses no image; then once more, since another program
        # may have recorded the disk as long as it was there.
        uses.forget(self.disk)
        with contextlib.suppress(OSError):
            self.disk.unlink()
        uses.forget(self.disk)
        for tries_left in reversed(range(_REMOVALS)):
            try:
                self._remove_all()
            except OSError as error:
                if not self.path.exists() or self._spec_file.exists():
                    return  # another removed it; it may be a new machine's by now
                # Another program has added something meanwhile, or removes it, too.
                if not tries_left or error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise
            else:
                return

    def _remove_all(self) -> None:
        owner = owner_file(self.path)
        for entry in list(os.scandir(self.path)):
            if entry.name == owner.name:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                Path(entry.path).unlink()
        owner.unlink(missing_ok=True)
        self.path.rmdir()

    def _deleted(self) -> InstanceNotFoundError:
        return InstanceNotFoundError(str(self.path), message=f"{self.path.name} is deleted")

    @contextlib.contextmanager
    def _naming(self, file: Path) -> Iterator[None]:
        """Name a file that does not hold what was written there."""
        try:
            yield
        except ValueError as error:
            raise InstanceNotFoundError(
                str(self.path),
                message=f"No instance in {self.path}: {file.name} is damaged ({error})",
            ) from error

    def _read(self, file: Path) -> str:
        try:
            return file.read_text(encoding="utf-8")
        except OSError as error:
            missing = is_not_found(error)
            problem = "is missing" if missing else f"cannot be read: {error.strerror}"
            raise InstanceNotFoundError(
                str(self.path), message=f"No instance in {self.path}: {file.name} {problem}"
            ) from (None if missing else error)


@dataclass(frozen=True, slots=True)
class StagedSocket:
    """A listening unix socket under a temporary name.

    Attributes:
        listener: The socket.
        staged: Its temporary name.
        file: Its final name.
    """

    listener: socket.socket
    staged: Path
    file: Path

    @classmethod
    def listen(cls, file: Path) -> StagedSocket:
        """Make a socket beside its final name, and listen on it."""
        staged = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        listener = make_socket(socket.AF_UNIX)
        try:
            # A unix socket's address has 107 bytes at most, which a path may exceed.
            with short_path(staged) as address:
                listener.bind(address)
            staged.chmod(0o600)
            listener.listen(8)
        except BaseException:
            listener.close()
            staged.unlink(missing_ok=True)
            raise
        return cls(listener, staged, file)

    def publish(self) -> None:
        """Rename it to its final name, in place of a socket that had it before."""
        self.staged.replace(self.file)

    def discard(self) -> None:
        """Remove its temporary name, if it still has that."""
        self.staged.unlink(missing_ok=True)


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Yield a short name in text for a file, in the block; the file's own name has to be text.

    It fits a unix socket's address, and QMP, whose JSON cannot have a path that is no text. Other
    processes of this user can use it, too.
    """
    with opened(path.parent, os.O_PATH | os.O_DIRECTORY) as descriptor:
        yield f"{find_proc_directory(os.getpid())}/fd/{descriptor}/{path.name}"


def _write(file: Path, text: str, *, synced: bool = True) -> None:
    with replace_atomically(file, synced=synced) as temporary:
        write_private(temporary, text + "\n")
