"""First boots that begin at the seed, with a boot sector in the place of a guest."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.qemu.launching import startingpoint
from pycloudlib.qemu.vm.running import State
from tests.qemu.conftest import CloudMaker
from tests.qemu.machines import qemus, runs
from tests.qemu.reader import begins_there, launch, machines_in, prints, starts

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("emptied")]


def test_machine_goes_on_and_reads_its_own_seed(cloud: Qemu, reader_image: Path) -> None:
    first = launch(cloud, reader_image, "one")
    second = launch(cloud, reader_image, "two")
    assert prints(first, "one")
    assert prints(second, "two")
    (start,) = starts(cloud)
    assert begins_there(first, start)
    assert begins_there(second, start)
    assert runs(first)
    assert runs(second)
    assert first.port != second.port


def test_console_begins_where_the_other_machine_began(cloud: Qemu, reader_image: Path) -> None:
    instance = launch(cloud, reader_image, "mine")
    assert prints(instance, "mine")
    log = instance.console_log()
    assert "SeaBIOS" in log
    assert log.count("SeaBIOS") == 1
    assert log.index("SeaBIOS") < log.index(">mine")


def test_configuration_makes_it_the_default(make_cloud: CloudMaker, reader_image: Path) -> None:
    cloud = make_cloud("fast", more='accelerator = "tcg"\nfast_boot = true\n')
    instance = launch(cloud, reader_image, fast_boot=None)
    (start,) = starts(cloud)
    assert begins_there(instance, start)
    ordinary = launch(cloud, reader_image, fast_boot=False)
    assert not begins_there(ordinary, start)
    for made in (instance, ordinary):
        made.delete()


def test_switched_off_and_on_it_boots_from_its_beginning(cloud: Qemu, reader_image: Path) -> None:
    instance = launch(cloud, reader_image, "mine")
    assert prints(instance, "mine")
    instance.machine.kill()
    instance.machine.power_on()
    assert prints(instance, "mine", times=2)
    assert instance.console_log().count("SeaBIOS") == 2


def test_held_machine_waits_for_its_user(cloud: Qemu, reader_image: Path) -> None:
    instance = launch(cloud, reader_image, "mine", launch_args=["-S"])
    assert instance.machine.state is State.PAUSED
    assert ">mine" not in instance.console_log()
    instance.machine.execute("cont")
    assert prints(instance, "mine")


def test_many_at_once_make_one_starting_point(
    make_cloud: CloudMaker, cloud: Qemu, reader_image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clouds = [cloud, make_cloud("other")]
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(4) as threads:
        made = list(
            threads.map(lambda n: launch(clouds[n % 2], reader_image, f"user-{n}"), range(4))
        )
    assert caplog.text.count("up to cloud-init once") == 1
    assert len(starts(cloud)) == 1
    for number, instance in enumerate(made):
        assert prints(instance, f"user-{number}")
        instance.delete()


def test_large_seeds_have_starting_points_of_their_own(cloud: Qemu, reader_image: Path) -> None:
    small = launch(cloud, reader_image, "small")
    large = launch(cloud, reader_image, "large\0" + "#" * (1 << 20))
    assert len(starts(cloud)) == 1
    huge = launch(cloud, reader_image, "huge\0" + "#" * (5 << 20))
    assert len(starts(cloud)) == 2
    for instance, line in ((small, "small"), (large, "large"), (huge, "huge")):
        assert prints(instance, line)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"no_seed_iso": True, "user_data": None}, "it has no seed"),
        ({"launch_args": ["-device", "pvpanic"]}, "launch_args of its own"),
        ({"user_data": "#cloud-config\nvendor_data: {enabled: false}\n"}, "vendor-data"),
    ],
    ids=["no seed", "launch_args", "vendor_data"],
)
def test_what_does_not_fit_boots_from_its_beginning(
    options: dict[str, object],
    reason: str,
    cloud: Qemu,
    reader_image: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        instance = launch(cloud, reader_image, **options)  # type: ignore[arg-type]
    assert f"{instance.name} boots from its beginning" in caplog.text
    assert reason in caplog.text
    assert starts(cloud) == []
    assert runs(instance)


def test_bad_input_is_told_before_anything_is_made(cloud: Qemu, reader_image: Path) -> None:
    with pytest.raises(ValueError, match="meta_data"):
        launch(cloud, reader_image, meta_data="- a list")
    assert starts(cloud) == []
    assert machines_in(cloud) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
def test_interrupted_making_leaves_nothing(
    error: BaseException, cloud: Qemu, reader_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr(startingpoint, "wait_for_seed", interrupted)
    with pytest.raises(type(error)):
        launch(cloud, reader_image)
    assert qemus(cloud.working_dir) == []
    assert machines_in(cloud) == []
    assert starts(cloud) == []


def test_guest_that_dies_before_its_seed_boots_ordinarily(
    cloud: Qemu,
    reader_image: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    waited = threading.Event()

    def kill_and_wait(machine: object, deadline: object) -> None:
        waited.set()
        machine.kill()  # type: ignore[attr-defined]
        wait_for_seed(machine, deadline)  # type: ignore[arg-type]

    wait_for_seed = startingpoint.wait_for_seed
    monkeypatch.setattr(startingpoint, "wait_for_seed", kill_and_wait)
    instance = launch(cloud, reader_image, "mine")
    assert waited.is_set()
    assert "SIGKILL" in caplog.text
    assert prints(instance, "mine")
