"""`list`, `info`, `logs` and `diagnose`: what there is, and what is going on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from pycloudlib.cli.machines import Found, MachineName, find_machine, list_machines, open_machine
from pycloudlib.cli.output import (
    age_in_words,
    print_facts,
    print_json,
    print_table,
    size_in_words,
    timestamp,
)
from pycloudlib.cli.session import Session, command, json_option
from pycloudlib.diagnosis import Audience
from pycloudlib.errors import InstanceNotFoundError
from pycloudlib.guest.access import ssh
from pycloudlib.guest.boot.console import find_last_lines
from pycloudlib.qemu.disk import diskimage, layers
from pycloudlib.qemu.host.resources import LOOPBACK
from pycloudlib.qemu.imagenames import short_name
from pycloudlib.qemu.state.rundir import LoginFacts

# Seconds between two looks at a log that is followed.
_LOOK = 0.2
_CHUNK = 1 << 16


@command("list", short_help="List machines.")
@click.option("-a", "--all", "everywhere", is_flag=True, help="Those of other programs, too.")
@json_option
def list_(session: Session, everywhere: bool, as_json: bool) -> None:
    """List the machines of the command line.

    Those of other programs have the name of their cloud before their own, and are called so in all
    other commands.
    """
    cloud = session.cloud
    found = list_machines(cloud.working_dir, everywhere=everywhere)
    seen = [collect(machine) for machine in found]
    if as_json:
        print_json(seen)
    elif seen:
        rows = [
            row(told, machine.full_name, cloud.image_dir, created_at(machine))
            for told, machine in zip(seen, found, strict=True)
        ]
        print_table(COLUMNS, rows)
    else:
        session.note("There are no machines; 'pycloudlib launch' starts one")


@command("info", short_help="Tell everything of machines.")
@click.argument("names", type=MachineName(), nargs=-1, required=True, metavar="NAME...")
@json_option
def info(session: Session, names: tuple[str, ...], as_json: bool) -> None:
    """Tell everything of machines: size, image, ports, how to log in, where its files are."""
    cloud = session.cloud
    found = [find_machine(cloud.working_dir, name) for name in names]
    seen = [collect(machine, _asked_state(session, machine)) for machine in found]
    if as_json:
        print_json(seen)
        return
    for number, (told, machine) in enumerate(zip(seen, found, strict=True)):
        if number:
            click.echo()
        print_facts(lines(told, cloud.image_dir, created_at(machine)))


def _asked_state(session: Session, found: Found) -> str:
    """Ask QEMU what a machine is doing, where one runs; empty elsewhere."""
    if found.state != "running":
        return ""
    machine = open_machine(session.cloud, found.full_name).machine
    machine.look()
    return machine.state.value


@command("logs", short_help="Print what a machine wrote to its console.")
@click.argument("name", type=MachineName())
@click.option("-f", "--follow", is_flag=True, help="Go on until the machine is off, or Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(0), help="The latest lines alone.")
@click.option("--qemu", is_flag=True, help="What QEMU itself said, instead.")
def logs(session: Session, name: str, follow: bool, lines: int | None, qemu: bool) -> None:
    """Print what a machine wrote to its serial console, over all its boots."""
    found = find_machine(session.cloud.working_dir, name)
    file = found.rundir.qemu_log if qemu else found.rundir.console_log
    for chunk in _read(file, lines, found if follow else None):
        click.echo(chunk, nl=False)
        sys.stdout.flush()


def _read(file: Path, lines: int | None, followed: Found | None) -> Iterator[bytes]:
    """Give the content of a log, and what comes while the machine runs that is followed."""
    position = 0
    identity: tuple[int, int] | None = None
    while True:
        # Before the look, so that the machine's last words are not missed.
        goes_on = followed is not None and followed.pid is not None
        try:
            with file.open("rb") as log:
                facts = os.fstat(log.fileno())
                if lines is not None:
                    position, lines = find_last_lines(log, lines), None
                elif identity != (facts.st_dev, facts.st_ino) or facts.st_size < position:
                    position = 0  # another file, or one that was truncated
                identity = (facts.st_dev, facts.st_ino)
                log.seek(position)
                while chunk := log.read(_CHUNK):
                    position += len(chunk)
                    yield chunk
        except FileNotFoundError:
            pass  # it has said nothing yet
        if not goes_on:
            return
        time.sleep(_LOOK)


@command("diagnose", short_help="Tell what is going on with a machine.")
@click.argument("name", type=MachineName())
@json_option
def diagnose(session: Session, name: str, as_json: bool) -> None:
    """Tell what is going on with a machine, and what may be wrong.

    It is told by its console, by QEMU, and by the guest where it can be asked.
    """
    diagnosis = open_machine(session.cloud, name).diagnose()
    if as_json:
        cause = diagnosis.cause
        hint = cause.hint_for(Audience.COMMAND_LINE)
        print_json({**dataclasses.asdict(diagnosis), "cause": cause.name, "hint": hint})
    else:
        click.echo(f"{name}\n{diagnosis.tell(audience=Audience.COMMAND_LINE)}")


_BLOCK = 512  # stat(2): the unit of st_blocks


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """A machine, as `list --json` and `info --json` tell of it.

    Attributes:
        name: What it is called.
        cloud: The tag of the cloud that it lives in; `cli` of the command line's own.
        id: Its id, by which `Qemu.get_instance` finds it.
        state: `running`, `off`, `starting`, `paused` (`info` alone tells that), `elsewhere` (it
            runs, or may run, in another container or on another host) or `broken`.
        place: Where that is; empty of any other.
        problem: Why it is broken; empty of any other.
        image: The image that it was launched from, a path; empty where that cannot be told.
        cpus: Processors.
        memory_mib: Memory in MiB.
        disk_bytes: Length of its disk.
        disk_used_bytes: What its own part of the disk takes on the host.
        ssh_port: The local port of its SSH server.
        telnet_port: The local port of its serial console.
        accelerator: `kvm` or `tcg`.
        username: The login user.
        private_key: File of the key to log in with; empty where none is known.
        public_key: File of its public half; empty where none is known.
        pid: The process id of its QEMU; null when it is off.
        created: When it was launched, by ISO 8601 in UTC.
        directory: The directory of all its files.
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


