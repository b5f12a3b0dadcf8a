"""Names that are no text: directories, a user's name, and the program's own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.failure.explaining import keep_artifacts
from pycloudlib.qemu.instance import QemuInstance
from tests.qemu.machines import SMALL, alive, becomes, hurry, run, runs, save, track

pytestmark = pytest.mark.qemu

LATIN_1 = "größe ".encode("latin-1") + b"\xd1,x"
"""A directory as a disk of old has them: no UTF-8, a space, and a comma for QEMU's options."""

NAMED = f"""#!{sys.executable}
import os, signal, sys, time
from pycloudlib import Qemu
with open("/proc/self/comm", "rb") as file:
    assert b"\\xd0\\n" in file.read(), "its name is not cut within a character"
cloud = Qemu("left", timestamp_suffix=False)
vm = cloud.launch(sys.argv[1], "{SMALL}", name="web")
print(vm.machine.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Give a directory whose name is no text."""
    directory = tmp_path / os.fsdecode(LATIN_1)
    directory.mkdir()
    return directory


@pytest.fixture
def user(raw: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a configuration file of a user all of whose directories are below that one."""
    for variable in ("HOME", *(f"XDG_{name}_HOME" for name in ("CACHE", "DATA", "STATE"))):
        monkeypatch.setenv(variable, str(raw / variable.lower()))
        (raw / variable.lower()).mkdir()
    for name in ("work", "images"):
        (raw / name).mkdir()
    for variable in ("USER", "LOGNAME"):
        monkeypatch.setenv(variable, os.fsdecode(b"ren\xe9"))
    monkeypatch.setenv("RAW", str(raw))
    config = raw / "pycloudlib.toml"
    config.write_text(
        '[qemu]\nworking_dir = "$RAW/work"\nimage_dir = "$RAW/images"\naccelerator = "tcg"\n'
    )
    monkeypatch.setenv("PYCLOUDLIB_CONFIG", str(config))
    return config


@pytest.fixture
def raw_cloud(user: Path) -> Iterator[Qemu]:
    cloud = Qemu("cli", timestamp_suffix=False, orphans="reap-after-crash")
    yield track(cloud)
    assert cloud.clean() == []


@pytest.fixture
def image(tiny_image: Path, raw: Path, user: Path) -> Path:
    return tiny_image.rename(raw / "images" / os.fsdecode(b"t\xefny.img"))


def cli(*arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "pycloudlib", *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        check=False,
        timeout=120,
    )


def test_machine_lives_in_a_directory_whose_name_is_no_text(raw_cloud: Qemu, image: Path) -> None:
    vm = hurry(raw_cloud.launch(image.name, SMALL, name="web"))

    again = Qemu("cli", timestamp_suffix=False).get_instance(vm.id)
    assert again.machine.pid == vm.machine.pid
    assert vm.console_log() is not None
    vm.machine.kill()
    vm.machine.power_on()
    assert runs(vm)
    kept = keep_artifacts(raw_cloud.working_dir / "kept", vm.machine, ValueError(vm.id))
    assert os.fsencode(vm.id) in (kept / "error.txt").read_bytes()
    odd = keep_artifacts(raw_cloud.working_dir / "kept", vm.machine, ValueError("\ud800"))
    assert b"ud800" in (odd / "error.txt").read_bytes()
    assert runs(vm), "QEMU was said what it cannot read"


def test_machine_there_is_saved_copied_and_taken_back(
    raw_cloud: Qemu, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = run(raw_cloud, image)

    saved = save(vm)
    copy = hurry(raw_cloud.launch(str(saved.image), name="copy"))
    assert runs(copy)
    vm.rollback(str(saved.image))
    assert runs(vm)
    monkeypatch.setattr(layers, "MAXIMUM_DEPTH", 1)
    save(vm)
    save(vm)  # takes its layers together first
    assert len(layers.chain(vm.instance_path)) < 4
    vm.machine.kill()
    image_id = raw_cloud.snapshot(vm, clean=False)
    assert raw_cloud.launch(image_id, SMALL, launch_args=["-S"]).machine.pid is not None


def test_first_boot_there_begins_at_cloud_init(raw_cloud: Qemu, reader_image: Path) -> None:
    vm: QemuInstance = raw_cloud.launch(
        str(reader_image), SMALL, fast_boot=True, user_data="as given\n"
    )

    assert vm.machine.rundir.first_boot.exists(), "it boots from its beginning"
    assert becomes(lambda: "as given" in vm.console_log())


OUTPUTS = (
    {"PYTHONIOENCODING": "utf-8:strict"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
)


def test_commands_tell_of_it_in_any_encoding(raw_cloud: Qemu, image: Path) -> None:
    vm = raw_cloud.launch(image.name, SMALL, launch_args=["-S"], name="web")

    for output in OUTPUTS:
        (told,) = json.loads(cli("info", "web", "--json", **output).stdout.decode())
        assert os.fsencode(told["directory"]) == os.fsencode(vm.instance_dir)
        assert os.fsencode(told["image"]) == os.fsencode(image)
        assert b"gr\\xf6\\xdfe \\xd1" in cli("info", "web", **output).stdout


@pytest.mark.parametrize(
    "command",
    [
        *(["list"], ["list", "--json"], ["images", "list"], ["images", "list", "--json"]),
        *(["diagnose", "web"], ["diagnose", "web", "--json"], ["logs", "web"]),
        *(["doctor", "--offline"], ["doctor", "--offline", "--json"]),
        *(["prune"], ["prune", "--json"]),
    ],
)
def test_each_command_works_there(raw_cloud: Qemu, image: Path, command: list[str]) -> None:
    raw_cloud.launch(image.name, SMALL, launch_args=["-S"], name="web")

    done = cli(*command, **OUTPUTS[0])

    assert (done.returncode, b"Error" in done.stderr) == (0, False), done.stderr
    done.stdout.decode()


def test_arguments_that_are_no_text_are_told_as_what_they_are(raw_cloud: Qemu, image: Path) -> None:
    name = os.fsdecode(b"n\xf6")
    for command in (["info", name], ["launch", name], ["delete", name]):
        done = cli(*command, PYTHONIOENCODING="utf-8:strict")
        assert done.returncode in (1, 2, 3), done.stderr
        assert b"defect" not in done.stderr
        assert b"n\\" in done.stderr, done.stderr


def test_program_may_have_a_name_that_is_cut_within_a_character(
    raw: Path, user: Path, image: Path
) -> None:
    script = raw / "тестирование.py"
    script.write_text(NAMED)
    script.chmod(0o755)
    with subprocess.Popen([str(script), str(image)], stdout=subprocess.PIPE) as program:
        try:
            assert program.stdout is not None
            pid = int(program.stdout.readline())
            # Others look at what is its own, and let it be.
            for command in (["prune"], ["doctor", "--offline"], ["info", "left/web"]):
                done = cli(*command)
                assert done.returncode == 0, done.stderr
            assert alive(pid)
        finally:
            program.kill()
    assert becomes(lambda: not alive(pid)), "its machine did not end with it"
    removed = json.loads(cli("prune", "--json").stdout)
    assert any(path.endswith("/web") for path in removed), removed


def test_disk_of_a_raw_name_is_written_down_as_it_is(raw_cloud: Qemu, image: Path) -> None:
    vm = raw_cloud.launch(image.name, SMALL, launch_args=["-S"])

    spec = vm.machine.rundir.read_spec()
    assert dataclasses.asdict(spec) == dataclasses.asdict(vm.machine.spec)
    assert os.fsencode(spec.disk) == os.fsencode(vm.instance_path)
