"""Launches that wait until their machine fits beside those that boot."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.qemu.host.budget import Budget, Capacity
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching import admission
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.settings import QemuSettings
from pycloudlib.qemu.vm.process import LaunchError
from tests.qemu.machines import SMALL, becomes, hurry

pytestmark = pytest.mark.qemu

LIMIT = 60
DONE = b"[   41.0] cloud-init[700]: Cloud-init v. 24.4 finished at Mon, 30 Nov 2026 10:00:00.\n"


@pytest.fixture(autouse=True)
def budget_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give these machines a budget of their own, of one processor."""

    def make(_settings: QemuSettings, whole: Capacity | None = None) -> Budget:
        return Budget(tmp_path / "budget", whole or Capacity(1, 4000))

    monkeypatch.setattr(QemuSettings, "budget", make)
    return tmp_path / "budget"


def reserved(directory: Path) -> list[str]:
    """Give what is reserved, as processors and MiB."""
    return sorted("-".join(file.name.split("-")[:2]) for file in directory.glob("*.taken"))


def never(holders: str) -> None:
    raise AssertionError(f"it waits: {holders}")


class Waiting:
    """A launch that waits in a thread of its own."""

    def __init__(self, launch: Callable[[Callable[[str], None]], QemuInstance]) -> None:
        self._told = threading.Event()
        self.holders = ""
        self._threads = ThreadPoolExecutor(1)
        self.launched: Future[QemuInstance] = self._threads.submit(launch, self._tell)
        assert self._told.wait(LIMIT)
        assert not self.launched.done()

    def _tell(self, holders: str) -> None:
        self.holders = holders
        self._told.set()

    def result(self) -> QemuInstance:
        return self.launched.result(LIMIT)


def launch(
    cloud: Qemu, image: Path, wait_for_room: bool | Callable[[str], None] = never
) -> QemuInstance:
    return hurry(cloud.launch(str(image), SMALL, wait_for_room=wait_for_room))


def finish_boot(instance: QemuInstance) -> None:
    # What comes before the firmware's first line is of another boot.
    assert becomes(lambda: "Booting from Hard Disk" in instance.console_log(), LIMIT)
    with instance.machine.rundir.console_log.open("ab") as console:
        console.write(DONE)


@pytest.fixture
def first(cloud: Qemu, tiny_image: Path) -> QemuInstance:
    """Give a machine that boots, and holds the only processor for that."""
    return launch(cloud, tiny_image)


@pytest.fixture
def second(cloud: Qemu, tiny_image: Path, first: QemuInstance) -> Iterator[Waiting]:
    """Give a launch that waits for it."""
    waiting = Waiting(lambda tell: launch(cloud, tiny_image, tell))
    yield waiting
    with contextlib.suppress(Exception):
        admission.end_boot(first.instance_dir)
        waiting.result()


def test_second_machine_starts_when_the_first_has_booted(
    first: QemuInstance, second: Waiting, budget_directory: Path
) -> None:
    assert "have 1 of 1 processors, 64 of 4000 MiB" in second.holders
    assert reserved(budget_directory) == ["0-64", "1-0"]

    finish_boot(first)

    assert second.result().machine.powered_on > first.machine.powered_on
    assert reserved(budget_directory) == ["0-64", "0-64", "1-0"]


def test_second_machine_starts_when_the_first_is_deleted(
    first: QemuInstance, second: Waiting, budget_directory: Path
) -> None:
    assert first.delete() == []
    second.result()
    assert reserved(budget_directory) == ["0-64", "1-0"]


def test_second_machine_starts_when_the_qemu_of_the_first_ends(
    first: QemuInstance, second: Waiting, budget_directory: Path
) -> None:
    first.machine.kill()
    second.result()
    # One that is off may be started again.
    assert reserved(budget_directory) == ["0-64", "0-64", "1-0"]


def test_launch_without_waiting_is_not_held_up(
    cloud: Qemu, tiny_image: Path, second: Waiting
) -> None:
    launch(cloud, tiny_image, wait_for_room=False)
    assert not second.launched.done()


def test_launch_that_fails_gives_all_back(
    cloud: Qemu, tiny_image: Path, budget_directory: Path
) -> None:
    with pytest.raises(LaunchError):
        cloud.launch(str(tiny_image), SMALL, launch_args=["-nonsense"], wait_for_room=True)
    assert reserved(budget_directory) == []


def test_what_is_wrong_is_said_before_the_wait(
    cloud: Qemu, tiny_image: Path, saved: SavedMachine, first: QemuInstance
) -> None:
    for wrong in ("c1", "c0m64"):
        with pytest.raises(ValueError, match=wrong):
            cloud.launch(str(tiny_image), wrong, wait_for_room=never)
    with pytest.raises(ValueError, match="saved machine"):
        cloud.launch(str(saved.image), "c1m128", wait_for_room=never)
    with pytest.raises(TypeError, match="wait_for_room is 'yes'"):
        cloud.launch(str(tiny_image), SMALL, wait_for_room="yes")  # type: ignore[arg-type]


def test_interrupted_wait_leaves_nothing(
    cloud: Qemu, tiny_image: Path, first: QemuInstance, budget_directory: Path
) -> None:
    def interrupt(_holders: str) -> None:
        raise KeyboardInterrupt

    before = sorted(cloud.parent_dir.iterdir())
    with pytest.raises(KeyboardInterrupt):
        launch(cloud, tiny_image, interrupt)
    assert sorted(cloud.parent_dir.iterdir()) == before
    assert reserved(budget_directory) == ["0-64", "1-0"]
    assert not list(budget_directory.glob("*.waiting"))


@pytest.mark.usefixtures("first")
def test_wait_that_takes_too_long_is_an_error(
    cloud: Qemu, tiny_image: Path, budget_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried = Budget(budget_directory, Capacity(1, 4000), limit=0.1)
    monkeypatch.setattr(QemuSettings, "budget", lambda _settings: hurried)
    with pytest.raises(PycloudlibTimeoutError, match="1 processors and 64 MiB did not fit"):
        launch(cloud, tiny_image, lambda _holders: None)


def test_boot_without_an_end_does_not_hold_up_others_for_ever(
    cloud: Qemu, tiny_image: Path, budget_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QemuInstance, "ready_timeout", 0.001)
    launch(cloud, tiny_image)
    assert becomes(lambda: reserved(budget_directory) == ["0-64"])


def test_many_threads_boot_as_many_machines_as_fit(
    cloud: Qemu, tiny_image: Path, budget_directory: Path
) -> None:
    at_once: list[int] = []

    def launch_and_boot(_number: int) -> None:
        instance = launch(cloud, tiny_image, wait_for_room=True)
        at_once.append(reserved(budget_directory).count("1-0"))
        finish_boot(instance)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(launch_and_boot, range(4)))
    assert max(at_once) == 1
    assert becomes(lambda: reserved(budget_directory) == ["0-64"] * 4)