def collect(found: Found, state: str = "") -> MachineFacts:
    """Tell of a machine what its directory tells.

    Args:
        found: The machine.
        state: What it is doing, where that is known better.
    """
    spec, rundir = found.spec, found.rundir
    login = LoginFacts("", None, None)
    length, used = 0, 0
    # Each may vanish, or be damaged, while it is looked at.
    with contextlib.suppress(InstanceNotFoundError):
        login = rundir.read_login()
    with contextlib.suppress(OSError, ValueError):
        used = rundir.disk.stat().st_blocks * _BLOCK
        length = diskimage.read_layer(rundir.disk).virtual_size
    return MachineFacts(
        name=found.name,
        cloud=found.tag,
        id=found.id,
        state=state or found.state,
        place=found.place,
        problem=found.problem,
        image=_find_image(rundir.disk),
        cpus=spec.instance_type.cpus if spec else 0,
        memory_mib=spec.instance_type.memory_mib if spec else 0,
        disk_bytes=length,
        disk_used_bytes=used,
        ssh_port=spec.ssh_port if spec else 0,
        telnet_port=spec.telnet_port if spec else 0,
        accelerator=spec.accelerator.value if spec else "",
        username=login.username,
        private_key=login.private_key_path or "",
        public_key=login.public_key_path or "",
        pid=found.pid,
        created=timestamp(created_at(found)),
        directory=str(rundir.path),
    )


def created_at(found: Found) -> float:
    """Tell when a machine was launched, in seconds since the epoch; 0 where nothing tells it."""
    with contextlib.suppress(OSError):
        return found.rundir.created
    with contextlib.suppress(OSError):
        return found.rundir.path.stat().st_mtime
    return 0.0


def _find_image(disk_file: Path) -> str:
    """Find what a machine was launched from: layers of its own snapshots are passed over."""
    try:
        below = layers.chain(disk_file)[1:]
    except OSError:
        return ""
    return next((str(file) for file in below if file.parent.name != "layers"), "")


def image_in_words(image: str, image_dir: Path) -> str:
    """Give an image by as few words as tell it from others."""
    path = Path(image)
    if not image:
        return "?"
    if path.parent.parent.name == "warm":
        return "kept ready"
    name = short_name(path, image_dir)
    return path.name if name == image else name


COLUMNS = ("name", "state", "image", "cpus", "memory", "disk", "ssh", "console", "accel", "age")


def row(facts: MachineFacts, name: str, image_dir: Path, created: float) -> tuple[str, ...]:
    """Give the line of a machine in `list`."""
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


def lines(facts: MachineFacts, image_dir: Path, created: float) -> list[tuple[str, object]]:
    """Give what `info` tells people."""
    if facts.problem or not facts.cpus:
        told = [("Name", facts.name), ("State", facts.state), ("Problem", facts.problem)]
        return [*told, ("Directory", facts.directory)]
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
        ("Runs by", facts.accelerator),
        ("Process", facts.pid),
        ("SSH", ssh.login_command(endpoint, facts.name)),
        ("Console", f"telnet 127.0.0.1 {facts.telnet_port}"),
        ("Id", facts.id),
        ("Directory", facts.directory),
    ]
