"""A pool has machines ready before they are asked for, each its own, and leaves none behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib.errors import ImageNotFoundError, PycloudlibException
from pycloudlib.qemu.host.budget import Budget, Capacity
from pycloudlib.qemu.instance import QemuInstance
from tests.qemu.conftest import CloudMaker
from tests.qemu.machines import alive, becomes, qemus, run, runs, save

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("own_ports", "unwaited")]


@pytest.fixture
def unwaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take machines as ready when they run: their guests have halted."""
    monkeypatch.setattr(QemuInstance, "wait", lambda _instance, *_args, **_options: None)


@pytest.fixture
def cloud(make_cloud: CloudMaker, tmp_path: Path) -> Qemu:
    """Return a cloud whose budget is that of the test alone, and fits four machines."""
    (tmp_path / "state").mkdir()
    return make_cloud(
        more=f'accelerator = "tcg"\nstate_dir = "{tmp_path / "state"}"\nbudget_processors = 4\n'
    )


@pytest.fixture
def image(cloud: Qemu, tiny_image: Path) -> str:
    """Return the image of a saved machine, which itself is gone."""
    machine = run(cloud, tiny_image)
    saved = save(machine)
    machine.delete()
    return str(saved.image)


@pytest.fixture
def alone(cloud: Qemu) -> Callable[[int], bool]:
    """Return a function that waits until so many machines of the cloud run, and no more."""
    return lambda number: becomes(lambda: len(qemus(cloud.parent_dir)) == number)


def test_machine_is_there_before_it_is_taken_and_the_next_follows(
    cloud: Qemu, image: str, alone: Callable[[int], bool]
) -> None:
    with cloud.pool(image) as pool:
        assert alone(1)
        waiting = qemus(cloud.parent_dir)
        taken = pool.take()
        assert [taken.machine.pid] == waiting
        assert runs(taken)
        assert alone(2)
    assert qemus(cloud.parent_dir) == [taken.machine.pid], "only what was taken lives on"
    assert taken in cloud.created_instances


def test_machines_have_identities_of_their_own(cloud: Qemu, image: str) -> None:
    with cloud.pool(image, size=2) as pool:
        machines = [pool.take() for _ in range(3)]
    identities = [
        json.loads((machine.instance_dir / "fix-up.json").read_text())["identity"]
        for machine in machines
    ]
    assert [identity["hostname"] for identity in identities] == [
        machine.name for machine in machines
    ]
    for values in (
        [identity["machine_id"] for identity in identities],
        [(machine.instance_dir / "known_hosts").read_text() for machine in machines],
        [machine.id for machine in machines],
    ):
        assert len(set(values)) == 3


def test_threads_take_different_machines(cloud: Qemu, image: str) -> None:
    ready = threading.Barrier(2, timeout=30)

    def take(_number: int) -> list[QemuInstance]:
        ready.wait()
        return [pool.take(), pool.take()]

    with cloud.pool(image, size=2) as pool, ThreadPoolExecutor(2) as threads:
        first, second = threads.map(take, range(2))
    assert len({machine.machine.pid for machine in (*first, *second)}) == 4
    assert all(map(runs, (*first, *second)))


@pytest.mark.parametrize("size", [0, -1, True, False, 1.0, "1", None])
def test_size_that_is_none_is_an_error(cloud: Qemu, image: str, size: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=repr(size)):
        cloud.pool(image, size=size)
    assert qemus(cloud.parent_dir) == []


def test_image_that_is_not_there_is_an_error(cloud: Qemu) -> None:
    with pytest.raises(ImageNotFoundError, match=r"nowhere\.img"):
        cloud.pool("nowhere.img")


@pytest.mark.parametrize(
    "options",
    [{"instance_type": "huge"}, {"user_data": 7}, {"disks": ["none"]}, {"launch_args": "-S"}],
)
def test_option_that_is_malformed_is_an_error_at_once(
    cloud: Qemu, tiny_image: Path, options: dict[str, Any]
) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError)):
        cloud.pool(str(tiny_image), **options)
    assert qemus(cloud.parent_dir) == []


def test_pool_ends_with_the_error_that_leaves_it(
    cloud: Qemu, image: str, alone: Callable[[int], bool]
) -> None:
    def work() -> None:
        with cloud.pool(image, size=2):
            assert alone(2)
            raise ValueError("as it is")

    with pytest.raises(ValueError, match="as it is"):
        work()
    assert qemus(cloud.parent_dir) == []
    assert cloud.created_instances == []


@pytest.mark.thorough
def test_pool_that_is_left_while_it_starts_machines_leaves_none(cloud: Qemu, image: str) -> None:
    with cloud.pool(image, size=3):
        pass
    assert qemus(cloud.parent_dir) == []
    assert cloud.created_instances == []


