"""`list`, `info`, `logs` and `diagnose`: what there is, and what is going on."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from pycloudlib.cli import facts
from pycloudlib.cli.failures import hint_of, tell_diagnosis
from pycloudlib.cli.machines import Found, find_machine, list_machines, open_machine
from pycloudlib.cli.output import print_facts, print_json, print_table
from pycloudlib.cli.session import Session, command, json_option
from pycloudlib.cli.values import MachineName
from pycloudlib.guest.console import start_of_last

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
    seen = [facts.collect(machine) for machine in found]
    if as_json:
        print_json(seen)
    elif seen:
        rows = [
            facts.row(told, machine.full_name, cloud.image_dir, facts.created_at(machine))
            for told, machine in zip(seen, found, strict=True)
        ]
        print_table(facts.COLUMNS, rows)
    else:
        session.note("There are no machines; 'pycloudlib launch' starts one")


@command("info", short_help="Tell everything of machines.")
@click.argument("names", type=MachineName(), nargs=-1, required=True, metavar="NAME...")
@json_option
def info(session: Session, names: tuple[str, ...], as_json: bool) -> None:
    """Tell everything of machines: size, image, ports, how to log in, where its files are."""
    cloud = session.cloud
    found = [find_machine(cloud.working_dir, name) for name in names]
    seen = [facts.collect(machine, _asked_state(session, machine)) for machine in found]
    if as_json:
        print_json(seen)
        return
    for number, (told, machine) in enumerate(zip(seen, found, strict=True)):
        if number:
            click.echo()
        print_facts(facts.lines(told, cloud.image_dir, facts.created_at(machine)))


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
                    position, lines = start_of_last(log, lines), None
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
        told = dataclasses.asdict(diagnosis)
        print_json({**told, "cause": diagnosis.cause.name, "hint": hint_of(diagnosis.cause)})
    else:
        click.echo(f"{name}\n{tell_diagnosis(diagnosis)}")
