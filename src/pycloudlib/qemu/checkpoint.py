"""Saved machines: what is kept of a running machine so that others can go on from that moment.

Beside the image of its disk, `NAME.img`, stands a directory, `NAME.img.live`:

    memory       the guest's memory, sparse; machines map it copy-on-write
    state        the state of processors and devices, as QEMU's migration writes it
    seed.iso     the seed it was started with
    known_hosts  its SSH host keys
    id_*         the SSH key to log in with, if it is one that goes with the machine
    saved.json   what machine it is, and what is needed to go on with it

Memory and state hold the guest's secrets: only their owner can read them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.deadline import Deadline
from pycloudlib.errors import CloudError
from pycloudlib.files import replace_atomically, write_private
from pycloudlib.qemu import layers
from pycloudlib.qemu.accelerator import Accelerator
from pycloudlib.qemu.handover import hand_over
from pycloudlib.qemu.hotplug import list_plugged
from pycloudlib.qemu.machine import Machine, State, uninterrupted
from pycloudlib.qemu.memory import SHARED, Memory, find_shared_memory, keep
from pycloudlib.qemu.rundir import LoginFacts, RunDirectory
from pycloudlib.qemu.spec import MachineSpec

_log = logging.getLogger(__name__)

FORMAT = 1
"""Changes with whatever decides whether a saved machine can go on: the devices above all."""

_SUFFIX = ".live"
_FACTS = "saved.json"
_MERGE_LIMIT = 600.0


@dataclass(frozen=True, slots=True)
class SavedMachine:
    """A machine that others can go on from.

    Attributes:
        image: The image of its disk.
        spec: What machine it was.
        login: How to log in.
        host: What it has to run on; see `host_fingerprint`.
        helper: Whether the helper runs in it.
        saved_at: When it was saved, in seconds since the epoch.
        memory_mark: By which a change of its memory is noticed: size and time, since reading
            all of it would take longer than all else together.
        state_mark: The same of its state.
    """

    image: Path
    spec: MachineSpec
    login: LoginFacts
    host: str
    helper: bool
    saved_at: float
    memory_mark: str = ""
    state_mark: str = ""

    @property
    def directory(self) -> Path:
        """Where its files are."""
        return directory_of(self.image)

    @property
    def memory(self) -> Path:
        """Its memory."""
        return self.directory / "memory"

    @property
    def state(self) -> Path:
        """The state of its processors and devices."""
        return self.directory / "state"

    @property
    def seed(self) -> Path:
        """The seed it was started with."""
        return self.directory / "seed.iso"

    @property
    def known_hosts(self) -> Path:
        """Its SSH host keys."""
        return self.directory / "known_hosts"

    def find_obstacle(self, host: str) -> str | None:
        """Say why it cannot go on here; None when it can."""
        if host != self.host:
            return "it was saved by another QEMU, on another processor or with another accelerator"
        for file, mark in ((self.memory, self.memory_mark), (self.state, self.state_mark)):
            if not file.is_file():
                return f"{file} is missing"
            if _mark(file) != mark:
                return f"{file} was changed since"
        return None


def directory_of(image: Path) -> Path:
    """Name the directory of what is kept beside an image; it need not exist."""
    return image.with_name(f"{image.name}{_SUFFIX}")


def find(image: Path) -> SavedMachine | None:
    """Find the saved machine that belongs to an image; None for an image of a disk alone."""
    try:
        if not _is_own(directory_of(image)):
            return None
        facts = json.loads((directory_of(image) / _FACTS).read_text())
        if facts["format"] != FORMAT:
            _log.warning("%s was saved in another format; only its disk is used", image)
            return None
        return SavedMachine(
            image,
            MachineSpec.from_json(json.dumps(facts["spec"])),
            LoginFacts(**facts["login"]),
            facts["host"],
            facts["helper"],
            facts["saved_at"],
            facts["memory_mark"],
            facts["state_mark"],
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (KeyError, TypeError, ValueError) as error:
        _log.warning("%s is damaged (%s); only its disk is used", directory_of(image), error)
        return None


def _is_own(directory: Path) -> bool:
    """Say whether a directory is this user's alone: what it tells of is run as this user."""
    facts = directory.lstat()
    own = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid()
    if not own or facts.st_mode & 0o022:
        _log.warning("%s is not this user's alone; only the disk beside it is used", directory)
        return False
    return True


