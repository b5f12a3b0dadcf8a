from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pycloudlib.images import store
from pycloudlib.images.store import kernel_path
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.launching import warmcache
from pycloudlib.qemu.launching.beginning import Host
from pycloudlib.qemu.launching.request import LaunchOptions
from pycloudlib.qemu.state import savedmachine


def build_key(image: Path, options: LaunchOptions, host: Host) -> str:
    parts = options.find_parts(image, image.parent / "work").all
    return warmcache.build_key(image, options, host, parts)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "some.img"
    file.write_bytes(bytes(1024))
    os.utime(file, (1000, 1000))
    kernel_path(file).write_bytes(b"the image's own kernel")
    return file


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    file = tmp_path / "vmlinuz-1"
    file.write_bytes(b"kernel")
    os.utime(file, (1000, 1000))
    return file


@pytest.fixture
def options(kernel: Path) -> LaunchOptions:
    return LaunchOptions(
        instance_type="c1m64",
        user_data="#!/bin/sh\n",
        meta_data={"a": 1},
        vendor_data="#cloud-config\n",
        network_config={"version": 2},
        kernel_cmdline="quiet",
        kernel_path=kernel,
        launch_args=["-device", "pvpanic"],
    )


def test_same_launch_has_the_same_key(image: Path, options: LaunchOptions, host: Host) -> None:
    again = dataclasses.replace(options)
    assert build_key(image, options, host) == build_key(image, again, host)


def test_key_is_a_name_for_a_file(image: Path, options: LaunchOptions, host: Host) -> None:
    assert build_key(image, options, host).isalnum()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("instance_type", "c2m64"),
        ("instance_type", "c1m65"),
        ("user_data", "#!/bin/sh\n\n"),
        ("user_data", None),
        ("user_data", ""),
        ("meta_data", {"a": 2}),
        ("vendor_data", "#cloud-config\n\n"),
        ("network_config", {"version": 1}),
        ("kernel_cmdline", ""),
        ("kernel_path", None),
        ("no_seed_iso", True),
        ("username", "somebody"),
        ("launch_args", []),
        ("launch_args", ["-device pvpanic"]),
        ("disk_size_gib", 20),
    ],
)
def test_each_option_changes_the_key(
    image: Path, options: LaunchOptions, host: Host, name: str, value: object
) -> None:
    changed = dataclasses.replace(options, **{name: value})  # type: ignore[arg-type]
    assert build_key(image, changed, host) != build_key(image, options, host)


def test_name_does_not_change_the_key(image: Path, options: LaunchOptions, host: Host) -> None:
    named = dataclasses.replace(options, name="web")
    assert build_key(image, named, host) == build_key(image, options, host)


def touch(file: Path) -> None:
    os.utime(file, (2000, 2000))


def grow(file: Path) -> None:
    facts = file.stat()
    file.write_bytes(file.read_bytes() + b"x")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, grow])
def test_changed_image_changes_the_key(
    image: Path, options: LaunchOptions, host: Host, change: Callable[[Path], None]
) -> None:
    before = build_key(image, options, host)
    change(image)
    assert build_key(image, options, host) != before


def test_image_elsewhere_changes_the_key(image: Path, options: LaunchOptions, host: Host) -> None:
    other = image.with_name("other.img")
    os.link(image, other)
    assert build_key(other, options, host) != build_key(image, options, host)


def test_changed_kernel_changes_the_key(
    image: Path, kernel: Path, options: LaunchOptions, host: Host
) -> None:
    before = build_key(image, options, host)
    touch(kernel)
    assert build_key(image, options, host) != before


def test_changed_initrd_changes_the_key(
    image: Path, kernel: Path, options: LaunchOptions, host: Host
) -> None:
    """It is found beside the kernel, and is booted with it."""
    initrd = kernel.with_name("initrd.img-1")
    initrd.write_bytes(b"initrd")
    before = build_key(image, options, host)
    touch(initrd)
    assert build_key(image, options, host) != before


def test_changed_kernel_of_the_images_own_changes_the_key(
    image: Path, options: LaunchOptions, host: Host
) -> None:
    own = store.kernel_path(image)
    own.write_bytes(b"kernel")
    without = dataclasses.replace(options, kernel_path=None)
    before = build_key(image, without, host)
    touch(own)
    assert build_key(image, without, host) != before


def test_another_qemu_changes_the_key(image: Path, options: LaunchOptions, host: Host) -> None:
    before = build_key(image, options, host)
    host.binary.write_text("another build")
    assert build_key(image, options, host) != before


def test_another_accelerator_changes_the_key(
    image: Path, options: LaunchOptions, host: Host
) -> None:
    other = dataclasses.replace(host, accelerator=Accelerator.KVM)
    assert build_key(image, options, other) != build_key(image, options, host)


def test_another_version_of_the_package_changes_the_key(
    image: Path, options: LaunchOptions, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build_key(image, options, host)
    monkeypatch.setattr(warmcache, "__version__", "99")
    assert build_key(image, options, host) != before


def test_another_format_changes_the_key(
    image: Path, options: LaunchOptions, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build_key(image, options, host)
    monkeypatch.setattr(savedmachine, "FORMAT", savedmachine.FORMAT + 1)
    assert build_key(image, options, host) != before
