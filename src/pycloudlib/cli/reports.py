"""`list`, `info`, `logs` and `diagnose`: the commands that report on machines."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pycloudlib._base.files import allocated_size
from pycloudlib.cli.common import (
    Session,
    age_in_words,
    command,
    json_option,
    print_facts,
    print_json,
    print_table,
    size_in_words,
    timestamp,
)
from pycloudlib.cli.machines import (
    MachineEntry,
    find_machine,
    list_machines,
    open_machine,
)
from pycloudlib.cli.names import MachineName
from pycloudlib.diagnosis import Audience
from pycloudlib.errors import InstanceNotFoundError
from pycloudlib.guest.access import ssh
from pycloudlib.guest.boot.console import find_last_lines
from pycloudlib.qemu.disk import diskimage, layers
from pycloudlib.qemu.host.resources import LOOPBACK
from pycloudlib.qemu.imagenames import short_name
from pycloudlib.qemu.state.rundir import LoginFacts
from pycloudlib.qemu.state.spec import MachineSpec

# Seconds between two reads of a log that is followed.
_FOLLOW_INTERVAL = 0.2
_CHUNK = 1 << 16
_COLUMNS = ("name", "state", "image", "cpus", "memory", "disk", "ssh", "console", "accel", "age")


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """A machine, as `list --json` and `info --json` print it.

    Attributes:
        name: Its name.
        cloud: The tag of its cloud; `cli` for the command line's own.
        id: Its id for `Qemu.get_instance`.
        state: `running`, `off`, `starting`, `paused` (only in `info`), `elsewhere` (it runs, or may
            run, in another container or on another host) or `broken`.
        place: Where `elsewhere` is; empty in any other state.
        problem: Why it is broken; empty in any other state.
        image: The path of the image that it was launched from; empty if unknown.
        cpus: Number of processors.
        memory_mib: Memory in MiB.
        disk_bytes: Size of its disk.
        disk_used_bytes: Space on the host of its disk, without the image.
        ssh_port: The local port of its SSH server.
        telnet_port: The local port of its serial console.
        accelerator: `kvm` or `tcg`.
        username: The login user.
        private_key: File of the private key to log in with; empty if unknown.
        public_key: File of the public key; empty if unknown.
        pid: The process id of its QEMU; null if it is off.
        created: When it was launched, as ISO 8601 in UTC.
        directory: The directory of all its files.
        disks: Its further disks, each with `serial`, `bytes`, `used_bytes`, `image` (the path of
            the image that it began with; empty without one), `write` (whether it is that image
            itself), and `device` (its path in the guest).
    """

    name: str
    cloud: str
    id: str
    state: str
    place: str
    problem: str
    image: str
    cpus: int
    memory_mib: int
    disk_bytes: int
    disk_used_bytes: int
    ssh_port: int
    telnet_port: int
    accelerator: str
    username: str
    private_key: str
    public_key: str
    pid: int | None
    created: str
    directory: str
    disks: list[dict[str, Any]]


# What the parts of a machine add, of one whose parts cannot be known.
_OF_PARTS = {
    "cpus": 0,
    "memory_mib": 0,
    "accelerator": "",
    "ssh_port": 0,
    "telnet_port": 0,
    "disks": [],
}


def collect(entry: MachineEntry, state: str = "") -> MachineFacts:
    """Return what is known of a machine from its directory.

    Args:
        entry: The machine.
        state: Its state by a better source.
    """
    spec, rundir = entry.spec, entry.rundir
    login = LoginFacts("", None, None)
    length, used = 0, 0
    # Each file may vanish or be damaged.
    with contextlib.suppress(InstanceNotFoundError):
        login = rundir.read_login()
    with contextlib.suppress(OSError, ValueError):
        used = allocated_size(rundir.disk)
        length = diskimage.read_layer(rundir.disk).virtual_size
    return MachineFacts(
        name=entry.name,
        cloud=entry.tag,
        id=entry.id,
        state=state or entry.state,
        place=entry.place,
        problem=entry.problem,
        image=_find_image(rundir.disk),
        disk_bytes=length,
        disk_used_bytes=used,
        username=login.username,
        private_key=login.private_key_path or "",
        public_key=login.public_key_path or "",
        pid=entry.pid,
        created=timestamp(created_at(entry)),
        directory=str(rundir.path),
        **_ask_parts(spec, rundir.disk),
    )


def _ask_parts(spec: MachineSpec | None, disk: Path) -> dict[str, Any]:
    """Return what the parts of a machine tell of themselves; lists of several parts are joined."""
    told: dict[str, Any] = dict(_OF_PARTS)
    for part in () if spec is None else spec.parts:
        for key, value in part.tell(disk).items():
            told[key] = [*told[key], *value] if isinstance(value, list) else value
    return told


def created_at(entry: MachineEntry) -> float:
    """Return when a machine was launched, in seconds since the epoch; 0 if unknown."""
    with contextlib.suppress(OSError):
        return entry.rundir.created
    with contextlib.suppress(OSError):
        return entry.rundir.path.stat().st_mtime
    return 0.0


def _find_image(disk_file: Path) -> str:
    """Return the image that a machine was launched from, below the layers of its own snapshots."""
    try:
        below = layers.chain(disk_file)[1:]
    except OSError:
        return ""
    return next((str(file) for file in below if file.parent.name != "layers"), "")


def image_in_words(image: str, image_dir: Path) -> str:
    """Return a short name of an image for people."""
    path = Path(image)
    if not image:
        return "?"
    if path.parent.parent.name == "warm":
        return "kept ready"
    name = short_name(path, image_dir)
    return path.name if name == image else name


def _row(facts: MachineFacts, name: str, image_dir: Path, created: float) -> tuple[str, ...]:
    """Return the row of a machine in `list`."""
    if facts.problem or not facts.cpus:
        return (name, facts.state, *[""] * 7, age_in_words(created))
    return (
        name,
        facts.state,
        image_in_words(facts.image, image_dir),
        str(facts.cpus),
        size_in_words(facts.memory_mib << 20),
        size_in_words(facts.disk_bytes),
        str(facts.ssh_port),
        str(facts.telnet_port),
        facts.accelerator,
        age_in_words(created),
    )


def _disk_in_words(disk: Mapping[str, Any]) -> str:
    used = f"{size_in_words(disk['bytes'])}, {size_in_words(disk['used_bytes'])} on this host"
    if not disk["image"]:
        return used
    return f"{used}, {'writes to' if disk['write'] else 'from'} {disk['image']}"


def _lines(facts: MachineFacts, image_dir: Path, created: float) -> list[tuple[str, object]]:
    """Return the names and values that `info` prints."""
    if facts.problem or not facts.cpus:
        known = [("Name", facts.name), ("State", facts.state), ("Problem", facts.problem)]
        return [*known, ("Directory", facts.directory)]
    endpoint = ssh.Endpoint(
        LOOPBACK,
        facts.ssh_port,
        facts.username,
        facts.private_key or None,
        facts.public_key or None,
    )
    size = f"{facts.cpus} CPUs, {size_in_words(facts.memory_mib << 20)} of memory"
    used = size_in_words(facts.disk_used_bytes)
    return [
        ("Name", facts.name),
        ("Cloud", facts.cloud),
        ("State", f"{facts.state}: {facts.place}" if facts.place else facts.state),
        ("Age", age_in_words(created)),
        ("Image", f"{image_in_words(facts.image, image_dir)} ({facts.image})"),
        ("Size", size.replace("1 CPUs", "1 CPU") if facts.cpus == 1 else size),
        ("Disk", f"{size_in_words(facts.disk_bytes)}, {used} on this host"),
        *((f"Disk {disk['serial']}", _disk_in_words(disk)) for disk in facts.disks),
        ("Accel", facts.accelerator),
        ("Process", facts.pid),
        ("SSH", ssh.login_command(endpoint, facts.name)),
        ("Console", f"telnet 127.0.0.1 {facts.telnet_port}"),
        ("Id", facts.id),
        ("Directory", facts.directory),
    ]


@command("list", short_help="List machines.")
@click.option("-a", "--all", "everywhere", is_flag=True, help="Include machines of other programs.")
@json_option
def list_(session: Session, everywhere: bool, as_json: bool) -> None:
    """List the machines of the command line.

    Machines of other programs are listed as CLOUD/NAME, by which all other commands find them.
    """
    cloud = session.cloud
    entries = list_machines(cloud.working_dir, everywhere=everywhere)
    facts = [collect(entry) for entry in entries]
    if as_json:
        print_json(facts)
    elif facts:
        rows = [
            _row(known, entry.full_name, cloud.image_dir, created_at(entry))
            for known, entry in zip(facts, entries, strict=True)
        ]
        print_table(_COLUMNS, rows)
    else:
        session.note("There are no machines; 'pycloudlib launch' starts one")


@command("info", short_help="Show all about machines.")
@click.argument("names", type=MachineName(), nargs=-1, required=True, metavar="NAME...")
@json_option
def info(session: Session, names: tuple[str, ...], as_json: bool) -> None:
    """Show all about machines: size, image, ports, how to log in, the directory of its files."""
    cloud = session.cloud
    entries = [find_machine(cloud.working_dir, name) for name in names]
    facts = [collect(entry, _query_state(session, entry)) for entry in entries]
    if as_json:
        print_json(facts)
        return
    for number, (known, entry) in enumerate(zip(facts, entries, strict=True)):
        if number:
            click.echo()
        print_facts(_lines(known, cloud.image_dir, created_at(entry)))


def _query_state(session: Session, entry: MachineEntry) -> str:
    """Return the state of a running machine, by QEMU; empty for any other."""
    if entry.state != "running":
        return ""
    machine = open_machine(session.cloud, entry.full_name).machine
    machine.refresh()
    return machine.state.value


@command("logs", short_help="Print the console log of a machine.")
@click.argument("name", type=MachineName())
@click.option("-f", "--follow", is_flag=True, help="Continue until the machine is off, or Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(0), help="Only the last lines.")
@click.option("--qemu", is_flag=True, help="What QEMU itself printed, instead.")
def logs(session: Session, name: str, follow: bool, lines: int | None, qemu: bool) -> None:
    """Print the output of a machine's serial console, of all its boots."""
    entry = find_machine(session.cloud.working_dir, name)
    file = entry.rundir.qemu_log if qemu else entry.rundir.console_log
    for chunk in read_log(file, lines, entry if follow else None):
        click.echo(chunk, nl=False)
        sys.stdout.flush()


