"""What courses run on: the packages, each in its environment, the images, and the host."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.plan import Plan
from benchmarks.scenarios import BEFORE, BY_KEY, NAMES, NOW, ORIGINAL
from benchmarks.wrapper import write_wrapper
from pycloudlib import Qemu
from pycloudlib._base.tools import find_tool
from pycloudlib.key import KeyPair, generate_key_pair
from pycloudlib.qemu.host.accelerator import AUTO, Accelerator, Choice, choose_accelerator
from pycloudlib.qemu.parts.standard import accel_option
from pycloudlib.qemu.state.settings import DEFAULT_BINARY, find_cache_directory
from scripts.wheel_install import Installation, install

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENT = "pycloudlib==1!11.1.10"
"""The version of the original that is measured."""
KERNEL = "linux-image-amd64"
"""Debian's generic kernel: the original's machines have an IDE disk and an e1000 card."""
_IMAGELESS = ("package", "download")


@dataclass(frozen=True, slots=True)
class Environment:
    """Where one of the packages is installed, or a version of this one lies.

    Attributes:
        python: Its interpreter.
        description: What is there.
        source: The modules of a checkout.
    """

    python: Path
    description: str
    source: Path | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """What courses run on.

    Attributes:
        environments: The environment of each side.
        images: The image of each release.
        image_dir: Where images are kept.
        key: The SSH key of the machines, the same on all sides.
        choice: The accelerator that works here.
        qemu: The QEMU.
    """

    environments: dict[str, Environment]
    images: dict[str, str]
    image_dir: Path
    key: KeyPair
    choice: Choice
    qemu: Path

    def write_config(self, side: str, directory: Path) -> Path:
        """Write the configuration of a side; its machines are below the directory."""
        qemu, accelerator = self.qemu, self.choice.accelerator
        if side == ORIGINAL and accelerator is not Accelerator.KVM:
            qemu = directory / "qemu-system-x86_64"
            write_wrapper(qemu, str(self.qemu), accel_option(accelerator), accelerator.cpu_model)
        settings = {
            "image_dir": str(self.image_dir),
            "working_dir": str(directory / "machines"),
            "qemu_binary": str(qemu),
            "public_key_path": self.key.public_key_path,
            "private_key_path": self.key.private_key_path,
        }
        (directory / "machines").mkdir()
        if side in (BEFORE, NOW):
            # What one version keeps, another may not know.
            settings["state_dir"] = str(directory)
        return _write_settings(directory, settings)

    def list_facts(self, plan: Plan) -> dict[str, str]:
        """Describe the host, the images and the packages."""
        cpus = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in cpus if line.startswith("model name")]
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        qemu = subprocess.run([self.qemu, "--version"], capture_output=True, text=True, check=True)
        images = [
            f"{name}, {Path(it).stat().st_size >> 20} MiB" for name, it in self.images.items()
        ]
        return {
            "date": datetime.date.today().isoformat(),
            "host": f"{len(models)} x {models[0] if models else platform.machine()}, "
            f"{memory / 2**30:.0f} GiB, Linux {platform.release()}",
            "accelerator": f"{self.choice.accelerator.value} ({self.choice.reason})",
            "QEMU": qemu.stdout.partition("\n")[0],
            "Python": platform.python_version(),
            "images": "; ".join(images) or "none",
            "machines": plan.type,
            "machines at once": str(plan.machines),
            **{NAMES[side]: found.description for side, found in self.environments.items()},
        }


def prepare(plan: Plan, sides: Iterable[str], *, original: bool) -> Stage:
    """Install the packages and build the images, where that has not been done.

    Args:
        plan: What is to be measured.
        sides: What is needed for it.
        original: Whether the images are those on which the original is measured.

    Raises:
        ValueError: A wheel or checkout is needed and not named.
    """
    output = Path(plan.output).resolve()
    for name in ("images", "logs", "key"):
        (output / name).mkdir(parents=True, exist_ok=True)
    qemu = find_tool(DEFAULT_BINARY)
    choice = choose_accelerator(AUTO, qemu, find_cache_directory())
    environments = {side: _make_environment(side, plan, output) for side in sides}
    private = output / "key" / "id_ed25519"
    key = KeyPair(f"{private}.pub", str(private), "bench")
    if not private.exists():
        key = generate_key_pair(private.parent, "bench")
    courses = {BY_KEY[key].course for key in plan.wanted}
    needs_image = courses.difference(_IMAGELESS) and not (plan.bare or plan.port)
    releases = plan.release if needs_image else ()
    with tempfile.TemporaryDirectory(prefix="pycl-bench-") as name:
        config = _write_settings(
            Path(name), {"image_dir": str(output / "images")} if original else {}
        )
        with Qemu(tag="bench", config_file=config) as cloud:
            image_dir = cloud.image_dir
            options: dict[str, Any] = {"kernel": KERNEL} if original else {}
            images = {release: cloud.build_image(release, **options) for release in releases}
    return Stage(environments, images, image_dir, key, choice, qemu)


def _make_environment(side: str, plan: Plan, output: Path) -> Environment:
    """Install a package, or find a version of it."""
    if side == ORIGINAL:
        find_tool("genisoimage")
        # Once for each version of it and of Python.
        return _install(output / side, REQUIREMENT, REQUIREMENT, f"{REQUIREMENT} {sys.version}\n")
    if side == BEFORE:
        if not plan.before:
            raise ValueError("the other version is missing: name its checkout by --before")
        before = Path(plan.before).resolve()
        return Environment(Path(sys.executable), str(before), before / "src")
    if plan.wheel:
        wheel = Path(plan.wheel).resolve()
        # Anew each time, since it may have been built anew.
        description = f"{wheel.name}, {wheel.stat().st_size / 1000:.0f} kB"
        return _install(output / side, str(wheel), description, "")
    if "size" in plan.wanted:
        raise ValueError("the wheel is missing: name it, as `make wheel` made it")
    return Environment(Path(sys.executable), "this checkout", ROOT / "src")


def _install(directory: Path, requirement: str, description: str, state: str) -> Environment:
    """Install a package, unless the directory is in that state."""
    installed = directory / "installed"
    if not (state and installed.exists() and installed.read_text() == state):
        print(f"installing {description}", flush=True)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        install(requirement, directory)
        installed.write_text(state)
    installation = Installation.at(directory)
    count = len(list(installation.site_packages.glob("*.dist-info")))
    return Environment(installation.python, f"{description}, {count} packages")


def _write_settings(directory: Path, settings: Mapping[str, object]) -> Path:
    """Write a configuration into a directory."""
    # A JSON text is a TOML string.
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    config = directory / "pycloudlib.toml"
    config.write_text("\n".join(["[qemu]", *lines]) + "\n")
    return config
