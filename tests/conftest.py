"""Fixtures that all layers share."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pycloudlib.qemu.host import resources
from tests.newest_qemu import UnavailableError, find_newest_qemu
from tests.portrange import claimed_ports

UNIT_TESTS = Path(__file__).parent / "unit"

# A partition table without partitions: what makes a raw file a disk.
EMPTY_BOOT_SECTOR = bytes(510) + b"\x55\xaa"

_USER_DIRECTORIES = {
    "XDG_CACHE_HOME": ".cache",
    "XDG_CONFIG_HOME": ".config",
    "XDG_DATA_HOME": ".local/share",
    "XDG_STATE_HOME": ".local/state",
    "XDG_RUNTIME_DIR": ".run",
}

MakeImage = Callable[..., Path]


def pytest_configure() -> None:
    """Let Ctrl-C reach tests and the programs that they start.

    What a script starts in the background ignores it, and so does all that this starts.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_home(request: pytest.FixtureRequest) -> Path | None:
    """Give each unit test a home of its own, so that nothing of the user's is read or written."""
    if not request.path.is_relative_to(UNIT_TESTS):
        return None
    tmp_path: Path = request.getfixturevalue("tmp_path")
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for variable, directory in _USER_DIRECTORIES.items():
        monkeypatch.setenv(variable, str(home / directory))
    monkeypatch.delenv("PYCLOUDLIB_CONFIG", raising=False)
    monkeypatch.setattr(
        "pycloudlib.config.DEFAULT_LOCATIONS",
        (Path("~/.config/pycloudlib.toml"), tmp_path / "etc" / "pycloudlib.toml"),
    )
    return home


@pytest.fixture
def home(own_home: Path | None) -> Path:
    """Give the home directory that only this test has."""
    assert own_home is not None, "only unit tests have a home of their own"
    return own_home


@pytest.fixture(scope="session")
def newest_qemu() -> Path:
    """Give the binary of a QEMU that is newer than the installed one."""
    try:
        return find_newest_qemu()
    except UnavailableError as error:
        pytest.skip(f"No newer QEMU can be had: {error}")


@pytest.fixture(scope="session")
def claimed() -> Iterator[range]:
    """Claim ports that nothing else on this host uses while this process lives."""
    with claimed_ports() as claimed:
        yield claimed


@pytest.fixture
def own_ports(claimed: range, monkeypatch: pytest.MonkeyPatch) -> range:
    """Lease ports that nothing else on this host leases, so that they are free again afterwards."""
    monkeypatch.setattr(resources, "PORTS", claimed)
    return claimed


@pytest.fixture
def make_image(tmp_path: Path) -> MakeImage:
    """Give a function that makes disk images whose content is `content`, then nothing."""

    def make(
        name: str = "tiny.img",
        *,
        image_format: str = "qcow2",
        size: int = 1 << 20,
        content: bytes = EMPTY_BOOT_SECTOR,
        options: tuple[str, ...] = (),
    ) -> Path:
        image = tmp_path / name
        raw = image if image_format == "raw" else tmp_path / f"{name}.content"
        with raw.open("wb") as file:
            file.write(content)
            file.truncate(size)
        if raw is not image:
            command = ["qemu-img", "convert", "-f", "raw", "-O", image_format, *options]
            subprocess.run([*command, str(raw), str(image)], check=True, capture_output=True)
            raw.unlink()
        return image

    return make


@pytest.fixture
def tiny_image(make_image: MakeImage) -> Path:
    """Give a qcow2 image of 1 MiB that holds nothing but an empty partition table."""
    return make_image()