def read_log(file: Path, lines: int | None, followed: MachineEntry | None) -> Iterator[bytes]:
    """Yield the content of a log, and what is added while the followed machine runs."""
    position = 0
    identity: tuple[int, int] | None = None
    while True:
        # Asked before reading, so that the machine's last output is not missed.
        is_running = followed is not None and followed.pid is not None
        try:
            with file.open("rb") as log:
                facts = os.fstat(log.fileno())
                if lines is not None:
                    position, lines = find_last_lines(log, lines), None
                elif identity != (facts.st_dev, facts.st_ino) or facts.st_size < position:
                    position = 0  # another file, or a truncated one
                identity = (facts.st_dev, facts.st_ino)
                log.seek(position)
                while chunk := log.read(_CHUNK):
                    position += len(chunk)
                    yield chunk
        except FileNotFoundError:
            pass  # nothing is written yet
        if not is_running:
            return
        time.sleep(_FOLLOW_INTERVAL)


@command("diagnose", short_help="Diagnose a machine.")
@click.argument("name", type=MachineName())
@json_option
def diagnose(session: Session, name: str, as_json: bool) -> None:
    """Report what a machine is doing, and what may be wrong with it.

    The sources are its console, QEMU, and the guest if it answers.
    """
    diagnosis = open_machine(session.cloud, name).diagnose()
    if as_json:
        cause = diagnosis.cause
        hint = cause.hint_for(Audience.COMMAND_LINE)
        print_json({**dataclasses.asdict(diagnosis), "cause": cause.name, "hint": hint})
    else:
        click.echo(f"{name}\n{diagnosis.tell(audience=Audience.COMMAND_LINE)}")
