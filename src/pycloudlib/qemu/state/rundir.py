"""An instance's directory: every file name in one place, and its state on disk."""

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.documents import decode, parse_json
from pycloudlib._base.files import is_not_found, make_socket, replace_atomically, write_private
from pycloudlib._base.locks import exclusive_lock, is_locked, try_lock
from pycloudlib.errors import InstanceNotFoundError
from pycloudlib.images import uses
from pycloudlib.key import KeyPair
from pycloudlib.qemu.host.ownership import owner_file
from pycloudlib.qemu.host.processes import ProcessIdentity, ProcessRecord, find_proc_directory
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
# How often a directory is removed to which somebody adds something at the same time.
_REMOVALS = 100
_FRESH = re.compile(r"\.[0-9a-f]{16}\.qcow2")


@dataclass(frozen=True, slots=True)
class LoginFacts:
    """What another process needs to log in, kept with the machine."""

    username: str
    public_key_path: str | None
    private_key_path: str | None

    @classmethod
    def of(cls, username: str, key_pair: KeyPair) -> LoginFacts:
        """Name a user and a key by whole paths: others read them in other directories."""
        public, private = key_pair.public_key_path, key_pair.private_key_path
        return cls(
            username,
            None if public is None else str(Path(public).absolute()),
            None if private is None else str(Path(private).absolute()),
        )


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory of one instance, readable by its owner alone."""

    path: Path

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
        """Give the id of the instance: `<path of its disk>::<ssh port>::<telnet port>`."""
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

    @property
    def seed(self) -> Path:
        """The NoCloud volume."""
        return self.path / SEED_FILE

    @property
    def known_hosts(self) -> Path:
        """The machine's SSH host keys."""
        return self.path / "known_hosts"

    @property
    def console_log(self) -> Path:
        """What the machine wrote to its serial console, over all its boots."""
        return self.path / CONSOLE_LOG

    @property
    def qemu_log(self) -> Path:
        """What QEMU itself said on stdout and stderr, over all its starts."""
        return self.path / "qemu.log"

    @property
    def qmp_socket(self) -> Path:
        """Where anybody may talk QMP to the machine."""
        return self.path / QMP_SOCKET

    @property
    def attach_socket(self) -> Path:
        """Where processes that did not start the machine control it."""
        return self.path / ATTACH_SOCKET

    @property
    def helper_socket(self) -> Path:
        """Where the helper in the guest is talked to."""
        return self.path / HELPER_SOCKET

    @property
    def helper_mark(self) -> Path:
        """There as long as the helper is believed to run in the guest; holds its user's name."""
        return self.path / "helper"

    @property
    def fix_up(self) -> Path:
        """What is to be put right in a copy before it is used; gone when that is done."""
        return self.path / "fix-up.json"

    @property
    def fixed_up(self) -> Path:
        """What was put right in it."""
        return self.path / "fixed-up.json"

    @property
    def first_run(self) -> Path:
        """A script that is to run once in a copy."""
        return self.path / "first-run"

    @property
    def first_boot(self) -> Path:
        """What puts a machine right whose first boot began in the middle; gone when it has."""
        return self.path / "first-boot.py"

    @property
    def _lock_file(self) -> Path:
        return self.path / "power.lock"

    @property
    def _spec_file(self) -> Path:
        return self.path / _SPEC_FILE

    @property
    def _process_file(self) -> Path:
        return self.path / "process.json"

    @property
    def _saving_file(self) -> Path:
        return self.path / "saving"

    @property
    def _console_start_file(self) -> Path:
        return self.path / "console-start"

    @property
    def _login_file(self) -> Path:
        return self.path / "login.json"

    def write_spec(self, spec: MachineSpec) -> None:
        """Keep what machine this is."""
        _write(self._spec_file, spec.to_json())

    def read_spec(self) -> MachineSpec:
        """Read what machine this is.

        Raises:
            InstanceNotFoundError: There is no machine in this directory.
        """
        with self._named(self._spec_file):
            return MachineSpec.from_json(self._read(self._spec_file))

    def write_login(self, login: LoginFacts) -> None:
        """Keep how to log in."""
        facts = {name: getattr(login, name) for name in LoginFacts.__slots__}
        _write(self._login_file, json.dumps(facts, indent=1))

    def read_login(self) -> LoginFacts:
        """Read how to log in.

        Raises:
            InstanceNotFoundError: There is no machine in this directory.
        """
        with self._named(self._login_file):
            return decode(LoginFacts, parse_json(self._read(self._login_file)))

    def write_process(self, identity: ProcessIdentity) -> None:
        """Keep which process runs the machine."""
        # No process survives the host. And this one may stand still while it is written down.
        _write(self._process_file, _identity_text(identity), synced=False)

    def find_process(self) -> ProcessIdentity | None:
        """Read which process runs the machine, or ran it last."""
        return _find_identity(self._process_file)

    def write_console_start(self, offset: int) -> None:
        """Keep where in the console log the machine's present run begins, in bytes."""
        _write(self._console_start_file, str(offset), synced=False)

    def read_console_start(self) -> int:
        """Read where in the console log the machine's present run begins; 0 if that is not told."""
        try:
            return max(0, int(self._console_start_file.read_bytes()))
        except (OSError, ValueError):
            return 0

    @property
    def base_state(self) -> Path:
        """A whole state of a machine of this description: the one that it was started from."""
        return self.path / "base-state"

    def write_saving(self, fresh: Path) -> None:
        """Keep that the machine is being saved, and which overlay its disk goes on in."""
        _write(self._saving_file, fresh.name, synced=False)

    @property
    def is_being_saved(self) -> bool:
        """Whether the machine is being saved, or was when that was cut off."""
        return self._saving_file.exists()

    def find_fresh_overlay(self) -> Path | None:
        """Find the overlay that the disk goes on in of a machine that is being saved."""
        with contextlib.suppress(OSError, ValueError):
            name = self._saving_file.read_text(encoding="utf-8").strip()
            if _FRESH.fullmatch(name):
                return self.path / name
        return None

    def forget_saving(self) -> None:
        """Take note that the machine is being saved no more."""
        self._saving_file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def power_lock(self) -> Iterator[None]:
        """Keep other threads and processes from switching on or deleting the machine.

        Raises:
            InstanceNotFoundError: The instance is deleted, or just being so.
        """
        with self.lock():
            # Who deletes it removes the lock, too, while it is held; this may be another.
            if not self._spec_file.exists():
                raise self._deleted()
            yield

    def is_locked(self) -> bool:
        """Whether somebody holds the power lock, as who saves or copies the machine does."""
        return is_locked(self._lock_file)

    @contextlib.contextmanager
    def try_lock(self) -> Iterator[bool]:
        """Have the lock of `power_lock` if nobody has it now; yield whether we have.

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
        """Do as `power_lock` does, for what is no machine (any more), too.

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

        From the first moment on it is no machine, so whoever comes then for its lock lets it be.
        Until the last one it is known whose it is: so what is cut off in between is found.
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
                # Somebody came meanwhile, or removes it, too.
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
    def _named(self, file: Path) -> Iterator[None]:
        """Name a file that holds something else than what was written there."""
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
    """A listening unix socket under another name than it is to have.

    Attributes:
        listener: The socket.
        staged: The name that it has.
        file: The name that it is to have.
    """

    listener: socket.socket
    staged: Path
    file: Path

    @classmethod
    def listen(cls, file: Path) -> StagedSocket:
        """Make a socket beside the file that it is to be, and listen on it."""
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
        """Give it its name, in place of a socket that had it before."""
        self.staged.replace(self.file)

    def discard(self) -> None:
        """Take its name away, if it has only the staged one."""
        self.staged.unlink(missing_ok=True)


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Yield another name for a file, for a moment: short and plain, whatever its path is.

    Such a name fits a unix socket's address, and can be said in QMP, whose JSON has no words for a
    path that is no text. It is good for other processes of this user, too.

    Args:
        path: The file, whose own name has to be plain.
    """
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"{find_proc_directory(os.getpid())}/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


def _identity_text(identity: ProcessIdentity) -> str:
    return json.dumps(identity.to_plain())


def _find_identity(file: Path) -> ProcessIdentity | None:
    """Read which process a file tells of; None when it tells of none, which is logged."""
    try:
        return decode(ProcessRecord, parse_json(file.read_bytes())).identity()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        # As after a crash of the host, which no process survives.
        _log.warning("%s is damaged (%s): it tells of no process", file, error)
        return None


def _write(file: Path, text: str, *, synced: bool = True) -> None:
    with replace_atomically(file, synced=synced) as temporary:
        write_private(temporary, text + "\n")
