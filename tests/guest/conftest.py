"""Real guests: few boots, shared by many tests.

A machine is launched for each kind of user-data that the selected tests ask for, all of them at
once: five for `make boots`, and another one for `make copies`. Most begin their first boot at
cloud-init. Their processors are let run two machines at a time, because in emulation a boot keeps a
processor busy, and five of them on two only get into each other's way.

One of them is saved when it is ready: the one without user-data for tests that need a machine of
their own, and are not about a boot; another one for such tests among those that boot.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib._base.files import create_private_directory
from pycloudlib.config import ENVIRONMENT_VARIABLE, parse_config
from pycloudlib.images.recipe import RELEASES
from pycloudlib.progress import Progress
from pycloudlib.qemu.instance import QemuInstance
from tests.guest.lookout import Lookout
from tests.guest.portrait import Portrait, paint
from tests.guest.seeds import COMPARED, RELEASE, SEEDS, SIZE, STANDARD, Kind, TestSeed

_log = logging.getLogger(__name__)


_BOOTS_AT_ONCE = threading.Semaphore(2)

SAVED = {Kind.NONE: "saved", Kind.FAST: "saved_fast"}
"""The machines that tests start from, and the fixtures that save them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that ask for few guests, while the others boot."""
    demand: dict[object, int] = {}
    for item in items:
        asked = sum(asks_for(item, kind) for kind in Kind)
        demand[item.parent] = max(asked, demand.get(item.parent, 0))
    items.sort(key=lambda item: demand[item.parent])


@pytest.fixture(scope="session")
def image() -> str:
    """Give the image that most tests use; made when it is not there yet."""
    return get_image(STANDARD)


@pytest.fixture(scope="session")
def guests(request: pytest.FixtureRequest) -> Iterator[dict[Kind, Future[Guest]]]:
    """Boot the machines that the selected tests ask for."""
    kinds = [kind for kind in Kind if any(asks_for(item, kind) for item in request.session.items)]
    if not kinds:
        yield {}
        return
    with Qemu(tag="guest") as cloud, ThreadPoolExecutor(len(Kind)) as boots:
        try:
            # What tests start from comes first, alone: they need not wait for the others.
            kinds.sort(key=lambda kind: (kind is not Kind.NONE, kind is not Kind.FAST))
            booting: dict[Kind, Future[Guest]] = {}
            for kind in kinds:
                booting[kind] = boots.submit(boot, cloud, kind, booting.get(kinds[0]))
            yield booting
        finally:
            boots.shutdown(wait=False, cancel_futures=True)
            cloud.clean()  # ends waits that still go on


@pytest.fixture(scope="session", autouse=True)
def lookout(guests: dict[Kind, Future[Guest]]) -> Iterator[Lookout]:
    """Look, all the time, at who listens where and who may read what; nothing wrong is found."""
    cloud = Qemu(tag="lookout")
    with Lookout(cloud.working_dir) as watching:
        yield watching
    assert watching.found == set()


@pytest.fixture(scope="session", autouse=True)
def _boots_in_the_background(guests: dict[Kind, Future[Guest]]) -> None:
    """Begin with the boots, so that they go on while other tests leave a processor idle."""


@dataclass(frozen=True)
class Guest:
    """A booted machine.

    Attributes:
        machine: The machine.
        warnings: What was logged while it was waited for.
        portrait: What its guest was like then; only of those that are compared.
    """

    machine: QemuInstance
    warnings: list[str]
    portrait: Portrait | None = None


def launch(
    cloud: Qemu, image: str, seed: TestSeed, launch_args: list[str] | None = None
) -> QemuInstance:
    """Launch a machine with a seed."""
    return cloud.launch(
        image,
        SIZE,
        user_data=seed.user_data,
        meta_data=seed.meta_data,
        vendor_data=seed.vendor_data,
        network_config=seed.network_config,
        kernel_cmdline=seed.kernel_cmdline,
        launch_args=launch_args,
        fast_boot=seed.fast_boot,
    )


def boot(cloud: Qemu, kind: Kind, after: Future[Guest] | None) -> Guest:
    """Launch a machine with a seed, after another's boot, and wait until it is ready."""
    if after is not None:
        wait([after])
    seed = SEEDS[kind]
    image = get_image(seed.release)
    # What is saved boots at once: its copies have its options.
    held_back = kind not in SAVED
    machine = launch(cloud, image, seed, ["-S"] if held_back else None)
    with _BOOTS_AT_ONCE, collecting_warnings(machine.name) as warnings:
        if held_back:
            machine.machine.execute("cont")
        machine.wait()
        # Before tests do anything in it.
        portrait = paint(machine) if kind in COMPARED else None
    return Guest(machine, warnings, portrait)


