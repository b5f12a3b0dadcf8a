"""The facts about a host on which `doctor` bases its checks."""

from __future__ import annotations

import contextlib
import grp
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pycloudlib
from pycloudlib import Qemu
from pycloudlib._base.documents import from_bytes
from pycloudlib._base.tools import PACKAGES, environment, find_tool
from pycloudlib._version import __version__
from pycloudlib.cli.machines import list_machines
from pycloudlib.config import parse_config
from pycloudlib.errors import CloudSetupError, MissingPrerequisiteError, PycloudlibException
from pycloudlib.guest.access import loginkey
from pycloudlib.images.download import Limits, open_client, shown_url
from pycloudlib.images.source import DEFAULT_MIRROR, ImageSource, Stream
from pycloudlib.qemu.host.accelerator import KVM_DEVICE, Accelerator, kvm_problem, try_accelerator
from pycloudlib.qemu.host.ownership import Ownership
from pycloudlib.qemu.host.resources import (
    PORTS,
    HostLimits,
    PortRegistry,
    can_listen,
)
from pycloudlib.qemu.state.settings import (
    COMMAND_LINE_TAG,
    DIRECTORIES,
    QemuSettings,
    find_obstacle,
)

# Replaces directories that have no place without a home directory.
_NOWHERE = Path(os.devnull)
_SERVER_LIMIT = 10.0
_VERSION_LIMIT = 10.0
_LAUNCHES, _DOWNLOADS, _CONNECTIONS = ("qemu-img",), ("gpgv",), ("ssh",)
# Clouds for which this package has placeholders, and other packages have code.
_OTHER_CLOUDS = ("azure", "ec2", "gce", "ibm", "ibm_classic", "lxd", "oci", "openstack", "vmware")
# Each module of a placeholder contains this.
_PLACEHOLDER = b"pycloudlib._otherclouds"


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The facts about a host.

    Attributes:
        configuration: Where the configuration comes from.
        configuration_problem: What is wrong with it; empty if nothing is.
        qemu_name: The name of QEMU in the configuration.
        qemu: Its path; empty if it was not found.
        qemu_version: Its version; empty if it prints none.
        accelerator: The configured one: `auto`, `kvm` or `tcg`.
        kvm_problem: Why KVM does not work; None if it does.
        tcg_problem: Why emulation does not work; None if it does.
        kvm_exists: Whether KVM's device exists.
        kvm_allowed: Whether this user may use it.
        in_kvm_group: Whether this user is in the group `kvm`.
        tools: For each use, its programs, each with the package to install, which is empty if the
            program is installed; and whether launches fail without them.
        free_space: For each directory, by its key in the configuration, its path and free bytes.
        unusable: For each directory that cannot be written to, by its key, why.
        key: The SSH key for machines; empty if unknown.
        key_problem: What is wrong with it; empty if nothing is.
        free_memory: Bytes of memory available to this program.
        memory: Bytes of memory that this program may use in all; 0 if unknown.
        processors: Processors that it may keep busy; 0 if unknown.
        free_ports: Ports that no machine leases and no program listens on.
        ports: Number of ports for machines.
        server: The image server; empty if it was not contacted.
        server_problem: Why it cannot be used; empty if it can.
        leftovers: The names of machines whose programs died.
        other_packages: The paths of other packages of this name.
        own_package: The version and the path of this package.
    """

    configuration: str = "none"
    configuration_problem: str = ""
    qemu_name: str = "qemu-system-x86_64"
    qemu: str = ""
    qemu_version: tuple[int, ...] = ()
    accelerator: str = "auto"
    kvm_problem: str | None = None
    tcg_problem: str | None = None
    kvm_exists: bool = True
    kvm_allowed: bool = True
    in_kvm_group: bool = True
    tools: Mapping[str, tuple[Mapping[str, str], bool]] = field(default_factory=dict)
    free_space: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    unusable: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    key_problem: str = ""
    free_memory: int = 0
    memory: int = 0
    processors: int = 0
    free_ports: int = 0
    ports: int = len(PORTS)
    server: str = ""
    server_problem: str = ""
    leftovers: tuple[str, ...] = ()
    other_packages: tuple[str, ...] = ()
    own_package: str = ""


def collect(*, ask_server: bool = True) -> HostFacts:
    """Collect the facts about this host, which takes some seconds.

    Args:
        ask_server: Whether to contact the image server.
    """
    settings, source, problem = _read_settings()
    key, key_problem = ("", "") if problem else _look_for_key()
    qemu = _find(settings.qemu_binary)
    no_qemu = "QEMU is missing"
    directories = {name: getattr(settings, name) for name in DIRECTORIES}
    if settings.state_dir == _NOWHERE:
        directories = {}
    wanted = ask_server and not settings.offline
    server = settings.image_mirror or DEFAULT_MIRROR
    limits = HostLimits.read()
    return HostFacts(
        configuration=source,
        configuration_problem=problem,
        qemu_name=settings.qemu_binary,
        qemu=qemu,
        qemu_version=_ask_version(qemu) if qemu else (),
        accelerator=settings.accelerator,
        kvm_problem=kvm_problem(Path(qemu), settings.cache_dir, retry=True) if qemu else no_qemu,
        tcg_problem=try_accelerator(Path(qemu), Accelerator.TCG).problem if qemu else no_qemu,
        kvm_exists=KVM_DEVICE.exists(),
        kvm_allowed=os.access(KVM_DEVICE, os.R_OK | os.W_OK),
        in_kvm_group=_in_group("kvm"),
        tools=_look_for_tools(),
        free_space={name: (str(path), _free(path)) for name, path in directories.items()},
        unusable={
            name: obstacle
            for name, path in directories.items()
            if (obstacle := find_obstacle(path)) is not None
        },
        key=key,
        key_problem=key_problem,
        free_memory=limits.available,
        memory=limits.memory,
        processors=limits.processors,
        free_ports=_count_free_ports(settings.state_dir),
        server=shown_url(server) if wanted else "",
        server_problem=_ask_server(settings, server) if wanted else "",
        leftovers=_find_leftovers(settings.working_dir),
        other_packages=find_other_packages(Path(pycloudlib.__file__).parent, sys.path),
        own_package=f"{__version__} in {Path(pycloudlib.__file__).parent}",
    )


def _read_settings() -> tuple[QemuSettings, str, str]:
    """Return the settings, their source, and what is wrong; defaults if something is."""
    source = "no configuration file"
    try:
        config = parse_config()
        source = config.source
        section = config.get("qemu", {})
        if not isinstance(section, dict):
            raise ValueError(f"{source}: [qemu] is not a section")
        return QemuSettings.parse(section, source), source, ""
    except (ValueError, CloudSetupError) as error:
        problem = str(error)
    try:
        return QemuSettings.parse({}, source), source, problem
    except CloudSetupError:
        return QemuSettings(_NOWHERE, _NOWHERE, _NOWHERE, _NOWHERE), source, problem


def _look_for_key() -> tuple[str, str]:
    """Return the SSH key for machines, and what is wrong with it."""
    try:
        cloud = Qemu(COMMAND_LINE_TAG, timestamp_suffix=False)
        key_pair = cloud.find_key_pair()
        if key_pair is None:
            return "none of yours; each program generates its own", ""
        loginkey.prove(key_pair, "your SSH key")
    except PycloudlibException as error:
        # Another check reports a missing QEMU.
        return "", "" if isinstance(error, MissingPrerequisiteError) else str(error)
    return str(key_pair.private_key_path), ""


def _find(program: str) -> str:
    try:
        return str(find_tool(program))
    except MissingPrerequisiteError:
        return ""


def _ask_version(qemu: str) -> tuple[int, ...]:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [qemu, "--version"],
            capture_output=True,
            check=True,
            timeout=_VERSION_LIMIT,
            env=environment(),
        )
        return parse_version(from_bytes(done.stdout))
    return ()


def parse_version(text: str) -> tuple[int, ...]:
    """Parse the output of `qemu-system-x86_64 --version`; empty if it has no version."""
    match = re.search(r"version ([0-9]+(?:\.[0-9]+)+)", text)
    return tuple(map(int, match[1].split("."))) if match else ()


def _in_group(name: str) -> bool:
    try:
        return grp.getgrnam(name).gr_gid in (*os.getgroups(), os.getegid())
    except KeyError:
        return False


def _look_for_tools() -> dict[str, tuple[dict[str, str], bool]]:
    known = (*_LAUNCHES, *_DOWNLOADS, *_CONNECTIONS)
    others = [name for name in PACKAGES if name not in known]
    builds = [name for name in others if name != "qemu-system-x86_64"]
    uses = (
        ("to launch", _LAUNCHES, True),
        ("to download images", _DOWNLOADS, False),
        ("to build images", builds, False),
        ("to keep connections for the next command", _CONNECTIONS, False),
    )
    return {
        use: ({name: "" if _find(name) else PACKAGES[name] for name in names}, needed)
        for use, names, needed in uses
    }


def _free(directory: Path) -> int:
    """Return the free bytes of the file system of a directory that need not exist."""
    # Not exists(), which fails if a directory above cannot be searched.
    existing = next(path for path in (directory, *directory.parents) if os.access(path, os.F_OK))
    facts = os.statvfs(existing)
    return facts.f_bavail * facts.f_frsize


def _count_free_ports(state_dir: Path) -> int:
    registry = PortRegistry(state_dir / "ports")
    try:
        return sum(not registry.leased(port) and can_listen(port) for port in registry.ports)
    except OSError:  # the check of the leases' directory reports it
        return sum(can_listen(port) for port in registry.ports)


def _ask_server(settings: QemuSettings, server: str) -> str:
    """Request the catalog of the image server; return what is wrong, empty if it answers."""
    import httpx  # noqa: PLC0415 - heavy

    try:
        source = ImageSource(server, settings.image_keyring)
        url = source.catalog_url(Stream.RELEASED, minimal=False)
        with open_client(source.login, Limits(timeout=_SERVER_LIMIT)) as client:
            client.http.head(url).raise_for_status()
    except (httpx.HTTPError, ValueError, OSError, PycloudlibException) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return ""


def _find_leftovers(working_dir: Path) -> tuple[str, ...]:
    try:
        found = list_machines(working_dir, everywhere=True)
    except OSError:  # the check of the directory reports it
        return ()
    owners = ((machine, Ownership.find(machine.rundir.path)) for machine in found)
    return tuple(machine.full_name for machine, owner in owners if owner and owner.is_orphaned)


def _is_anothers(directory: Path) -> bool:
    """Whether a cloud's directory has more than its placeholder."""
    modules = [*directory.glob("*.py")]
    real = any(_PLACEHOLDER not in module.read_bytes() for module in modules)
    return directory.is_dir() and (real or not modules)


def find_other_packages(own: Path, search_path: list[str]) -> tuple[str, ...]:
    """Find other packages of this name: elsewhere, or mixed into this one.

    Args:
        own: The directory of this package.
        search_path: Python's search path.
    """
    found = {str(own / name) for name in _OTHER_CLOUDS if _is_anothers(own / name)}
    for entry in search_path:
        other = Path(entry or ".", "pycloudlib").absolute()
        if (other / "__init__.py").is_file() and not other.samefile(own):
            found.add(str(other))
    return tuple(sorted(found))
