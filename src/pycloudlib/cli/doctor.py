"""`doctor` and `prune`: the commands that look after the host. Checks are made from facts alone."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import click

from pycloudlib.cli import hostfacts
from pycloudlib.cli.common import Session, command, json_option, print_json, size_in_words
from pycloudlib.cli.hostfacts import HostFacts
from pycloudlib.cli.lifecycle import delete_fork_bases

_GIB = 1 << 30
_MIB = 1 << 20
# The first version of QEMU with all features that this package uses.
_OLDEST_QEMU = (6, 2)
_LEAST_DISK, _ENOUGH_DISK = _GIB, 10 * _GIB
# A machine of the usual size, with QEMU's own memory.
_LEAST_MEMORY, _ENOUGH_MEMORY = 600 * _MIB, 2 * _GIB
_PORTS_OF_ONE, _ENOUGH_PORTS = 2, 10
_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


class Outcome(enum.Enum):
    """The result of a check."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """A check, as `doctor --json` prints it.

    Attributes:
        name: What was checked.
        outcome: `ok`; `warning`: something is missing or slow; `problem`: launches fail.
        detail: What was found.
        remedy: How to fix it; empty if nothing is wrong.
    """

    name: str
    outcome: Outcome
    detail: str
    remedy: str = ""


def judge(facts: HostFacts) -> list[Check]:
    """Return the checks of a host."""
    checks = [_configuration(facts), _qemu(facts), _accelerator(facts)]
    checks += _tools(facts)
    checks += [_disk(facts, name) for name in facts.free_space]
    checks += _key(facts)
    checks += _processors(facts)
    checks += [_memory(facts), _ports(facts), _server(facts), _leftovers(facts), _package(facts)]
    return checks


def _configuration(facts: HostFacts) -> Check:
    if facts.configuration_problem:
        remedy = "correct that file; docs/reference/configuration.md lists its keys"
        return Check("configuration", Outcome.PROBLEM, facts.configuration_problem, remedy)
    return Check("configuration", Outcome.OK, facts.configuration)


def _qemu(facts: HostFacts) -> Check:
    if not facts.qemu:
        return Check(
            "QEMU",
            Outcome.PROBLEM,
            f"{facts.qemu_name!r} was not found",
            "sudo apt install qemu-system-x86; or set qemu_binary in [qemu] to it",
        )
    if not facts.qemu_version:
        remedy = "sudo apt install --reinstall qemu-system-x86"
        return Check("QEMU", Outcome.PROBLEM, f"{facts.qemu} prints no version", remedy)
    detail = f"{facts.qemu}, version {'.'.join(map(str, facts.qemu_version))}"
    if facts.qemu_version < _OLDEST_QEMU:
        remedy = f"install a newer one: {'.'.join(map(str, _OLDEST_QEMU))} and later are supported"
        return Check("QEMU", Outcome.WARNING, detail, remedy)
    return Check("QEMU", Outcome.OK, detail)


def _accelerator(facts: HostFacts) -> Check:
    if not facts.qemu:
        return Check("accelerator", Outcome.WARNING, "not tried: QEMU is missing")
    if facts.accelerator != "tcg" and facts.kvm_problem is None:
        return Check("accelerator", Outcome.OK, "KVM was tried, and works")
    if facts.tcg_problem:
        detail = f"emulation was tried and does not work: {facts.tcg_problem}"
        return Check("accelerator", Outcome.PROBLEM, detail, "install QEMU again")
    if facts.accelerator == "tcg":
        return Check("accelerator", Outcome.OK, "emulation, as configured; it was tried, and works")
    outcome = Outcome.PROBLEM if facts.accelerator == "kvm" else Outcome.WARNING
    detail = f"KVM does not work: {facts.kvm_problem}"
    if outcome is Outcome.WARNING:
        detail += "; emulation works, some ten times slower"
    return Check("accelerator", outcome, detail, _kvm_remedy(facts))


def _kvm_remedy(facts: HostFacts) -> str:
    if not facts.kvm_exists:
        return (
            "sudo modprobe kvm_intel (or kvm_amd); switch on virtualization in the firmware, or "
            "nested virtualization where this host is a virtual machine"
        )
    if not facts.kvm_allowed:
        if facts.in_kvm_group:
            return "you are in the group 'kvm', but /dev/kvm is another group's: ls -l /dev/kvm"
        return "sudo usermod -aG kvm $USER, and log in again"
    return "nothing on this host; use another one, where KVM works"


def _tools(facts: HostFacts) -> Iterator[Check]:
    for use, (programs, needed) in facts.tools.items():
        missing = {name: package for name, package in programs.items() if package}
        if not missing:
            yield Check(f"tools {use}", Outcome.OK, ", ".join(programs))
            continue
        outcome = Outcome.PROBLEM if needed else Outcome.WARNING
        packages = " ".join(sorted(set(missing.values())))
        detail = f"missing: {', '.join(missing)}"
        yield Check(f"tools {use}", outcome, detail, f"sudo apt install {packages}")


def _disk(facts: HostFacts, name: str) -> Check:
    path, free = facts.free_space[name]
    if name in facts.unusable:
        return Check(
            f"disk of {name}",
            Outcome.PROBLEM,
            f"{path} cannot be used: {facts.unusable[name]}",
            f"set {name} in [qemu] to a directory of yours",
        )
    detail = f"{size_in_words(free)} free in {path}"
    remedy = f"free space ('pycloudlib prune'), or set {name} in [qemu] to another directory"
    if free < _LEAST_DISK:
        return Check(f"disk of {name}", Outcome.PROBLEM, detail, remedy)
    if free < _ENOUGH_DISK:
        return Check(f"disk of {name}", Outcome.WARNING, detail, remedy)
    return Check(f"disk of {name}", Outcome.OK, detail)


def _key(facts: HostFacts) -> Iterator[Check]:
    if facts.key_problem:
        remedy = "or set public_key_path in [qemu] to another key"
        yield Check("SSH key", Outcome.PROBLEM, facts.key_problem, remedy)
    elif facts.key:
        yield Check("SSH key", Outcome.OK, facts.key)


def _processors(facts: HostFacts) -> Iterator[Check]:
    if facts.processors:
        detail = f"{facts.processors} available, for as many busy machines"
        yield Check("processors", Outcome.OK, detail)


def _memory(facts: HostFacts) -> Check:
    detail = f"{size_in_words(facts.free_memory)} available"
    if facts.memory:
        detail += f" of {size_in_words(facts.memory)} that programs may use here"
    remedy = "end other programs or machines, or launch smaller ones (--memory 512M)"
    if facts.free_memory < _LEAST_MEMORY:
        return Check("memory", Outcome.PROBLEM, detail, remedy)
    if facts.free_memory < _ENOUGH_MEMORY:
        return Check("memory", Outcome.WARNING, detail, remedy)
    return Check("memory", Outcome.OK, detail)


def _ports(facts: HostFacts) -> Check:
    detail = f"{facts.free_ports} of {facts.ports} local ports are free; a machine takes two"
    remedy = "delete machines, or end the programs that listen: ss -tlnp"
    if facts.free_ports < _PORTS_OF_ONE:
        return Check("ports", Outcome.PROBLEM, detail, remedy)
    if facts.free_ports < _ENOUGH_PORTS:
        return Check("ports", Outcome.WARNING, detail, remedy)
    return Check("ports", Outcome.OK, detail)


def _server(facts: HostFacts) -> Check:
    if not facts.server:
        return Check("image server", Outcome.OK, "not asked")
    if facts.server_problem:
        return Check(
            "image server",
            Outcome.WARNING,
            f"{facts.server} cannot be used: {facts.server_problem}",
            "set HTTPS_PROXY, or image_mirror in [qemu]; Debian's images do not need it: "
            "'pycloudlib images build'",
        )
    return Check("image server", Outcome.OK, f"{facts.server} answers")


def _leftovers(facts: HostFacts) -> Check:
    if facts.leftovers:
        names = ", ".join(facts.leftovers[:3]) + (" …" if len(facts.leftovers) > 3 else "")
        detail = f"{len(facts.leftovers)} left by programs that died: {names}"
        return Check("leftover machines", Outcome.WARNING, detail, "pycloudlib prune")
    return Check("leftover machines", Outcome.OK, "none")


def _package(facts: HostFacts) -> Check:
    if facts.other_packages:
        return Check(
            "other pycloudlib",
            Outcome.PROBLEM,
            f"another one conflicts: {', '.join(facts.other_packages)}",
            "pip uninstall pycloudlib, until none is left; then install this one again, preferably "
            "in its own environment",
        )
    return Check("other pycloudlib", Outcome.OK, f"none; this one is {facts.own_package}")


@command("prune", short_help="Remove what dead programs have left.")
@click.option("--stopped", is_flag=True, help="Also machines that are off, yours included.")
@click.option("--images", is_flag=True, help="Also old builds of images.")
@click.option("--warm", is_flag=True, help="Also machines kept ready for `launch --warm`.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
def prune(
    session: Session, stopped: bool, images: bool, warm: bool, yes: bool, as_json: bool
) -> None:
    """Remove what killed or crashed programs have left, and print its paths.

    Machines of programs that are alive stay, and so do those of the command line.
    """
    if stopped and not yes:
        click.confirm("Delete all machines that are off?", abort=True, err=True)
    cloud = session.cloud
    removed = [*cloud.prune(stopped=stopped), *delete_fork_bases(cloud)]
    if images:
        removed += cloud.prune_images()
    if warm:
        removed += [f"kept ready: {key}" for key in cloud.prune_warm_images()]
    if as_json:
        print_json(removed)
    elif removed:
        click.echo("\n".join(removed))
    else:
        session.note("There is nothing to remove")


@command("doctor", short_help="Check what a launch needs.")
@click.option("--offline", is_flag=True, help="Do not contact the image server.")
@json_option
def doctor(session: Session, offline: bool, as_json: bool) -> int:
    """Check what a launch needs, and say how to fix what is missing.

    The exit code is 1 if a launch would fail.
    """
    if not as_json:
        session.note("This takes some seconds …")
    checks = judge(hostfacts.collect(ask_server=not offline))
    if as_json:
        print_json(checks)
    else:
        for check in checks:
            word = check.outcome.value
            mark = click.style(f"{word:8}", fg=_COLOURS[word], bold=True)
            click.echo(f"{mark} {check.name}: {check.detail}")
            if check.remedy:
                click.echo(f"{'':8} → {check.remedy}")
    return int(any(check.outcome is Outcome.PROBLEM for check in checks))
