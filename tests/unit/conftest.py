"""An image server of the tests' own, a user of their own, and a host."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from pycloudlib.guest.access.hostkeys import HostKeyPool
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.host.resources import PortRegistry
from pycloudlib.qemu.launching.beginning import Host
from tests.unit.imageserver import (
    ImageServer,
    SigningKey,
    forget_proxies,
    new_signing_key,
    running_image_server,
)
from tests.unit.sshserver import LocalInstance

# The same examples each time, however slow the machine is: a failure is of the change that is
# tested. The fixtures of a test serve all of its examples.
settings.register_profile(
    "unit",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("unit")


@pytest.fixture(scope="session")
def key() -> Iterator[SigningKey]:
    """Give the key that signs what the server publishes."""
    with new_signing_key() as made:
        yield made


@pytest.fixture
def server(
    key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ImageServer]:
    """Give a server that publishes nothing yet."""
    forget_proxies(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with running_image_server(key, tmp_path) as running:
        yield running


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """Give the directory in which the commands of `local` run."""
    directory = tmp_path / "guest"
    directory.mkdir()
    return directory


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Give a directory beside it, to copy from and to."""
    directory = tmp_path / "here"
    directory.mkdir()
    return directory


@pytest.fixture
def local(guest: Path) -> Iterator[LocalInstance]:
    """Give a machine that is this host, behind an SSH server of the tests' own."""
    instance = LocalInstance(guest)
    yield instance
    instance.close()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Give a host whose QEMU can be changed."""
    binary = tmp_path / "qemu"
    binary.write_text("binary")
    return Host(
        binary, Accelerator.TCG, PortRegistry(tmp_path / "ports"), HostKeyPool(tmp_path / "keys")
    )


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """Leave this package's log as it was: command lines set what is printed of it."""
    logger = logging.getLogger("pycloudlib")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
