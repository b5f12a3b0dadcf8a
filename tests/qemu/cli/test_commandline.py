"""The command line with the real QEMU: each command a process of its own, machines live across."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.machines import alive, becomes

pytestmark = pytest.mark.qemu

LIMIT = 60


@dataclass
class Cli:
    """The command line, with directories of its own."""

    directory: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.directory / "pycloudlib.toml"
        # The leases of ports stay the user's: other tests run at the same time on this host.
        working_dir = self.directory / "machines"
        working_dir.mkdir()
        config.write_text(f'[qemu]\naccelerator = "tcg"\nworking_dir = "{working_dir}"\n')
        self.environment = {
            **os.environ,
            **{
                f"XDG_{name}_HOME": str(self.directory / name.lower())
                for name in ("CACHE", "CONFIG", "DATA")
            },
            "PYCLOUDLIB_CONFIG": str(config),
        }

    def popen(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pycloudlib", *map(str, arguments)]
        return subprocess.Popen(command, env=self.environment, **options)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        process = self.popen(
            *arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = process.communicate(timeout=LIMIT)
        return subprocess.CompletedProcess(
            arguments, process.returncode, out.decode(), err.decode()
        )

    def ok(self, *arguments: str | Path) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def info(self, name: str) -> dict[str, Any]:
        (told,) = json.loads(self.ok("info", name, "--json"))
        assert isinstance(told, dict)
        return told

    def launch(self, image: Path, *options: str) -> str:
        return self.ok("launch", image, "--memory", "64M", *options).strip()

    def names(self) -> list[str]:
        return [told["name"] for told in json.loads(self.ok("list", "--json"))]


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path)
    yield cli
    cli.ok("delete", "--all")
    cli.ok("prune")
    assert list((tmp_path / "machines").iterdir()) == []


def test_machine_lives_across_commands_until_it_is_deleted(cli: Cli, tiny_image: Path) -> None:
    assert cli.launch(tiny_image, "--name", "web", "--cpus", "2", "--disk", "3G") == "web"

    told = cli.info("web")
    assert told["state"] == "running"
    assert (told["cpus"], told["memory_mib"], told["disk_bytes"]) == (2, 64, 3 << 30)
    assert told["image"] == str(tiny_image)
    assert told["accelerator"] == "tcg"
    pid = told["pid"]
    assert alive(pid)
    assert "web   running  tiny.img  2     64 MiB  3 GiB" in cli.ok("list")

    assert cli.ok("delete", "web") == ""
    assert not alive(pid)
    assert cli.names() == []
    assert cli.run("info", "web").returncode == 3


def test_further_disks_are_shown(cli: Cli, tiny_image: Path) -> None:
    data = tiny_image.with_name("data.img")
    data.write_bytes(tiny_image.read_bytes())
    cli.launch(tiny_image, "--name", "web", "--add-disk", "2G", "--add-disk", f"{data},serial=data")

    empty, other = cli.info("web")["disks"]
    assert (empty["serial"], empty["bytes"], empty["image"]) == ("disk1", 2 << 30, "")
    assert (other["serial"], other["image"], other["write"]) == ("data", str(data), False)
    assert 0 < empty["used_bytes"] < 1 << 20
    told = cli.ok("info", "web")
    assert re.search(r"Disk disk1: +2 GiB, .* on this host\n", told)
    assert re.search(rf"Disk data: +.* on this host, from {data}\n", told)
    refused = cli.run("images", "delete", str(data))
    assert (refused.returncode != 0, "web" in refused.stderr) == (True, True)


def test_machine_is_switched_off_and_on(cli: Cli, tiny_image: Path) -> None:
    cli.launch(tiny_image, "--name", "web")
    before = cli.info("web")

    cli.ok("stop", "--force", "web")
    off = cli.info("web")
    assert (off["state"], off["pid"]) == ("off", None)
    cli.ok("stop", "--force", "web")  # twice is no error

    cli.ok("start", "web")
    after = cli.info("web")
    assert after["state"] == "running"
    assert after["pid"] != before["pid"]
    assert after["id"] == before["id"]
    cli.ok("start", "web")
    assert cli.info("web")["pid"] == after["pid"]


def test_machine_that_stands_still_is_told_as_such(cli: Cli, tiny_image: Path) -> None:
    cli.launch(tiny_image, "--name", "web", "--launch-arg=-S")

    # On a busy host, QEMU may not answer in time: then it is taken to run.
    assert becomes(lambda: cli.info("web")["state"] == "paused", LIMIT)
    assert becomes(lambda: "the machine is paused" in cli.ok("diagnose", "web"), LIMIT)


def test_name_in_use_says_by_what(cli: Cli, tiny_image: Path) -> None:
    cli.launch(tiny_image, "--name", "web")
    pid = cli.info("web")["pid"]

    done = cli.run("launch", tiny_image, "--name", "web")

    assert done.returncode == 1
    assert "'web' is in use by a machine of tiny.img (running, launched" in done.stderr
    assert cli.info("web")["pid"] == pid


def test_names_are_made_up_that_are_free(cli: Cli, tiny_image: Path) -> None:
    assert [cli.launch(tiny_image) for _ in range(2)] == ["vm-1", "vm-2"]
    cli.ok("delete", "vm-1")
    assert cli.launch(tiny_image) == "vm-1"


def test_two_launches_at_once_get_two_names(cli: Cli, tiny_image: Path) -> None:
    launches = [
        cli.popen("launch", tiny_image, "--memory", "64M", stdout=subprocess.PIPE) for _ in range(3)
    ]
    names = {process.communicate(timeout=LIMIT)[0].decode().strip() for process in launches}

    assert names == {"vm-1", "vm-2", "vm-3"}


def test_launch_as_json_tells_what_info_tells(cli: Cli, tiny_image: Path) -> None:
    told = json.loads(cli.ok("launch", tiny_image, "--memory", "64M", "--name", "web", "--json"))

    assert {**told, "disk_used_bytes": 0} == {**cli.info("web"), "disk_used_bytes": 0}


def test_logs_and_diagnosis_tell_what_the_machine_does(cli: Cli, tiny_image: Path) -> None:
    cli.launch(tiny_image, "--name", "web")

    assert becomes(lambda: "Booting from Hard Disk" in cli.ok("logs", "web"))
    assert cli.ok("logs", "web", "--qemu") == ""
    diagnosis = json.loads(cli.ok("diagnose", "web", "--json"))
    assert diagnosis["cause"] == "STILL_BOOTING"
    assert diagnosis["state"] == "running"


def test_log_is_followed_until_the_machine_is_off(cli: Cli, tiny_image: Path) -> None:
    cli.launch(tiny_image, "--name", "web")
    following = cli.popen("logs", "--follow", "web", stdout=subprocess.PIPE)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            following.wait(1)
        cli.ok("stop", "--force", "web")
        out, _ = following.communicate(timeout=LIMIT)
    finally:
        following.kill()
        following.wait()
    assert following.returncode == 0
    assert b"Booting from Hard Disk" in out


def test_ctrl_c_ends_a_followed_log(cli: Cli, tiny_image: Path) -> None:
    cli.launch(tiny_image, "--name", "web")
    following = cli.popen("logs", "--follow", "web", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert following.stdout is not None
    following.stdout.read(1)

    following.send_signal(signal.SIGINT)

    _, err = following.communicate(timeout=LIMIT)
    assert following.returncode == 130
    assert err.decode().split() == ["Interrupted"]
    assert cli.info("web")["state"] == "running"


def test_waiting_for_what_is_off_ends_at_once_with_its_code(cli: Cli, tiny_image: Path) -> None:
    cli.launch(tiny_image, "--name", "web")
    cli.ok("stop", "--force", "web")

    done = cli.run("wait", "web")

    assert done.returncode == 4
    assert "web is not running" in done.stderr
    assert cli.run("exec", "web", "true").returncode == 1


def test_ctrl_c_during_a_wait_leaves_the_machine(cli: Cli, tiny_image: Path) -> None:
    launch = cli.popen(
        *("launch", tiny_image, "--memory", "64M", "--name", "web", "--wait"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert becomes(lambda: cli.names() == ["web"] and cli.info("web")["state"] == "running")
    time.sleep(1)  # it waits by now

    launch.send_signal(signal.SIGINT)

    _, err = launch.communicate(timeout=LIMIT)
    assert launch.returncode == 130
    assert "web goes on booting: 'pycloudlib wait web'" in err.decode()
    assert cli.info("web")["state"] == "running"


def test_launch_that_waits_says_for_whom_and_starts_when_it_fits(
    cli: Cli, tiny_image: Path
) -> None:
    with Path(cli.environment["PYCLOUDLIB_CONFIG"]).open("a") as config:
        config.write("budget_processors = 1\nbudget_memory_mib = 1000\n")
    # No other test's budget.
    cli.environment["XDG_STATE_HOME"] = str(cli.directory / "state")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    arguments = ("launch", tiny_image, "--memory", "64M", "--wait-for-room")
    with cli.popen(*arguments, "--name", "first", **options) as first:
        try:
            assert becomes(lambda: cli.names() == ["first"])
            with cli.popen(*arguments, **options) as second:
                assert second.stderr is not None
                held = f"machines of processes {first.pid} have 1 of 1 processors, 64 of 1000 MiB"
                said = f"Waiting until the machine fits: {held}\n"
                assert second.stderr.readline().decode() == said
                assert cli.names() == ["first"]
                # What waits for the first one ends, and with it what it has reserved.
                first.send_signal(signal.SIGINT)
                first.communicate(timeout=LIMIT)
                assert becomes(lambda: len(cli.names()) == 2)
                assert re.fullmatch("vm-[0-9a-f]{8}", cli.names()[1]), "no number, which many have"
                second.send_signal(signal.SIGINT)
                second.communicate(timeout=LIMIT)
                assert second.returncode == 130
        finally:
            first.kill()


def test_console_is_left_by_its_key(cli: Cli, tiny_image: Path) -> None:
    cli.launch(tiny_image, "--name", "web")
    terminal, theirs = pty.openpty()
    console = cli.popen("console", "web", stdin=theirs, stdout=theirs, stderr=theirs)
    try:
        seen = b""
        while b"Ctrl-] leaves it" not in seen:
            seen += os.read(terminal, 1024)
        time.sleep(0.5)
        os.write(terminal, b"\x1d")
        assert console.wait(LIMIT) == 0
    finally:
        console.kill()
        console.wait()
        os.close(theirs)
        os.close(terminal)
    assert cli.info("web")["state"] == "running"


def test_machines_outlive_a_command_that_is_killed(cli: Cli, tiny_image: Path) -> None:
    launch = cli.popen(
        *("launch", tiny_image, "--memory", "64M", "--name", "web", "--wait"),
        stderr=subprocess.PIPE,
    )
    assert becomes(lambda: cli.names() == ["web"] and cli.info("web")["state"] == "running")
    launch.kill()
    launch.communicate()
    time.sleep(1)

    assert cli.info("web")["state"] == "running"
    # The key that it had made is its own; the machine has a copy.
    assert [Path(path).name[:6] for path in cli.ok("prune").split()] == [".keys-"]
    assert cli.info("web")["state"] == "running"


def test_machines_that_are_off_are_pruned_when_asked_to(cli: Cli, tiny_image: Path) -> None:
    for name in ("off", "on"):
        cli.launch(tiny_image, "--name", name)
    cli.ok("stop", "--force", "off")

    refused = cli.run("prune", "--stopped")
    assert refused.returncode == 1
    assert cli.names() == ["off", "on"]
    removed = json.loads(cli.ok("prune", "--stopped", "--yes", "--json"))
    assert [Path(path).name for path in removed] == ["off"]
    assert cli.names() == ["on"]


def test_images_are_listed(cli: Cli) -> None:
    assert json.loads(cli.ok("images", "list", "--json")) == []


def test_doctor_looks_at_this_host(cli: Cli) -> None:
    done = cli.run("doctor", "--offline", "--json")

    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["QEMU"]["outcome"] == "ok"
    assert checks["accelerator"]["detail"].startswith("emulation, as configured")
    assert checks["tools to launch"]["outcome"] == "ok"
    assert checks["image server"]["detail"] == "not asked"
    assert checks["leftover machines"]["outcome"] == "ok"
    assert checks["other pycloudlib"]["outcome"] == "ok"
