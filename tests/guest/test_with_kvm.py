"""A guest in machines with KVM, whose KVM is emulation: every way that only they take."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator

import pytest

from pycloudlib import Qemu
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.instance import QemuInstance
from tests.guest.identity import clock_error, who_is
from tests.guest.seeds import SIZE
from tests.pretendedkvm import kind_of_memory, pretended_kvm

pytestmark = pytest.mark.guest

_log = logging.getLogger(__name__)

# Seconds by which a clock may be wrong.
SLOW = 3.0
KEPT = "memory-backend-file, private"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory, image: str) -> Iterator[Qemu]:
    """Give a cloud for which KVM works; what it keeps ready, no other has."""
    directory = tmp_path_factory.mktemp("kvm")
    working_dir = directory / "work"
    working_dir.mkdir()
    with pretended_kvm(directory) as settings:
        text = f'[qemu]\n{settings}working_dir = "{working_dir}"\n'
        with Qemu(tag="kvm", config_file=io.StringIO(text)) as cloud:
            yield cloud
            cloud.clean()
            cloud.prune_warm_images()
    assert list(working_dir.iterdir()) == []


@pytest.fixture(scope="module")
def booted(cloud: Qemu, image: str) -> QemuInstance:
    """Give a machine whose first boot began at cloud-init."""
    begun = time.monotonic()
    vm = cloud.launch(image, SIZE, user_data="#!/bin/sh\ntouch /var/tmp/ran\n", fast_boot=True)
    _log.info("A starting point was made in %.1f s", time.monotonic() - begun)
    vm.wait()
    _log.info("The machine was ready after %.1f s", time.monotonic() - begun)
    return vm


def mark(vm: QemuInstance, text: str) -> None:
    """Leave a mark in memory, and on the disk."""
    assert vm.execute(f"echo {text} | tee /dev/shm/mark >/var/tmp/mark; sync").ok


def marks(vm: QemuInstance) -> list[str]:
    """Return the marks in memory and on the disk, as far as they are there."""
    return vm.execute("cat /dev/shm/mark /var/tmp/mark 2>/dev/null").split()


def check_saves(cloud: Qemu, vm: QemuInstance) -> None:
    """Save a machine, copy it, and roll it back."""
    mark(vm, "before")
    pid, boot_id = vm.machine.pid, vm.get_boot_id()
    begun = time.monotonic()
    saved = cloud.snapshot(vm, memory=True)
    assert vm.machine.pid == pid
    mark(vm, "after")
    copy = cloud.launch(saved)
    fork = vm.fork(1, fresh_identity=True)[0]
    assert marks(copy) == ["before"] * 2
    assert marks(fork) == ["after"] * 2
    for each in (copy, fork):
        assert each.machine.spec.accelerator is Accelerator.KVM
        assert kind_of_memory(each) == KEPT
        assert each.get_boot_id() == boot_id
        assert clock_error(each) < SLOW
    told = [who_is(each) for each in (vm, copy, fork)]
    assert len({each["machine-id"] for each in told}) == 2
    assert len({each["random UUID"] for each in told}) == 3
    vm.rollback(saved)
    assert marks(vm) == ["before"] * 2
    assert kind_of_memory(vm) == KEPT
    assert clock_error(vm) < SLOW
    _log.info("A save, two copies and a rollback: %.1f s", time.monotonic() - begun)
    for each in (copy, fork):
        assert each.delete() == []


def test_first_boot_begins_at_cloud_init_and_is_saved(cloud: Qemu, booted: QemuInstance) -> None:
    assert booted.machine.spec.accelerator is Accelerator.KVM
    assert kind_of_memory(booted) == KEPT
    assert booted.execute("ls /var/tmp/ran").ok
    assert clock_error(booted) < SLOW
    check_saves(cloud, booted)


@pytest.mark.thorough
def test_machine_that_was_switched_on_is_saved(cloud: Qemu, booted: QemuInstance) -> None:
    booted.shutdown()
    begun = time.monotonic()
    booted.start()
    _log.info("It booted in %.1f s", time.monotonic() - begun)
    assert kind_of_memory(booted) == "memory-backend-ram, private"
    check_saves(cloud, booted)
