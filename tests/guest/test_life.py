"""The life of a machine: console, interfaces, other processes, power, snapshots, kernels.

The tests follow one another on few machines, because each boot takes a minute in emulation.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from examples.serial_login import PASSWORD, USER_DATA, Console, log_in
from pycloudlib import Qemu
from pycloudlib.errors import ImageInUseError, InstanceNotFoundError
from pycloudlib.images.source import Stream
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.vm.running import MachineEndedError, State
from tests.guest.conftest import Guest
from tests.guest.seeds import SHOW_RECORD, SIZE, Kind
from tests.qemu.machines import becomes
from tests.unit.imageserver import new_signing_key, running_image_server
from tests.unit.userdataforms import HOOK, mime, text

pytestmark = [pytest.mark.guest, pytest.mark.uses(Kind.FAST)]

ROOT_START = 227328 * 512  # bytes; as in Ubuntu's images

# A per-boot script of cloud-init's that keeps count.
COUNT_BOOTS = """\
cd /var/lib/cloud/scripts/per-boot
printf '#!/bin/sh\\ncat /proc/sys/kernel/random/boot_id >>/var/tmp/boots\\n' >count
chmod 755 count
"""

WHO = "hostname; cat /etc/machine-id /var/lib/cloud/data/instance-id /etc/ssh/ssh_host_*.pub"


@pytest.fixture(scope="module")
def cloud() -> Iterator[Qemu]:
    with Qemu(tag="life") as cloud:
        yield cloud


@pytest.fixture(scope="module")
def life(cloud: Qemu, saved_fast: str) -> QemuInstance:
    """Give the machine whose life is told."""
    user_data = mime(text(USER_DATA, "cloud-config"), text(HOOK, "cloud-boothook"))
    machine = cloud.launch(saved_fast, user_data=user_data, fresh_identity=True)
    machine.wait()
    assert machine.execute(COUNT_BOOTS, use_sudo=True).ok
    machine.execute("echo kept >/var/tmp/mark; sync")
    return machine


@pytest.fixture
def seedless(image: str, tmp_path: Path) -> Iterator[QemuInstance]:
    """Give a machine without a seed, of a downloaded image."""
    directory = tmp_path / "server"
    directory.mkdir()
    config = f'[qemu]\nimage_dir = "{directory}"\nimage_keyring = "{directory}/keyring.asc"\n'
    with new_signing_key() as key, running_image_server(key, directory) as server:
        server.add_image(Stream.DAILY, "noble", "20240821", built=Path(image))
        config += f'image_mirror = "{server.url}"\n'
        with Qemu(tag="life-fetched", config_file=io.StringIO(config)) as cloud:
            fetched = cloud.daily_image("noble")
            cmdline = "ds=nocloud;h=seedless;i=other"
            yield cloud.launch(fetched, SIZE, kernel_cmdline=cmdline, no_seed_iso=True)


def test_the_telnet_port_is_a_console_to_log_in_at(life: QemuInstance) -> None:
    with Console(int(life.telnet_port)) as console:
        log_in(console, "ubuntu", PASSWORD)
        console.send("echo $((6 * 7)) is the answer")
        assert "42 is the answer" in console.expect(r"[^(]42 is the answer")
        console.send("exit")
    # QEMU writes into the log what a client of the port may have read before.
    assert becomes(lambda: "42 is the answer" in life.console_log())


def test_an_interface_is_plugged_in_and_pulled_out(life: QemuInstance) -> None:
    address = life.add_network_interface()
    addresses = life.execute("ip -4 -oneline address show scope global")
    assert f" {address}/" in addresses
    assert len(addresses.splitlines()) == 2
    assert "via 10.0.2.2" in life.execute("ip route show default")
    life.remove_network_interface(address)
    assert len(life.execute("ip -4 -oneline address show scope global").splitlines()) == 1


def test_other_processes_find_it_and_work_with_it_at_the_same_time(
    life: QemuInstance,
) -> None:
    program = (
        "import sys\n"
        "from pycloudlib import Qemu\n"
        "vm = Qemu('other').get_instance(sys.argv[1])\n"
        "status = vm.machine.execute('query-status')['status']\n"
        "vm.execute('touch /var/tmp/' + sys.argv[2])\n"
        "print(vm.name, status, vm.execute('cat /var/tmp/mark'), vm.machine.pid)\n"
    )
    others = [
        subprocess.Popen(
            [sys.executable, "-c", program, life.id, f"process-{n}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    outputs = [other.communicate(timeout=300)[0].split() for other in others]
    assert outputs == [[life.name, "running", "kept", str(life.machine.pid)]] * 2
    assert life.execute("ls /var/tmp/process-0 /var/tmp/process-1").ok


def _work_in_fork(life: QemuInstance, answers: multiprocessing.SimpleQueue[str]) -> None:
    status = life.machine.execute("query-status")["status"]
    answers.put(f"{status} {life.execute('cat /var/tmp/mark')}")


def test_a_forked_worker_works_with_it(life: QemuInstance) -> None:
    life.execute("true")  # a connection is open, in which the child has no part
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    workers = [context.Process(target=_work_in_fork, args=(life, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [answers.get() for _ in workers] == ["running kept"] * 2
    assert life.execute("echo still here") == "still here"


def test_restart_is_another_boot_of_the_same_machine(life: QemuInstance) -> None:
    before = (life.get_boot_id(), life.id, life.machine.pid)
    who = life.execute(WHO, use_sudo=True)
    life.restart(wait=False)
    life.wait_for_restart(before[0])
    after = (life.get_boot_id(), life.id, life.machine.pid)
    assert after[0] != before[0]
    assert after[1:] == before[1:]
    assert life.execute("cat /var/tmp/mark") == "kept"
    assert life.console_log().count("Linux version") == 1
    assert who.splitlines()[0] == life.name
    assert life.execute(WHO, use_sudo=True) == who, "it stays who it became as a copy"
    assert life.execute(SHOW_RECORD) == "hook IID\nhook IID", "a boothook is run in each boot"


def test_a_guest_that_powers_itself_off_is_seen_as_stopped(life: QemuInstance) -> None:
    life.execute("systemctl poweroff", use_sudo=True)
    life.wait_for_stop()
    assert life.machine.state is State.OFF
    with pytest.raises(MachineEndedError, match="exit status 0"):
        life.restart()


def test_a_snapshot_has_what_was_on_the_disk_and_its_source_goes_on(
    cloud: Qemu,
    life: QemuInstance,
    image: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The source is off; it is started again, and is the same as ever.

    What an image holds is read off it on this host: a boot of it takes a minute.
    """
    before = life.id
    first = cloud.snapshot(life)
    assert life.machine.state is State.OFF
    assert "cannot be cleaned without a boot" in caplog.text
    boots = read_file(first, "/var/tmp/boots", tmp_path).split()
    assert cloud.image_serial(first) == cloud.image_serial(image)
    with (
        cloud.launch(first, SIZE, launch_args=["-S"]) as user,
        pytest.raises(ImageInUseError, match=user.name),
    ):
        cloud.delete_image(first)
    life.start()
    started = time.monotonic()
    life.start()
    assert time.monotonic() - started < 60, "starting a running machine is a short wait"
    assert life.id == before
    machine_id = life.execute("cat /etc/machine-id")
    assert life.execute("cat /var/tmp/mark; hostname") == f"kept\n{life.name}"
    assert life.execute("cat /var/tmp/boots").split() == [*boots, life.get_boot_id()]
    assert read_file(first, "/var/tmp/mark", tmp_path) == "kept"
    assert read_file(first, "/etc/machine-id", tmp_path) == machine_id

    life.execute("echo later >/var/tmp/mark; sync")
    for forget in (life.clean, lambda: life.execute("rm -rf /run/cloud-init", use_sudo=True)):
        forget()
        life.wait()
    with caplog.at_level(logging.INFO):
        second = cloud.snapshot(life, clean=True)
    assert "ACPI" in caplog.text
    assert life.delete() == []
    with pytest.raises(InstanceNotFoundError, match=life.name):
        life.start()
    with pytest.raises(InstanceNotFoundError, match=life.name):
        cloud.snapshot(life)
    assert read_file(second, "/var/tmp/mark", tmp_path) == "later"
    assert read_file(second, "/etc/machine-id", tmp_path) == ""
    assert read_file(second, "/var/lib/cloud/data/instance-id", tmp_path) == ""
    for made in (second, first):
        cloud.delete_image(made)
    assert not list(cloud.parent_dir.rglob("*.qcow2"))


