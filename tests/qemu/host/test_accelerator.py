"""The accelerator is found by trying it, with the real binary."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pycloudlib.errors import CloudSetupError
from pycloudlib.qemu.cloud import Qemu
from pycloudlib.qemu.host import accelerator
from pycloudlib.qemu.host.accelerator import (
    Accelerator,
    Trial,
    choose_accelerator,
    find_features,
    try_accelerator,
)
from pycloudlib.qemu.instance import QemuInstance
from tests.qemu.conftest import UNSTARTED, CloudMaker
from tests.qemu.machines import becomes

pytestmark = pytest.mark.qemu


@pytest.fixture
def binary() -> Path:
    found = shutil.which("qemu-system-x86_64")
    assert found is not None
    return Path(found)


@pytest.fixture
def fake_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a device that opens in KVM's place: what QEMU makes of it is up to the fake QEMU."""
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accelerator, "KVM_DEVICE", device)
    return device


def fake_qemu(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "qemu-fake"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_payload_ends_well_in_emulation(binary: Path) -> None:
    assert try_accelerator(binary, Accelerator.TCG) == Trial(None)


def test_emulated_processor_lacks_what_it_is_slow_with(
    cloud_of_each_qemu: Qemu, tiny_image: Path
) -> None:
    """A copy has the processor that was saved, as one that was saved before the others lack it."""
    cloud = cloud_of_each_qemu
    slow = find_features(Path(cloud.qemu_binary)).slow_features
    assert {"erms", "fsrm"} <= set(slow)
    machine = cloud.launch(str(tiny_image))
    assert not {name for name in slow if has(machine, name)}
    copy = cloud.launch(cloud.snapshot(machine, memory=True))
    assert not {name for name in slow if has(copy, name)}

    machine.machine.kill()
    machine.machine.change_spec(dataclasses.replace(machine.machine.spec, without=()))
    machine.start(wait=False)
    assert has(machine, "erms")
    assert has(cloud.launch(cloud.snapshot(machine, memory=True)), "erms")


def has(instance: QemuInstance, feature: str) -> bool:
    """Whether a machine's first processor has a feature."""
    processors = instance.machine.execute("query-cpus-fast")
    path = {"path": processors[0]["qom-path"], "property": feature}
    return bool(instance.machine.execute("qom-get", path))


def test_the_boot_sector_is_one(binary: Path) -> None:
    assert len(accelerator.BOOT_SECTOR) == 512
    assert accelerator.BOOT_SECTOR.endswith(b"\x55\xaa")


def test_auto_ends_in_what_the_trial_says_and_tells_why(
    binary: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        choice = choose_accelerator("auto", binary, tmp_path)
    works = accelerator.kvm_problem(binary, tmp_path) is None
    assert choice.accelerator is (Accelerator.KVM if works else Accelerator.TCG)
    assert choice.reason in caplog.text


def test_the_outcome_of_a_trial_is_remembered(
    binary: Path, tmp_path: Path, fake_kvm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[Accelerator] = []

    def trial(_binary: Path, tried: Accelerator) -> Trial:
        trials.append(tried)
        return Trial("it is broken")

    monkeypatch.setattr(accelerator, "try_accelerator", trial)
    for _ in range(3):
        assert choose_accelerator("auto", binary, tmp_path).accelerator is Accelerator.TCG
    assert trials == [Accelerator.KVM]
    other = fake_qemu(tmp_path, "exit 0")
    choose_accelerator("auto", other, tmp_path)
    assert len(trials) == 2, "another QEMU is tried anew"
    choose_accelerator("auto", binary, tmp_path)
    assert len(trials) == 2, "the first QEMU's outcome is still known"


def test_asking_for_kvm_where_it_does_not_work_is_an_error_that_says_why(
    tmp_path: Path, fake_kvm: Path
) -> None:
    binary = fake_qemu(tmp_path, "echo 'kvm_buf_set_msrs: Assertion failed' >&2; kill -ABRT $$")
    with pytest.raises(CloudSetupError, match=r"signal 6.*kvm_buf_set_msrs.*'auto' or 'tcg'"):
        choose_accelerator("kvm", binary, tmp_path / "cache")


def test_asking_for_kvm_without_a_device_is_an_error_that_names_it(
    make_cloud: CloudMaker, tiny_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "KVM_DEVICE", tmp_path / "no-kvm")
    cloud = make_cloud(more='accelerator = "kvm"\n')
    with pytest.raises(CloudSetupError, match="no-kvm does not exist"):
        cloud.launch(str(tiny_image), launch_args=UNSTARTED)


def test_a_qemu_that_computes_too_long_is_refused(tmp_path: Path) -> None:
    """So it looks where guest instructions are interpreted one by one."""
    binary = fake_qemu(tmp_path, "while :; do :; done")
    trial = try_accelerator(binary, Accelerator.KVM, wall_limit=120.0)  # this host may be busy
    assert trial.problem is not None
    assert "processor time" in trial.problem
    assert trial.conclusive


def test_a_busy_host_makes_no_kvm_look_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time in which others have the processors does not count, but not without end."""
    asked = tmp_path / "asked"
    works = fake_qemu(tmp_path, f"until [ -e {asked} ]; do sleep 0.05; done; exit 85")

    def measure(_pid: int) -> float:
        asked.touch()
        return 60.0

    monkeypatch.setattr(accelerator, "measure_queueing", measure)
    assert try_accelerator(works, Accelerator.KVM, wall_limit=0.2) == Trial(None)
    monkeypatch.setattr(accelerator, "QUEUE_LIMIT_SECONDS", 0.5)
    hangs = fake_qemu(tmp_path, "exec sleep 60")
    assert not try_accelerator(hangs, Accelerator.KVM, wall_limit=0.2).conclusive


def test_waiting_for_a_processor_is_measured(tmp_path: Path) -> None:
    """Two that compute on one processor wait for each other; one that sleeps waits for nobody."""
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this kernel does not count it")
    processor = str(min(os.sched_getaffinity(0)))
    busy = ["taskset", "-c", processor, "sh", "-c", "while :; do :; done"]
    with contextlib.ExitStack() as stack:
        first, _, sleeper = started = [
            stack.enter_context(subprocess.Popen(command))
            for command in (busy, busy, ["sleep", "60"])
        ]
        for process in started:
            stack.callback(process.kill)
        assert becomes(lambda: accelerator.measure_queueing(first.pid) > 0.2)
        assert accelerator.measure_queueing(sleeper.pid) < accelerator.measure_queueing(first.pid)
    assert accelerator.measure_queueing(first.pid) == 0, "it is gone"


def test_a_qemu_that_hangs_is_refused_this_time(tmp_path: Path, fake_kvm: Path) -> None:
    binary, cache = fake_qemu(tmp_path, "exec sleep 60"), tmp_path / "cache"
    choice = choose_accelerator("auto", binary, cache)
    assert choice.accelerator is Accelerator.TCG
    assert "did not end" in choice.reason
    assert not cache.exists(), "the host may only have been busy: it is tried anew"


def test_a_binary_that_is_not_qemu_is_a_clear_error(
    make_cloud: CloudMaker, tiny_image: Path, tmp_path: Path
) -> None:
    binary = fake_qemu(tmp_path, "exit 0")
    cloud = make_cloud(more=f'accelerator = "tcg"\nqemu_binary = "{binary}"\n')
    with pytest.raises(CloudSetupError, match="qemu-fake"):
        cloud.launch(str(tiny_image), launch_args=UNSTARTED)


def test_qemu_that_is_asked_what_it_can_do_ends_though_its_program_is_killed(binary: Path) -> None:
    program = (
        "import os, signal, subprocess, sys\n"
        "from pathlib import Path\n"
        "from pycloudlib.qemu.host import accelerator as features\n"
        "def killed(process, *arguments, **options):\n"
        "    print(process.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "subprocess.Popen.communicate = killed\n"
        "features.find_features(Path(sys.argv[1]))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, binary], capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    process = Path("/proc", ended.stdout.strip())
    try:
        assert becomes(lambda: not is_alive(process))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process.name), signal.SIGKILL)


def is_alive(process: Path) -> bool:
    """Whether a process runs; one that nobody waits for may stay as a zombie."""
    try:
        return "State:\tZ" not in (process / "status").read_text(encoding="utf-8")
    except OSError:
        return False
