import datetime
import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pycloudlib._base import tools
from pycloudlib.errors import ImageBuildError, MissingPrerequisiteError, ToolError
from pycloudlib.images import build, store
from pycloudlib.images.build import Workshop
from pycloudlib.images.recipe import BuildRecipe
from pycloudlib.progress import Progress, ProgressCallback, ignore_progress

RECIPE = BuildRecipe()
TODAY = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d")


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    return directory


class FakeMaker:
    """Makes an image of a few bytes, in no time, and counts how often."""

    def __init__(self, before: Callable[[Workshop], None] = lambda _workshop: None) -> None:
        self.before = before
        self.calls = 0
        self.serials: list[str] = []

    def __call__(
        self, recipe: BuildRecipe, serial: str, workshop: Workshop, steps: build.Steps
    ) -> None:
        self.calls += 1
        self.serials.append(serial)
        image = workshop.product / recipe.image_name
        image.write_bytes(b"image")
        self.before(workshop)
        store.kernel_path(image).write_bytes(b"kernel")
        store.initrd_path(image).write_bytes(b"initrd")


def provide(
    image_dir: Path,
    make: build.MakeImage,
    recipe: BuildRecipe = RECIPE,
    *,
    refresh: bool = False,
    on_progress: ProgressCallback = ignore_progress,
) -> Path:
    return build.build_image(recipe, image_dir, refresh=refresh, on_progress=on_progress, make=make)


def list_leftovers(image_dir: Path) -> list[str]:
    return sorted(path.name for path in image_dir.iterdir() if path.name != build.LOCK_NAME)


