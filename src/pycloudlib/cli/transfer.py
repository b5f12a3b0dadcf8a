"""Copying between here and a machine: files, and directories as tar streams over SSH."""

from __future__ import annotations

import contextlib
import errno
import io
import re
import shlex
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, cast

from pycloudlib.cli import tarball
from pycloudlib.errors import PycloudlibError
from pycloudlib.guest import commands
from pycloudlib.progress import Progress, ProgressCallback, ignore_progress
from pycloudlib.qemu.instance import QemuInstance

if TYPE_CHECKING:
    import paramiko

_REMOTE = re.compile(r"(?P<name>[a-z0-9-]+(?:/[a-z0-9-]+)?):(?P<path>.*)", re.DOTALL)
_PERMISSIONS = 0o777
# Seconds that a command which has failed may take to say why.
_LAST_WORDS_LIMIT = 10.0


@dataclass(frozen=True, slots=True)
class Place:
    """One side of a copy.

    Attributes:
        machine: The machine's name; empty of a file here.
        path: The path, as it was given.
    """

    machine: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read `name:path`, or a path here; one that looks like the former begins with `./`."""
        match = None if text.startswith((".", "/", "~")) else _REMOTE.fullmatch(text)
        return cls(match["name"], match["path"] or ".") if match else cls("", text)


def push(
    instance: QemuInstance,
    source: Path,
    target: str,
    on_progress: ProgressCallback = ignore_progress,
) -> None:
    """Copy a file or directory to a machine, as its login user, like `cp -r`.

    Raises:
        FileNotFoundError: The source, or the directory that it is to go to, is not there.
        PycloudlibError: The guest could not write it; says why.
        paramiko.SSHException: The machine cannot be reached.
    """
    if not source.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file or directory", str(source))
    if target.endswith("/") or _is_directory(instance, target):
        target = f"{target.rstrip('/') or '/'}/{source.resolve().name}"
    if source.is_dir():
        _push_directory(instance, source, target, on_progress)
        return
    instance.push_file(source, target, on_progress=on_progress)
    mode = source.stat().st_mode & _PERMISSIONS
    _run(instance, ["chmod", f"{mode:o}", "--", target])


def pull(
    instance: QemuInstance,
    source: str,
    target: Path,
    on_progress: ProgressCallback = ignore_progress,
) -> None:
    """Copy a file or directory from a machine, as its login user, like `cp -r`.

    Raises:
        FileNotFoundError: The source, or the directory that it is to go to, is not there.
        PycloudlibError: The guest could not read it; says why.
        paramiko.SSHException: The machine cannot be reached.
    """
    name = PurePosixPath(source.rstrip("/") or "/").name
    if target.is_dir() and name not in ("", ".", ".."):
        target = target / name
    if _is_directory(instance, source):
        _pull_directory(instance, source, target, on_progress)
        return
    instance.pull_file(source, target, on_progress=on_progress)
    target.chmod(int(_run(instance, ["stat", "-c", "%a", "--", source]), 8) & _PERMISSIONS)


def _is_directory(instance: QemuInstance, path: str) -> bool:
    result = instance.execute(["test", "-d", path])
    if result.return_code not in (0, 1):
        raise PycloudlibError(f"{instance.name} cannot look at {path}: {result.stderr}")
    return result.ok


def _run(instance: QemuInstance, argv: list[str]) -> str:
    result = instance.execute(argv)
    if result.failed:
        raise PycloudlibError(f"{instance.name}: {result.stderr or shlex.join(argv)}")
    return result.stdout


def _push_directory(
    instance: QemuInstance, source: Path, target: str, on_progress: ProgressCallback
) -> None:
    quoted = shlex.quote(target)
    count = _Count(on_progress, source.name, _size_of(source))
    command = f"mkdir -p -- {quoted} && exec tar -x --no-same-owner -f - -C {quoted}"
    with _Command(instance, command) as running:
        try:
            with io.BufferedWriter(_Writer(running.channel, count), 1 << 16) as stream:
                tarball.pack(source, cast("IO[bytes]", stream))
        except _HungUpError as error:
            # The guest's own words tell more than that it hung up.
            running.explain()
            raise PycloudlibError(f"{source} could not be sent: {error}") from error
        running.channel.shutdown_write()
        running.finish()


def _pull_directory(
    instance: QemuInstance, source: str, target: Path, on_progress: ProgressCallback
) -> None:
    target.mkdir(exist_ok=True)
    count = _Count(on_progress, target.name, None)
    command = f"exec tar -c --hard-dereference -f - -C {shlex.quote(source)} ."
    with _Command(instance, command) as running:
        running.channel.shutdown_write()
        try:
            with io.BufferedReader(_Reader(running.channel, count), 1 << 16) as stream:
                tarball.unpack(cast("IO[bytes]", stream), target)
                while stream.read(1 << 16):
                    pass  # what pads the end
        except tarfile.TarError as error:
            running.explain()
            raise PycloudlibError(f"what {instance.name} sent is damaged: {error}") from error
        running.finish()


class _Command:
    """A command in the guest whose input and output are streams."""

    def __init__(self, instance: QemuInstance, command: str) -> None:
        self._name = instance.name
        self._client = instance._ssh_connect()
        try:
            self.channel = commands.open_session(self._client)
            self.channel.exec_command(command)
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> _Command:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.channel.close()
        self._client.close()

    def explain(self) -> None:
        """Let it say why it did not take or give what it was to.

        It may not have ended, and write what nobody reads: then it is not waited for.

        Raises:
            PycloudlibError: It failed; in its own words.
        """
        self.channel.settimeout(_LAST_WORDS_LIMIT)
        with contextlib.suppress(TimeoutError):
            self.finish()

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            PycloudlibError: It failed; in its own words.
        """
        said = self.channel.makefile_stderr("r").read()
        if not self.channel.status_event.wait(self.channel.gettimeout()):
            raise TimeoutError
        status = self.channel.recv_exit_status()
        if status != 0:
            words = said.decode(errors="replace") if isinstance(said, bytes) else said
            raise PycloudlibError(
                f"{self._name}: {words.strip() or f'tar ended with exit status {status}'}"
            )


def _size_of(directory: Path) -> int:
    """Give the bytes of all files in a directory, which its tar stream has a little more of."""
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())


class _HungUpError(OSError):
    """The other side takes no more."""


class _Count:
    """Counts the bytes of a stream, and tells of them.

    Args:
        on_progress: Told of them.
        name: What is copied.
        total: How many there will be; None when that is not known.
    """

    def __init__(self, on_progress: ProgressCallback, name: str, total: int | None) -> None:
        self._on_progress = on_progress
        self._name = name
        self._total = total
        self._done = 0

    def add(self, count: int) -> None:
        """Take note of more."""
        self._done += count
        done = self._done if self._total is None else min(self._done, self._total)
        self._on_progress(Progress("copying", self._name, done, self._total, "B"))


class _Writer(io.RawIOBase):
    """A channel that is written to."""

    def __init__(self, channel: paramiko.Channel, count: _Count) -> None:
        super().__init__()
        self._channel = channel
        self._count = count

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        try:
            sent = self._channel.send(bytes(memoryview(data)))  # type: ignore[arg-type]
        except OSError as error:
            raise _HungUpError(str(error)) from error
        self._count.add(sent)
        return sent


class _Reader(io.RawIOBase):
    """A channel that is read from."""

    def __init__(self, channel: paramiko.Channel, count: _Count) -> None:
        super().__init__()
        self._channel = channel
        self._count = count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._channel.recv(len(view))
        view[: len(data)] = data
        self._count.add(len(data))
        return len(data)