def asks_for(item: pytest.Item, kind: Kind) -> bool:
    """Say whether a test uses the machine of a kind."""
    callspec = getattr(item, "callspec", None)
    if callspec is not None and callspec.params.get("kind") is kind:
        return True
    if SAVED.get(kind) in getattr(item, "fixturenames", ()):
        return True
    marker = item.get_closest_marker("uses")
    return marker is not None and kind in marker.args


@pytest.fixture
def vm(guests: dict[Kind, Future[Guest]]) -> QemuInstance:
    """Give the machine with a cloud-config, on which most tests run."""
    return guests[Kind.CLOUD_CONFIG].result().machine


@pytest.fixture(scope="session")
def saved(guests: dict[Kind, Future[Guest]]) -> Iterator[str]:
    """Give the image of a saved machine: booted, ready, with nothing done to it."""
    yield from save(guests, Kind.NONE)


@pytest.fixture(scope="session")
def saved_fast(guests: dict[Kind, Future[Guest]]) -> Iterator[str]:
    """Give the image of such a machine with a cloud-config, for tests that boot beside others."""
    yield from save(guests, Kind.FAST)


def save(guests: dict[Kind, Future[Guest]], kind: Kind) -> Iterator[str]:
    """Save a machine; its image is deleted afterwards."""
    machine = guests[kind].result().machine
    with Qemu(tag="guest-saved") as cloud:
        yield cloud.snapshot(machine, memory=True)


@pytest.fixture
def working_dir(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let programs that the test runs work in a directory of their own, and leave no cloud there.

    All else is as this user has configured it. So nobody else's cloud of the same tag, and no
    `prune` of others, is seen in what they leave.
    """
    # Where the lookout sees it, and hard links lead to the images.
    directory = Path(saved).parents[2] / f"test-{secrets.token_hex(4)}"
    create_private_directory(directory)
    settings = {**parse_config().get("qemu", {}), "working_dir": str(directory)}
    file = tmp_path / "pycloudlib.toml"
    lines = (f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    file.write_text("".join(["[qemu]\n", *lines]))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(file))
    yield directory
    left = sorted(map(str, directory.glob("pycl-qemu-*")))
    shutil.rmtree(directory)
    assert left == []


def get_image(release: str) -> str:
    """Build or download the image of a release, unless it is there.

    Args:
        release: Debian's; in the place of the standard one, the one is taken that `make` was given.
    """
    release = RELEASE if release == STANDARD else release
    with Qemu(tag="test-image") as cloud:
        get = cloud.build_image if release in RELEASES else cloud.released_image
        return get(release, on_progress=_log_progress)


@contextlib.contextmanager
def collecting_warnings(name: str) -> Iterator[list[str]]:
    """Collect the warnings about one machine."""
    texts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if name in record.getMessage():
                texts.append(record.getMessage())

    handler = Collector(logging.WARNING)
    logger = logging.getLogger("pycloudlib")
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)


def _log_progress(report: Progress) -> None:
    _log.info("%s %s", report.activity, report.detail)
