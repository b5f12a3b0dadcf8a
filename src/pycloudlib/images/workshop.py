"""Where an image is built: temporary directories that are gone afterwards, also after a crash."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.images import confinement
from pycloudlib.images.rootfs import Handover, remove_tree
from pycloudlib.locks import directory_lock

_WORKSHOP_PREFIX = ".build-"
_SCRATCH_PREFIX = "pycloudlib-build-"
_SCRATCH_NOTE = "scratch-path"


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where one build happens, and what is gone after it.

    Attributes:
        directory: The temporary directory, on the file system of the images.
        product: The directory in it that becomes the image's own.
        handover: The directory in it that confined programs reach.
    """

    directory: Path
    product: Path
    handover: Handover


@contextlib.contextmanager
def open_workshop(image_dir: Path) -> Iterator[Workshop]:
    """Make a workshop for one build; nothing of it is left afterwards."""
    directory = Path(tempfile.mkdtemp(prefix=_WORKSHOP_PREFIX, dir=image_dir))
    try:
        product, shared = directory / "image", directory / "handover"
        product.mkdir(mode=0o700)
        shared.mkdir()
        shared.chmod(0o755)  # for whoever is given its descriptor; the directory above is private
        with directory_lock(shared) as descriptor:
            yield Workshop(directory, product, Handover(shared, descriptor))
    finally:
        _remove_workshop(directory)


def find_scratch_base() -> Path:
    """Name the directory in which an ordinary user's builds have their scratch directories."""
    # Not /tmp, which is memory on many hosts.
    return Path(os.environ.get("TMPDIR") or "/var/tmp")  # noqa: S108 - names in it are random


def make_scratch(directory: Path) -> Path:
    """Make the directory that the system is installed in, for the workshop in `directory`.

    For an ordinary user it belongs to a subordinate id, which may be shut out of the user's home;
    it is then one of the host's temporary directories, and its name is noted in the workshop before
    it exists, so that it is found again after a crash.
    """
    if confinement.is_root():
        scratch = directory / "scratch"
        scratch.mkdir()
        return scratch
    scratch = find_scratch_base() / f"{_SCRATCH_PREFIX}{secrets.token_hex(8)}"
    (directory / _SCRATCH_NOTE).write_bytes(os.fsencode(scratch))
    confinement.run_confined("making a directory", ("mkdir", "--mode=0700", scratch))
    return scratch


def remove_stale_workshops(image_dir: Path) -> None:
    """Remove what killed builds left; under the build lock nobody else owns a workshop."""
    for directory in image_dir.glob(f"{_WORKSHOP_PREFIX}*/"):
        # The programs of a killed build hold its handover's lock for the instant they outlive it.
        with contextlib.suppress(FileNotFoundError), directory_lock(directory / "handover"):
            pass
        _remove_workshop(directory)


def _remove_workshop(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        scratch = Path(os.fsdecode((directory / _SCRATCH_NOTE).read_bytes()))
        if scratch.name.startswith(_SCRATCH_PREFIX) and scratch.exists():
            remove_tree("removing temporary files (rm)", scratch)
    shutil.rmtree(directory)