def test_closed_pool_may_be_closed_again_and_refuses(cloud: Qemu, image: str) -> None:
    with cloud.pool(image) as pool:
        taken = pool.take()
        pool.close()
        pool.close()
        with pytest.raises((ValueError, PycloudlibException), match="closed"):
            pool.take()
    assert qemus(cloud.parent_dir) == [taken.machine.pid]


def test_machine_that_dies_while_it_waits_is_not_taken(
    cloud: Qemu, image: str, alone: Callable[[int], bool]
) -> None:
    with cloud.pool(image) as pool:
        assert alone(1)
        (pid,) = qemus(cloud.parent_dir)
        os.kill(pid, signal.SIGKILL)
        assert becomes(lambda: not alive(pid))
        taken = pool.take()
        assert taken.machine.pid != pid
        assert runs(taken)
    assert [instance.name for instance in cloud.created_instances] == [taken.name]


@pytest.mark.thorough
def test_machines_that_cannot_start_are_told_when_one_is_taken(
    cloud: Qemu, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_instance: QemuInstance, *_args: object, **_options: object) -> None:
        raise PycloudlibException("it is not ready")

    monkeypatch.setattr(QemuInstance, "wait", fail)
    with (
        cloud.pool(image, size=2) as pool,
        pytest.raises(PycloudlibException, match="it is not ready"),
    ):
        pool.take()
    assert qemus(cloud.parent_dir) == []
    assert cloud.created_instances == []


@pytest.mark.thorough
def test_pool_never_has_more_than_the_budget(
    cloud: Qemu, image: str, tmp_path: Path, alone: Callable[[int], bool]
) -> None:
    budget = Budget(tmp_path / "state" / "budget", Capacity(4, 1 << 20))
    with (
        budget.reserving(Capacity(2, 64), lambda _holders: None),
        cloud.pool(image, size=8) as pool,
    ):
        assert alone(2)
        pool.take()
        assert alone(2)


def test_what_waits_is_given_back_at_once_to_others(
    cloud: Qemu, image: str, tmp_path: Path, alone: Callable[[int], bool]
) -> None:
    budget = Budget(tmp_path / "state" / "budget", Capacity(4, 1 << 20))
    with cloud.pool(image, size=4) as pool:
        assert alone(4)
        with budget.reserving(Capacity(3, 64), lambda _holders: None):
            assert len(qemus(cloud.parent_dir)) <= 1, "it uses what it has given back"
            assert runs(pool.take())


@pytest.mark.thorough
def test_room_of_a_machine_is_free_when_it_is_deleted(cloud: Qemu, image: str) -> None:
    with cloud.pool(image, size=2) as pool:
        for _ in range(6):
            pool.take().delete()


@pytest.mark.thorough
def test_image_stays_while_a_pool_has_machines(
    cloud: Qemu, image: str, alone: Callable[[int], bool]
) -> None:
    with cloud.pool(image) as pool:
        assert alone(1)
        taken = pool.take()
        assert runs(taken)
    taken.delete()
    cloud.delete_image(image)
    assert not Path(image).exists()


def test_cloud_that_is_cleaned_ends_what_waits(
    cloud: Qemu, image: str, alone: Callable[[int], bool]
) -> None:
    pool = cloud.pool(image, size=2)
    assert alone(2)
    assert cloud.clean() == []
    assert qemus(cloud.parent_dir) == []
    pool.close()


PROGRAM = """
import sys, time
from pycloudlib import Qemu
from pycloudlib.qemu.instance import QemuInstance
QemuInstance.wait = lambda *_args, **_options: None
cloud = Qemu("other", timestamp_suffix=False, config_file=sys.argv[1])
pool = cloud.pool(sys.argv[2], size=2)
taken = pool.take()
print(taken.id, taken.machine.pid, flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["normal", "killed"])
def test_what_waits_ends_with_its_program(
    cloud: Qemu, image: str, tmp_path: Path, end: str
) -> None:
    config = tmp_path / "other.toml"
    config.write_text(
        f'[qemu]\nworking_dir = "{cloud.working_dir}"\nstate_dir = "{tmp_path / "state"}"\n'
        'accelerator = "tcg"\nbudget_processors = 4\n'
    )
    directory = cloud.working_dir / "pycl-qemu-other"
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, config, image],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        taken_id, taken = process.stdout.readline().split()
        assert becomes(lambda: len(qemus(directory)) == 3)
        if end == "killed":
            process.kill()
        process.communicate("\n", timeout=60)
    left = [int(taken)] if end == "normal" else []
    assert becomes(lambda: qemus(directory) == left), qemus(directory)
    if left:
        cloud.get_instance(taken_id).delete()
    cloud.prune(stopped=True)
