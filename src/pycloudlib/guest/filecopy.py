"""Single files, copied to and from the guest over SFTP."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from pycloudlib.guest.sessions import Connections
from pycloudlib.progress import Progress, ProgressCallback, ignore_progress


def push(
    connections: Connections,
    local_path: str | Path,
    remote_path: str | Path,
    on_progress: ProgressCallback = ignore_progress,
) -> None:
    """Copy a local file to the guest.

    Raises:
        FileNotFoundError: The local file, or the remote directory, is not there.
    """
    source, target = Path(local_path), str(remote_path)
    with source.open("rb"), connections.files() as sftp, _naming(target):
        sftp.put(str(source), target, _telling(on_progress, source.name))


def pull(
    connections: Connections,
    remote_path: str | Path,
    local_path: str | Path,
    on_progress: ProgressCallback = ignore_progress,
) -> None:
    """Copy a file from the guest; an existing local file is replaced only once all is here.

    Raises:
        FileNotFoundError: The remote file, or the local directory, is not there.
    """
    source, target = str(remote_path), Path(local_path)
    temporary = target.with_name(f".{target.name[:80]}.{secrets.token_hex(4)}.part")
    try:
        with connections.files() as sftp:
            with _naming(source):
                sftp.stat(source)
            sftp.get(source, str(temporary), _telling(on_progress, target.name))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _telling(on_progress: ProgressCallback, name: str) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(Progress("copying", name, done, total, "B"))


@contextlib.contextmanager
def _naming(remote_path: str) -> Iterator[None]:
    """Put the file's name into SFTP's errors, which come without one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror or str(error), remote_path) from error