def save(machine: Machine, image_name: str, *, helper: bool) -> SavedMachine:
    """Save a running machine; it goes on.

    Args:
        machine: The machine.
        image_name: The name of the image's file, without its directory.
        helper: Whether the helper runs in it.

    Raises:
        MachineEndedError: It is off.
        CloudError: It could not be saved, and goes on; says why.
    """
    _check_can_be_saved(machine)
    _merge_layers(machine)
    memory = _open_shared_memory(machine)
    try:
        with contextlib.ExitStack() as undo:

            def freeze() -> tuple[Path, float | None]:
                store = layers.LayerStore(machine.rundir.path.parent)
                with (
                    store.freezing(machine.rundir.disk, image_name, in_use=True) as image,
                    _new_directory(directory_of(image)) as directory,
                ):
                    shared = Memory(file=Path(f"/proc/{os.getpid()}/fd/{memory}"))
                    pause = hand_over(machine, shared, kept_state=directory / "state")
                # From here on the machine's old disk is a layer that it is built on.
                undo.callback(image.unlink)
                undo.callback(shutil.rmtree, directory)
                return image, pause

            image, pause = uninterrupted(freeze)
            keep(memory, directory_of(image) / "memory", release=True)
            saved = _write(_describe(machine, image, helper), machine.rundir)
            undo.pop_all()
    finally:
        os.close(memory)
    stood = "" if pause is None else f"; the guest stood still for {pause * 1000:.0f} ms"
    _log.info("Saved %s as %s%s", machine.spec.name, image, stood)
    return saved


def host_fingerprint(binary: Path, accelerator: Accelerator) -> str:
    """Tell apart what a saved state depends on: the QEMU build, the accelerator, the processor."""
    build = binary.stat()
    facts = [str(binary.resolve()), build.st_size, build.st_mtime_ns, accelerator.value]
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "flags")):
            facts.append(line)
        if not line:  # the first processor stands for all
            break
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def copy(saved: SavedMachine, image: Path, linked_for: Path | None = None) -> None:
    """Put what is kept of a saved machine beside another image of the same disk.

    Args:
        saved: The machine.
        image: The image.
        linked_for: The name that the image is going to have, when the large file is shared with
            the first one's; None for a copy of it.
    """
    with _new_directory(directory_of(image)) as directory:
        for file in sorted(saved.directory.iterdir()):
            if file != saved.memory:
                shutil.copy2(file, directory / file.name)
            elif linked_for is not None:
                os.link(file, directory / file.name)
            else:
                _copy_memory(file, directory / file.name)
        final = directory_of(linked_for or image)
        relocated = dataclasses.replace(saved, image=image)
        _write_facts(relocated, _relocate(saved, directory, final))


def _copy_memory(source: Path, target: Path) -> None:
    descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        keep(descriptor, target)
    finally:
        os.close(descriptor)
    # By this a change is noticed.
    facts = source.stat()
    os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def delete(image: Path) -> None:
    """Remove what is kept beside an image; a directory of another kind stays."""
    directory = directory_of(image)
    if any((directory / name).exists() for name in (_FACTS, "state", "memory")):
        shutil.rmtree(directory)


def _check_can_be_saved(machine: Machine) -> None:
    machine.check_on()
    if machine.state is not State.RUNNING:
        raise CloudError(
            f"{machine.spec.name} is {machine.state.value}; it can be saved when it runs"
        )
    plugged = list_plugged(machine)
    if plugged:
        raise CloudError(
            f"{machine.spec.name} cannot be saved while network interfaces are plugged in "
            f"({', '.join(plugged)}): remove_network_interface() first"
        )


