"""First boots that begin at cloud-init: like any other first boot, and each machine its own."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime

import pytest
import yaml

from pycloudlib import Qemu
from pycloudlib.key import generate_ed25519
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching import startingpoint
from tests.guest.conftest import Guest, get_image, launch
from tests.guest.identity import KEYS, clock_error, who_is
from tests.guest.portrait import compare, paint
from tests.guest.repository import REPOSITORY
from tests.guest.seeds import COMPARED, EVERY_TIME, NETWORK_NAME, SEEDS, SIZE, Kind

pytestmark = pytest.mark.guest

CLOCK_LIMIT = 0.1
FAST = tuple(kind for kind in Kind if SEEDS[kind].fast_boot)
FAST_EVERY_TIME = tuple(kind for kind in FAST if kind in EVERY_TIME)


def begins_at_cloud_init(vm: QemuInstance) -> bool:
    return any(file.parent.parent.name == "warm" for file in layers.chain(vm.instance_path))


@pytest.mark.uses(*COMPARED)
def test_guest_is_like_one_that_booted_from_its_beginning(
    guests: dict[Kind, Future[Guest]],
) -> None:
    ordinary, fast = (guests[kind].result() for kind in COMPARED)
    assert not begins_at_cloud_init(ordinary.machine)
    assert begins_at_cloud_init(fast.machine)
    assert ordinary.portrait is not None
    assert fast.portrait is not None
    assert "\n".join(compare(ordinary.portrait, fast.portrait)) == ""
    assert ordinary.warnings == fast.warnings == []


@pytest.mark.uses(*FAST_EVERY_TIME)
def test_machines_of_one_starting_point_are_each_their_own_and_right_in_time(
    guests: dict[Kind, Future[Guest]],
) -> None:
    machines = [guests[kind].result().machine for kind in FAST_EVERY_TIME]
    assert all(begins_at_cloud_init(vm) for vm in machines)
    with ThreadPoolExecutor(2) as threads:
        errors = list(threads.map(clock_error, machines))
        told = list(threads.map(who_is, machines))
    assert max(errors) < CLOCK_LIMIT
    for one, other in itertools.combinations(told, 2):
        # One of them has a host key of one type, by its user-data.
        assert [name for name in one if one[name] and one[name] == other[name]] == []


@pytest.mark.uses(Kind.SCRIPT)
def test_network_config_is_honoured(guests: dict[Kind, Future[Guest]]) -> None:
    vm = guests[Kind.SCRIPT].result().machine
    assert f"{NETWORK_NAME}:" in vm.execute("cat /etc/netplan/*.yaml", use_sudo=True)
    assert "via 10.0.2.2" in vm.execute("ip route show default")


@pytest.mark.uses(Kind.FAST)
def test_log_of_cloud_init_has_the_right_times_from_its_first_line_on(
    guests: dict[Kind, Future[Guest]],
) -> None:
    vm = guests[Kind.FAST].result().machine
    logged, now, uptime = vm.execute(
        "head -n 1 /var/log/cloud-init.log; date +%s; cat /proc/uptime", use_sudo=True
    ).splitlines()
    found = re.match(r"(\S+ \S+),\d+ - .* Up ([\d.]+) seconds", logged)
    assert found is not None, logged
    written = datetime.strptime(f"{found[1]} +0000", "%Y-%m-%d %H:%M:%S %z").timestamp()
    # The guest has not counted the time for which it was stopped.
    since = float(uptime.split()[0]) - float(found[2])
    assert written == pytest.approx(float(now) - since, abs=30)


@pytest.mark.uses(Kind.FAST)
def test_console_begins_with_the_firmware_and_the_journal_with_the_kernel(
    guests: dict[Kind, Future[Guest]],
) -> None:
    vm = guests[Kind.FAST].result().machine
    console = vm.console_log()
    assert "SeaBIOS" in console
    assert console.count("finished at") == 1
    journal = vm.execute("journalctl --boot --output=cat | head -n 3", use_sudo=True)
    assert "Linux version" in journal
    machine_id = vm.execute("cat /etc/machine-id")
    latest = vm.execute("journalctl --boot --lines=1 --output=export", use_sudo=True)
    assert f"_MACHINE_ID={machine_id}" in latest.splitlines()
    assert vm.execute("ls /var/log/journal").split() == [machine_id]


@pytest.fixture
def cloud() -> Iterator[Qemu]:
    with Qemu(tag="firstboot") as cloud:
        yield cloud


@pytest.mark.thorough
@pytest.mark.parametrize("release", ["bookworm", "trixie"])
@pytest.mark.parametrize(
    "compared", [kind for kind in FAST if kind is not Kind.FAST], ids=lambda kind: kind.value
)
def test_guest_of_every_kind_is_like_one_that_booted_from_its_beginning(
    compared: Kind, release: str, cloud: Qemu
) -> None:
    seed = SEEDS[compared]
    image = get_image(release)

    def boot(fast_boot: bool) -> QemuInstance:
        vm = launch(cloud, image, dataclasses.replace(seed, fast_boot=fast_boot))
        vm.wait()
        return vm

    with ThreadPoolExecutor(2) as threads:
        ordinary, fast = threads.map(boot, (False, True))
        portraits = list(threads.map(paint, (ordinary, fast)))
    assert [begins_at_cloud_init(vm) for vm in (ordinary, fast)] == [False, True]
    command, expected = seed.proof
    assert [vm.execute(command) for vm in (ordinary, fast)] == [expected, expected]
    assert "\n".join(compare(*portraits)) == ""


@pytest.mark.thorough
@pytest.mark.parametrize("release", ["bookworm", "trixie"])
def test_restart_is_a_later_boot_of_the_same_machine(release: str, cloud: Qemu) -> None:
    vm = cloud.launch(get_image(release), SIZE, user_data=TELL_BOOTS, fast_boot=True)
    vm.wait()
    before = who_is(vm)
    boot_id = vm.get_boot_id()
    vm.restart()
    after = who_is(vm)
    same = [name for name in before if before[name] == after[name]]
    assert same == ["host name", "machine-id", "instance-id", *KEYS]
    assert vm.get_boot_id() != boot_id
    assert vm.execute("cat /var/tmp/boots").split() == ["first", "boot"]
    assert vm.execute("ls /var/log/journal").split() == [after["machine-id"]]
    assert vm.execute("systemctl --failed --no-legend") == ""
    assert clock_error(vm) < 2, "by the real-time clock alone, as after any boot"


# Once for the instance, and at each boot.
TELL_BOOTS = """#cloud-config
bootcmd: [echo boot >>/var/tmp/boots]
write_files: [{path: /var/tmp/boots, content: "first\\n"}]
"""


@pytest.mark.thorough
@pytest.mark.parametrize("release", ["bookworm", "trixie"])
def test_packages_of_user_data_are_installed(release: str, cloud: Qemu) -> None:
    config = {
        "bootcmd": [["sh", "-c", REPOSITORY]],
        "apt": {"preserve_sources_list": True},
        "package_update": True,
        "packages": ["greeting"],
        "runcmd": ["greeting >/var/tmp/greeting"],
    }
    user_data = "#cloud-config\n" + yaml.safe_dump(config)
    vm = cloud.launch(get_image(release), SIZE, user_data=user_data, fast_boot=True)
    vm.wait()
    assert begins_at_cloud_init(vm)
    result = json.loads(vm.execute("cat /run/cloud-init/result.json"))
    assert result["v1"]["errors"] == []
    assert vm.execute("greeting") == "greetings"


AGAIN = ["test -e /var/tmp/again || { touch /var/tmp/again; reboot -f; sleep 60; }"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("bootcmd", "told"),
    [(["true"], "its modules came before"), (AGAIN, "started again before")],
    ids=["late", "never"],
)
def test_machine_that_was_not_put_right_in_time_is_told_of(
    bootcmd: list[str],
    told: str,
    cloud: Qemu,
    image: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By user-data that disables what puts it right, which is refused otherwise."""
    monkeypatch.setattr(startingpoint, "find_obstacle", lambda _request: None)
    private, public = generate_ed25519("its own")
    config = {
        "vendor_data": {"enabled": False},
        # Else it makes some itself, and the console may lose their announcement.
        "ssh_keys": {"ed25519_private": private, "ed25519_public": public},
        "bootcmd": bootcmd,
    }
    user_data = "#cloud-config\n" + yaml.safe_dump(config)
    vm = cloud.launch(image, SIZE, user_data=user_data, fast_boot=True)
    vm.wait()
    assert begins_at_cloud_init(vm)
    assert told in caplog.text
    assert clock_error(vm) < (2 if bootcmd is AGAIN else CLOCK_LIMIT)


