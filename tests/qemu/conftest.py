"""Machines that are made but not started: the real binary, no guest, milliseconds each."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.guest.access.hostkeys import TYPES, HostKey, HostKeyPool
from pycloudlib.key import generate_ecdsa, generate_ed25519, generate_rsa
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching.warmcache import WarmCache
from pycloudlib.qemu.state.savedmachine import SavedMachine
from tests.qemu.machines import run, save, track
from tests.qemu.reader import write_reader

UNSTARTED = ("-S",)
"""QEMU's option for a machine whose processors do not run."""

CloudMaker = Callable[..., Qemu]

_QUICK_KEYS: dict[str, Callable[[str], tuple[str, str]]] = {
    "ed25519": generate_ed25519,
    "ecdsa": generate_ecdsa,
    "rsa": partial(generate_rsa, bits=1024),
}


@pytest.fixture(autouse=True, scope="package")
def _quick_host_keys() -> Iterator[None]:
    """Give machines short host keys: no guest uses them, and an RSA key costs more than a launch.

    None is kept for later launches, which may be a user's.
    """

    def take(_pool: HostKeyPool, comment: str) -> tuple[HostKey, ...]:
        return tuple(HostKey(kind, *_QUICK_KEYS[kind](comment)) for kind in TYPES)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostKeyPool, "take", take)
        patch.setattr(HostKeyPool, "fill", lambda _pool: None)
        yield


@pytest.fixture
def tiny_image(tmp_path: Path) -> Path:
    """Give a raw disk with a boot sector that stops the processor at once."""
    image = tmp_path / "tiny.img"
    # cli; hlt; jmp to hlt
    image.write_bytes(b"\xfa\xf4\xeb\xfd".ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    return image


@pytest.fixture
def reader_image(tmp_path: Path) -> Path:
    """Give a disk whose boot sector reads the seed's directory, then prints its user-data."""
    image = tmp_path / "reader.img"
    write_reader(image)
    return image


@pytest.fixture
def working_dir(tmp_path: Path) -> Path:
    """Give the directory where the clouds of a test work."""
    directory = tmp_path / "work"
    directory.mkdir()
    return directory


@pytest.fixture
def make_cloud(working_dir: Path) -> Iterator[CloudMaker]:
    """Make clouds with emulation and a directory of their own; all are cleaned afterwards."""
    clouds: list[Qemu] = []

    def make(tag: str = "t", *, timestamp_suffix: bool = False, more: str = "") -> Qemu:
        config = f'[qemu]\nworking_dir = "{working_dir}"\n' + (more or 'accelerator = "tcg"\n')
        cloud = Qemu(tag, timestamp_suffix=timestamp_suffix, config_file=io.StringIO(config))
        clouds.append(cloud)
        return track(cloud)

    yield make
    errors = [error for cloud in clouds for error in cloud.clean()]
    assert errors == []
    assert list(working_dir.iterdir()) == []


@pytest.fixture
def cloud(make_cloud: CloudMaker) -> Qemu:
    """Give a cloud."""
    return make_cloud()


@pytest.fixture(params=["installed", pytest.param("newest", marks=pytest.mark.thorough)])
def cloud_of_each_qemu(request: pytest.FixtureRequest, make_cloud: CloudMaker) -> Qemu:
    """Give a cloud for each QEMU that a test runs with; the newest is for thorough ones."""
    if request.param == "installed":
        return make_cloud()
    newest: Path = request.getfixturevalue("newest_qemu")
    return make_cloud(more=f'accelerator = "tcg"\nqemu_binary = "{newest}"\n')


@pytest.fixture
def unstarted(cloud: Qemu, tiny_image: Path) -> QemuInstance:
    """Give a machine that is made but not started."""
    return cloud.launch(str(tiny_image), launch_args=UNSTARTED)


@pytest.fixture
def running(cloud: Qemu, tiny_image: Path) -> QemuInstance:
    """Give a machine that runs, with a guest that has halted."""
    return run(cloud, tiny_image)


@pytest.fixture
def saved(running: QemuInstance) -> SavedMachine:
    """Give that machine, saved while it runs."""
    return save(running)


@pytest.fixture
def cache(cloud: Qemu) -> WarmCache:
    return WarmCache(cloud.working_dir, cloud.settings.warm_cache_mib << 20)


@pytest.fixture
def emptied(cloud: Qemu, cache: WarmCache) -> Iterator[None]:
    """Leave no cache behind; what uses it is deleted before."""
    yield
    for instance in list(cloud.created_instances):
        instance.delete()
    cache.prune(0)
    assert not cache.directory.exists()


@pytest.fixture
def small_host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Give a working directory on a file system of 4 MiB, or of the size asked for."""
    size = getattr(request, "param", "4m")
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root can mount a small file system")
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)