def _merge_layers(machine: Machine) -> None:
    """Take the layers below a running machine's disk into it when they have become many."""
    lowest = layers.too_deep(machine.rundir.disk)
    if lowest is None:
        return
    deadline = Deadline.after(_MERGE_LIMIT)
    qemu = machine.qemu()
    job = f"merge-{time.monotonic_ns()}"
    with qemu.session() as session:
        session.execute("block-stream", {"job-id": job, "device": "root", "base": str(lowest)})
        event = qemu.wait_for_event(
            lambda event: event.name == "BLOCK_JOB_COMPLETED" and event.data["device"] == job,
            deadline,
        )
    if "error" in event.data:
        raise CloudError(f"{machine.spec.name}: merging its layers failed: {event.data['error']}")


def _open_shared_memory(machine: Machine) -> int:
    """Open the machine's memory; it is moved into shared memory first if it is elsewhere."""
    if not _has_shared_memory(machine):
        pause = uninterrupted(lambda: hand_over(machine, SHARED))
        _log.info(
            "Moved %s into memory that can be saved; the guest stood still for %.0f ms",
            machine.spec.name,
            (pause or 0) * 1000,
        )
    pid = machine.pid
    file = None if pid is None else find_shared_memory(pid)
    if file is None:
        machine.check_on()
        raise CloudError(f"The memory of {machine.spec.name} cannot be found")
    return os.open(file, os.O_RDWR | os.O_CLOEXEC)


def _has_shared_memory(machine: Machine) -> bool:
    return any(
        device["id"] == "ram0" and device.get("share") for device in machine.execute("query-memdev")
    )


def _describe(machine: Machine, image: Path, helper: bool) -> SavedMachine:
    host = host_fingerprint(machine.binary, machine.spec.accelerator)
    return SavedMachine(image, machine.spec, machine.rundir.read_login(), host, helper, time.time())


def _write(saved: SavedMachine, rundir: RunDirectory) -> SavedMachine:
    """Put beside the memory what goes with it."""
    for source, target in (
        (rundir.seed, saved.seed),
        (rundir.known_hosts, saved.known_hosts),
    ):
        if source.exists():
            shutil.copy2(source, target)
    login = saved.login
    for key in (login.public_key_path, login.private_key_path):
        # A key that goes with the machine: the user's own stays where it is.
        if key is not None and Path(key).parent == rundir.path:
            shutil.copy2(key, saved.directory / Path(key).name)
    return _write_facts(saved, _relocate(saved, saved.directory, saved.directory))


def _relocate(saved: SavedMachine, directory: Path, final: Path) -> LoginFacts:
    """Name the keys that are kept in a directory by the name that it is going to have."""

    def there(path: str | None) -> str | None:
        kept = path is not None and (directory / Path(path).name).exists()
        return str(final / Path(path).name) if kept and path is not None else path

    login = saved.login
    return LoginFacts(login.username, there(login.public_key_path), there(login.private_key_path))


def _mark(file: Path) -> str:
    facts = file.stat()
    return f"{facts.st_size} {facts.st_mtime_ns}"


def _write_facts(saved: SavedMachine, login: LoginFacts) -> SavedMachine:
    marked = dataclasses.replace(
        saved,
        login=login,
        memory_mark=_mark(saved.memory),
        state_mark=_mark(saved.state),
    )
    facts = {
        "format": FORMAT,
        "spec": json.loads(saved.spec.to_json()),
        "login": dataclasses.asdict(login),
        "host": saved.host,
        "helper": saved.helper,
        "saved_at": saved.saved_at,
        "memory_mark": marked.memory_mark,
        "state_mark": marked.state_mark,
    }
    # Written last: with it, the saved machine is whole.
    with replace_atomically(saved.directory / _FACTS) as temporary:
        write_private(temporary, json.dumps(facts, indent=1) + "\n")
    return marked


@contextlib.contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    """Make a private directory; it is removed when the block fails."""
    path.mkdir(mode=0o700)
    try:
        yield path
    except BaseException:
        shutil.rmtree(path)
        raise
