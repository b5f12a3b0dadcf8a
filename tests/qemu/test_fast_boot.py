"""First boots that begin at the seed, with a boot sector in the place of a guest."""

from __future__ import annotations

import logging
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.guest.seed import ROOT_DIRECTORY_SECTOR
from pycloudlib.qemu import firstboot, savedmachine
from pycloudlib.qemu.accelerator import Accelerator
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.machine import State
from pycloudlib.qemu.warm import WarmCache, WarmImage
from tests.qemu.conftest import CloudMaker
from tests.qemu.saved import SMALL, becomes, hurry, mode, qemus, runs, touch

pytestmark = pytest.mark.qemu

# Of the seed: user-data is the first file after the directories.
USER_DATA_SECTOR = ROOT_DIRECTORY_SECTOR + 3 * 4


@pytest.fixture
def reader_image(tmp_path: Path) -> Path:
    """Give a disk whose boot sector reads the seed's directory, then prints its user-data."""
    program = bytes.fromhex(
        "fc"  # cld
        "31c0 8ed8 8ed0 bc007c"  # ds = ss = 0, sp = 0x7c00
        "be407c b442 b281 cd13"  # read the sector that the packet at 0x7c40 names, of drive 0x81
        f"c706487c{USER_DATA_SECTOR:02x}00"  # let the packet name another one
        "be407c b442 b281 cd13"  # read it, too
        "fa be0080 baf803 b03e ee"  # undisturbed, print ">" and, from there on,
        "ac 84c0 7403 ee ebf8"  # print each byte up to a zero
        "b00a ee"  # print a line end
        "f4 ebfd"  # halt for ever
    )
    packet = bytes.fromhex(f"10000100 00800000 {ROOT_DIRECTORY_SECTOR:02x}00000000000000")
    sector = program.ljust(0x40, b"\0") + packet
    image = tmp_path / "reader.img"
    image.write_bytes(sector.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    return image


@pytest.fixture
def cache(cloud: Qemu) -> WarmCache:
    return WarmCache(cloud.working_dir, cloud.settings.warm_cache_mib << 20)


@pytest.fixture(autouse=True)
def emptied(cloud: Qemu, cache: WarmCache) -> Iterator[None]:
    """Leave no cache behind; what uses it is deleted before."""
    yield
    for instance in list(cloud.created_instances):
        instance.delete()
    cache.prune(0)
    assert not cache.directory.exists()


def launch(cloud: Qemu, image: Path, user_data: str = "mine", **options: object) -> QemuInstance:
    arguments: dict[str, object] = {"fast_boot": True, "user_data": user_data, **options}
    return hurry(cloud.launch(str(image), SMALL, **arguments))  # type: ignore[arg-type]


def prints(instance: QemuInstance, text: str, times: int = 1) -> bool:
    """Wait until the boot sector has printed a text."""
    log = instance.machine.rundir.console_log
    assert becomes(lambda: log.read_bytes().count(f">{text}\n".encode()) >= times), log.read_bytes()
    return True


def machines_in(cloud: Qemu) -> list[str]:
    return [path.name for path in cloud.parent_dir.glob("*") if not path.name.startswith("keys-")]


def starts(cloud: Qemu) -> list[WarmImage]:
    return [warm for warm in cloud.warm_images() if warm.first_boot]


def begins_there(instance: QemuInstance, start: WarmImage) -> bool:
    return start.image_id.encode() in instance.machine.rundir.disk.read_bytes()[:4096]


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


def test_what_is_kept_is_its_owners_alone(cloud: Qemu, reader_image: Path) -> None:
    launch(cloud, reader_image)
    (start,) = starts(cloud)
    directory = savedmachine.directory_of(Path(start.image_id))
    assert mode(directory) == 0o700
    files = [file for file in directory.parent.rglob("*") if stat.S_ISREG(file.lstat().st_mode)]
    assert {file.name for file in files} >= {"memory", "state", "seed.iso", "console.log"}
    assert {mode(file) & 0o077 for file in files} == {0}


def test_starting_point_stays_while_a_machine_is_built_on_it(
    cloud: Qemu, reader_image: Path
) -> None:
    instance = launch(cloud, reader_image)
    (start,) = starts(cloud)
    assert start.base == str(reader_image)
    assert cloud.prune_warm_images() == []
    instance.delete()
    assert cloud.prune_warm_images() == [start.key]


def test_starting_point_goes_with_its_image(cloud: Qemu, reader_image: Path) -> None:
    launch(cloud, reader_image).delete()
    cloud.delete_image(str(reader_image))
    assert starts(cloud) == []


def test_starting_point_is_no_machine_to_copy(cloud: Qemu, reader_image: Path) -> None:
    launch(cloud, reader_image)
    (start,) = starts(cloud)
    with pytest.raises(ValueError, match="fast_boot=True") as caught:
        cloud.launch(start.image_id)
    assert str(reader_image) in str(caught.value)


def test_damaged_one_is_made_anew(
    cloud: Qemu, reader_image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    launch(cloud, reader_image).delete()
    (start,) = starts(cloud)
    touch(savedmachine.directory_of(Path(start.image_id)) / "memory")
    instance = launch(cloud, reader_image, "mine")
    assert "was changed since" in caplog.text
    assert prints(instance, "mine")
    (anew,) = starts(cloud)
    assert begins_there(instance, anew)


def test_state_that_does_not_fit_ends_in_an_ordinary_boot(
    cloud: Qemu, reader_image: Path, cache: WarmCache, caplog: pytest.LogCaptureFixture
) -> None:
    launch(cloud, reader_image).delete()
    (start,) = starts(cloud)
    saved = cache.find(start.key, cloud._host)
    assert saved is not None
    saved.state.write_bytes(saved.state.read_bytes()[: 1 << 16])
    savedmachine.write_facts(saved, saved.login)
    instance = launch(cloud, reader_image, "mine")
    assert "cannot begin at cloud-init" in caplog.text
    assert prints(instance, "mine")
    assert not begins_there(instance, start)
    assert qemus(cloud.parent_dir) == [instance.machine.pid]


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


def test_nothing_is_kept_where_nothing_may_be(
    make_cloud: CloudMaker, reader_image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cloud = make_cloud("none", more='accelerator = "tcg"\nwarm_cache_mib = 0\n')
    with caplog.at_level(logging.INFO):
        instance = launch(cloud, reader_image, "mine")
    assert "warm_cache_mib = 0" in caplog.text
    assert prints(instance, "mine")
    instance.delete()


def test_guest_that_never_opens_its_seed_is_waited_for_once(
    cloud: Qemu,
    tiny_image: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(firstboot, "_LIMITS", dict.fromkeys(Accelerator, 1.0))
    first = launch(cloud, tiny_image)
    assert "did not open the seed within 1 s" in caplog.text
    assert runs(first)
    waits: list[object] = []
    monkeypatch.setattr(firstboot, "_wait_for_seed", lambda *arguments: waits.append(arguments))
    caplog.clear()
    second = launch(cloud, tiny_image)
    assert waits == []
    assert "did not open the seed" in caplog.text, "each launch says why it is slow"
    assert runs(second)
    for instance in (first, second):
        instance.delete()
    cloud.prune_warm_images()
    assert not (cloud.working_dir / "warm").exists(), "it is forgotten"


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

    monkeypatch.setattr(firstboot, "_wait_for_seed", interrupted)
    with pytest.raises(type(error)):
        launch(cloud, reader_image)
    assert qemus(cloud.working_dir) == []
    assert machines_in(cloud) == []
    assert starts(cloud) == []


def test_making_that_fails_ends_in_an_ordinary_boot(
    cloud: Qemu,
    reader_image: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WarmCache, "add", full)
    instance = launch(cloud, reader_image, "mine")
    assert "No space left" in caplog.text
    assert prints(instance, "mine")
    assert qemus(cloud.parent_dir) == [instance.machine.pid]
    assert machines_in(cloud) == [instance.name]


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

    wait_for_seed = firstboot._wait_for_seed
    monkeypatch.setattr(firstboot, "_wait_for_seed", kill_and_wait)
    instance = launch(cloud, reader_image, "mine")
    assert waited.is_set()
    assert "SIGKILL" in caplog.text
    assert prints(instance, "mine")