@pytest.mark.thorough
@pytest.mark.parametrize("clean", [True, False])
def test_snapshots_of_snapshots_boot_as_machines_of_their_own(
    clean: bool, cloud: Qemu, saved_fast: str, tmp_path: Path
) -> None:
    vm = cloud.launch(saved_fast)
    vm.execute("echo kept >/var/tmp/mark; sync")
    if not clean:
        vm.shutdown()  # then it is saved as it is
    first = cloud.snapshot(vm)
    copy = cloud.launch(first, SIZE, user_data="#!/bin/sh\necho ran >/var/tmp/ran\n")
    copy.wait()
    assert copy.execute("cat /var/tmp/mark /var/tmp/ran; hostname") == f"kept\nran\n{copy.name}"
    result = json.loads(copy.execute("cat /var/lib/cloud/data/result.json"))
    assert result["v1"]["errors"] == []
    machine_id = copy.execute("cat /etc/machine-id")
    assert len(machine_id) == 32
    second = cloud.snapshot(copy, clean=False)
    assert copy.delete() == vm.delete() == []
    with pytest.raises(ImageInUseError, match=Path(second).stem):
        cloud.delete_image(first)
    assert read_file(second, "/etc/machine-id", tmp_path) == machine_id
    cloud.delete_image(second)
    cloud.delete_image(first)


def read_file(image: str, path: str, directory: Path) -> str:
    """Read a file of an image's root file system."""
    raw = directory / "disk.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    volume = f"{raw}?offset={ROOT_START}"
    read = ["/usr/sbin/debugfs", "-R", f"cat {path}", volume]
    return subprocess.run(read, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.thorough
def test_a_fetched_kernel_is_booted_directly_and_nocloud_read_from_its_command_line(
    seedless: QemuInstance,
) -> None:
    with Console(int(seedless.telnet_port)) as console:
        # A prompt that was there before is printed again.
        console.send("")
        console.expect("seedless login: ", seconds=600)
    seedless.shutdown(wait=False)
    seedless.wait_for_stop()
    assert seedless.machine.state is State.OFF


@pytest.mark.uses(Kind.GZIP)
def test_a_kernel_is_booted_directly_and_nocloud_read_from_its_command_line(
    guests: dict[Kind, Future[Guest]],
) -> None:
    seeded = guests[Kind.GZIP].result().machine
    words = seeded.execute("cat /proc/cmdline").split()
    assert "ds=nocloud;h=myhost;i=myid" in words
    assert "root=LABEL=cloudimg-rootfs" in words
    assert "console=ttyS0" in words
    assert seeded.execute("hostname") == "myhost"
    assert seeded.execute("cat /var/lib/cloud/data/instance-id") == "myid"
    assert "GRUB" not in seeded.console_log()
