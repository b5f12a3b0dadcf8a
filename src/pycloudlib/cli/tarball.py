"""Directories as tar streams; what comes out of one stays below the directory it goes to.

A guest is not believed: no member is written outside, through a symbolic link neither, and nothing
but files, directories and links is made.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from pycloudlib.errors import PycloudlibError

_PERMISSIONS = 0o777


class UnsafeArchiveError(PycloudlibError):
    """A tar stream has a member that would be written elsewhere."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"What the machine sends is refused: {name!r} {why}")


def pack(source: Path, stream: IO[bytes]) -> None:
    """Write a directory's content as a tar stream."""
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(source.iterdir()):
            archive.add(path, arcname=path.name, filter=_without_owner)


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        return None  # sockets, pipes and devices are not content
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def unpack(stream: IO[bytes], target: Path) -> None:
    """Read a tar stream into a directory that exists.

    Raises:
        UnsafeArchiveError: A member would be written outside of it.
        tarfile.TarError: The stream is damaged, or ends early.
    """
    links: list[tuple[Path, str]] = []
    directories: list[tuple[Path, int]] = []
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member, path in _safe_members(archive, target):
            if member.isdir():
                path.mkdir(exist_ok=True)
                directories.append((path, member.mode))
            elif member.issym():
                links.append((path, member.linkname))
            elif member.islnk():
                shutil.copyfile(_place(target, member.linkname), path, follow_symlinks=False)
            elif member.isreg():
                _write_file(archive, member, path)
    # Last, so that nothing is written through one; and a directory may forbid to write into it.
    for path, pointing_at in links:
        path.unlink(missing_ok=True)
        path.symlink_to(pointing_at)
    for path, mode in reversed(directories):
        path.chmod(mode & _PERMISSIONS)


def _safe_members(archive: tarfile.TarFile, target: Path) -> Iterator[tuple[tarfile.TarInfo, Path]]:
    for member in archive:
        path = _place(target, member.name)
        if path == target:
            continue
        if path.is_symlink():
            if member.isdir():
                raise UnsafeArchiveError(member.name, "is a symbolic link here")
            path.unlink()  # it is replaced, not followed
        path.parent.mkdir(parents=True, exist_ok=True)
        yield member, path


def _place(target: Path, name: str) -> Path:
    """Give where a member goes."""
    parts = [part for part in PurePosixPath(name).parts if part != "."]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise UnsafeArchiveError(name, "points outside")
    path = target
    for part in parts[:-1]:
        path /= part
        if path.is_symlink():
            raise UnsafeArchiveError(name, f"goes through the symbolic link {path}")
    return path / parts[-1] if parts else path


def _write_file(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    content = archive.extractfile(member)
    assert content is not None  # it is a regular file
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "wb") as file:  # noqa: PTH123 - it has no such flags
        shutil.copyfileobj(content, file)
    path.chmod(member.mode & _PERMISSIONS)
    os.utime(path, (member.mtime, member.mtime))