class TestCache:
    def test_an_image_is_put_in_place_with_what_belongs_to_it(self, image_dir: Path) -> None:
        image = provide(image_dir, FakeMaker())

        assert image == image_dir / "bookworm" / TODAY / "bookworm-server-cloudimg-amd64.img"
        assert {path.name: path.stat().st_mode & 0o777 for path in image.parent.iterdir()} == {
            "bookworm-server-cloudimg-amd64.img": 0o600,
            "bookworm-server-cloudimg-amd64.img.json": 0o600,
            "bookworm-server-cloudimg-amd64-vmlinuz-generic": 0o600,
            "bookworm-server-cloudimg-amd64-initrd-generic": 0o600,
        }
        assert store.find_record(image) == store.ImageRecord(
            release="bookworm",
            serial=TODAY,
            sha256="6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d",
            size=5,
            source=f"built:{RECIPE.key}",
            default_user="ubuntu",
        )
        assert list_leftovers(image_dir) == ["bookworm"]

    def test_the_same_recipe_is_built_once(self, image_dir: Path) -> None:
        make = FakeMaker()

        first, second = provide(image_dir, make), provide(image_dir, make)

        assert first == second
        assert make.calls == 1

    def test_a_cached_image_needs_no_tools_and_no_lock(
        self, image_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image = provide(image_dir, FakeMaker())
        monkeypatch.setenv("PATH", "/nonexistent")
        (image_dir / build.LOCK_NAME).unlink()

        assert build.build_image(RECIPE, image_dir) == image
        assert not (image_dir / build.LOCK_NAME).exists()

    def test_another_recipe_of_the_day_gets_a_serial_of_its_own(self, image_dir: Path) -> None:
        make = FakeMaker()
        other = BuildRecipe(packages=("htop",))

        images = [provide(image_dir, make), provide(image_dir, make, other)]

        assert [image.parent.name for image in images] == [TODAY, f"{TODAY}.1"]
        assert build.find_built_image(RECIPE, image_dir) == images[0]
        assert build.find_built_image(other, image_dir) == images[1]

    def test_refreshing_builds_a_newer_serial_and_keeps_the_older(self, image_dir: Path) -> None:
        make = FakeMaker()

        images = [provide(image_dir, make, refresh=True) for _ in range(12)]

        assert [image.parent.name for image in images] == make.serials
        assert [image.parent.name for image in images[1:]] == [f"{TODAY}.{n}" for n in range(1, 12)]
        assert all(image.exists() for image in images)
        assert provide(image_dir, make) == images[-1]

    def test_an_image_without_its_kernel_is_built_again(self, image_dir: Path) -> None:
        first = provide(image_dir, FakeMaker())
        store.kernel_path(first).unlink()

        assert provide(image_dir, FakeMaker()) != first

    @pytest.mark.parametrize("part", [Path, store.record_path, store.initrd_path])
    def test_an_image_that_others_could_change_is_built_again(
        self, part: Callable[[Path], Path], image_dir: Path
    ) -> None:
        first = provide(image_dir, FakeMaker())
        part(first).chmod(0o666)

        assert provide(image_dir, FakeMaker()) != first

    def test_deleting_an_image_leaves_nothing_of_it(self, image_dir: Path) -> None:
        image = provide(image_dir, FakeMaker())

        store.delete(image, image_dir)

        assert not image.parent.exists()
        assert build.find_built_image(RECIPE, image_dir) is None

    def test_an_image_dir_that_is_made_is_private(self, image_dir: Path) -> None:
        image_dir.rmdir()

        provide(image_dir, FakeMaker())

        assert image_dir.stat().st_mode & 0o777 == 0o700


class TestOneAtATime:
    def test_who_comes_second_waits_says_so_and_uses_what_was_built(self, image_dir: Path) -> None:
        started, go_on = threading.Event(), threading.Event()

        def block(_workshop: Workshop) -> None:
            started.set()
            assert go_on.wait(20)

        waits = threading.Event()
        heard: list[Progress] = []

        def hear(report: Progress) -> None:
            heard.append(report)
            waits.set()

        make, results = FakeMaker(block), list[Path]()
        first = threading.Thread(target=lambda: results.append(provide(image_dir, make)))
        first.start()
        assert started.wait(20)
        second = threading.Thread(
            target=lambda: results.append(provide(image_dir, make, on_progress=hear))
        )
        second.start()
        assert waits.wait(20)
        go_on.set()
        first.join(20)
        second.join(20)

        assert "waiting" in heard[0].activity
        assert make.calls == 1
        assert len(results) == 2
        assert results[0] == results[1]

    def test_nothing_is_seen_at_the_final_place_before_it_is_complete(
        self, image_dir: Path
    ) -> None:
        seen: list[Path] = []
        provide(image_dir, FakeMaker(lambda _workshop: seen.extend(image_dir.glob("bookworm*"))))

        assert seen == []


class TestFailure:
    @pytest.mark.parametrize(
        "error",
        [KeyboardInterrupt(), SystemExit(1), ValueError("x"), OSError(errno.ENOSPC, "full")],
    )
    def test_whatever_ends_a_build_nothing_is_left(
        self, image_dir: Path, error: BaseException
    ) -> None:
        def fail(_workshop: Workshop) -> None:
            raise error

        with pytest.raises(type(error)):
            provide(image_dir, FakeMaker(fail))

        assert list_leftovers(image_dir) == []
        assert provide(image_dir, FakeMaker()).exists()

    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (ToolError("making it (tool)", ["tool"], 1, "no room"), "making it.*no room"),
            (OSError(errno.ENOSPC, "No space left"), "making it.*No space left"),
        ],
    )
    def test_a_step_that_fails_is_named(self, error: Exception, told: str) -> None:
        steps = build.Steps(RECIPE, ignore_progress)

        with (
            pytest.raises(ImageBuildError, match=f"(?s)image of bookworm.*{told}"),
            steps.step("making it (tool)"),
        ):
            raise error

    def test_steps_are_counted_and_say_what_happens(self) -> None:
        heard: list[Progress] = []
        steps = build.Steps(RECIPE, heard.append)

        with steps.step("one"):
            steps.report("a")
        with steps.step("two"):
            pass

        assert [(each.activity, each.detail, each.done) for each in heard] == [
            ("one", "", 0),
            ("one", "a", 0),
            ("two", "", 1),
        ]
        assert {each.total for each in heard} == {build.Steps.TOTAL}

    def test_missing_programs_are_named_all_at_once_with_their_packages(
        self, image_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def find_nothing(_name: str, path: str | None = None) -> None:
            return None

        monkeypatch.setattr(shutil, "which", find_nothing)

        with pytest.raises(MissingPrerequisiteError, match=r"'mmdebstrap'.*'qemu-utils'"):
            build.build_image(RECIPE, image_dir)
        assert list_leftovers(image_dir) == []

    def test_a_full_disk_is_told_before_the_build(
        self, image_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def nearly_full(_path: Path) -> SimpleNamespace:
            return SimpleNamespace(free=2**30)

        monkeypatch.setattr(shutil, "disk_usage", nearly_full)

        with pytest.raises(ImageBuildError, match=r"needs 3 GiB.* has 1\.0 GiB left"):
            build.build_image(RECIPE, image_dir)
        assert list_leftovers(image_dir) == []


class TestCrash:
    def test_the_next_build_removes_what_a_killed_one_left(self, image_dir: Path) -> None:
        def die(_workshop: Workshop) -> None:
            os._exit(9)

        child = os.fork()
        if child == 0:
            provide(image_dir, FakeMaker(die))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert any(name.startswith(".build-") for name in list_leftovers(image_dir))

        provide(image_dir, FakeMaker())

        assert list_leftovers(image_dir) == ["bookworm"]

    def test_it_waits_for_programs_of_the_killed_build(self, image_dir: Path) -> None:
        stale = image_dir / ".build-stale"
        (stale / "handover").mkdir(parents=True)
        descriptor = os.open(stale / "handover", os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        builder = threading.Thread(target=provide, args=(image_dir, FakeMaker()))
        builder.start()

        time.sleep(0.2)
        there_while_held = stale.exists()
        os.close(descriptor)
        builder.join(20)

        assert there_while_held
        assert list_leftovers(image_dir) == ["bookworm"]

    @pytest.mark.parametrize("stale_file", ["image/x.img", "handover/disk.raw"])
    def test_half_a_workshop_is_removed_too(self, image_dir: Path, stale_file: str) -> None:
        stale = image_dir / ".build-stale" / stale_file
        stale.parent.mkdir(parents=True)
        stale.touch()

        provide(image_dir, FakeMaker())

        assert list_leftovers(image_dir) == ["bookworm"]


def test_hosts_that_allow_no_namespaces_are_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(step: str, argv: object, **_kwargs: object) -> None:
        raise ToolError(step, ["unshare"], 1, "unshare failed: Operation not permitted")

    monkeypatch.setattr(tools, "run_tool_streaming", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    with pytest.raises(MissingPrerequisiteError, match=r"(?s)'uidmap'.*/etc/subuid.*not permitted"):
        tools.check_confinement()