# Tells who it is as early as a module of cloud-init can, and ends.
TELL = r"""#cloud-config
bootcmd:
  - |
    exec >/dev/ttyS0
    echo
    echo "WHO machine-id $(cat /etc/machine-id)"
    echo "WHO random $(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' ')"
    echo "WHO uuid $(cat /proc/sys/kernel/random/uuid)"
    echo "WHO instance $(cat /var/lib/cloud/data/instance-id)"
    echo "WHO clock $(date +%s.%N)"
    echo "WHO end"
    poweroff -f
"""


@pytest.mark.thorough
def test_twenty_machines_differ_before_their_modules_run(cloud: Qemu, image: str) -> None:
    def tell(_number: int) -> dict[str, str]:
        vm = cloud.launch(image, SIZE, user_data=TELL, fast_boot=True)
        while "WHO end" not in (log := vm.console_log()):
            came = time.time()
            time.sleep(0.02)
        said = dict(
            line.split()[1:]
            for line in log.splitlines()
            if line.startswith("WHO ") and len(line.split()) == 3
        )
        said["host key"] = vm.machine.rundir.known_hosts.read_text()
        said["late"] = str(came + 0.02 - float(said.pop("clock")))
        vm.delete()
        return said

    with ThreadPoolExecutor(2) as threads:
        told = list(threads.map(tell, range(20)))
    late = [float(said.pop("late")) for said in told]
    print(f"clocks: {min(late):.3f} to {max(late):.3f} s behind", file=sys.stderr)
    # The console is looked at every so often, and the guest prints in its own time.
    assert all(-CLOCK_LIMIT < seconds < 3 * CLOCK_LIMIT for seconds in late)
    for one, other in itertools.combinations(told, 2):
        assert [name for name in one if one[name] == other[name]] == []
