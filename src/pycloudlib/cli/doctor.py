"""What is judged of a host: each check is a value, made from facts alone."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import click

from pycloudlib.cli.hostfacts import HostFacts
from pycloudlib.cli.lifecycle import drop_fork_bases
from pycloudlib.cli.output import print_json, size_in_words
from pycloudlib.cli.session import Session, command, json_option

_GIB = 1 << 30
_MIB = 1 << 20
# QEMU's versions by which the parts are that this package uses.
_OLDEST_QEMU = (6, 2)
_LEAST_DISK, _ENOUGH_DISK = _GIB, 10 * _GIB
# A machine of the usual size, and what QEMU needs beside.
_LEAST_MEMORY, _ENOUGH_MEMORY = 600 * _MIB, 2 * _GIB
_PORTS_OF_ONE, _ENOUGH_PORTS = 2, 10


class Outcome(enum.Enum):
    """What came of a check."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """A check, as `doctor --json` tells of it.

    Attributes:
        name: What was looked at.
        outcome: `ok`; `warning`: something is missing or slow; `problem`: launches fail.
        detail: What was found.
        remedy: How to mend it; empty where nothing is to be mended.
    """

    name: str
    outcome: Outcome
    detail: str
    remedy: str = ""


def judge(facts: HostFacts) -> list[Check]:
    """Judge a host; pure."""
    checks = [_configuration(facts), _qemu(facts), _accelerator(facts)]
    checks += _tools(facts)
    checks += [_room(facts, name) for name in facts.room]
    checks += _key(facts)
    checks += _processors(facts)
    checks += [_memory(facts), _ports(facts), _server(facts), _leftovers(facts), _package(facts)]
    return checks


def _configuration(facts: HostFacts) -> Check:
    if facts.configuration_problem:
        remedy = "mend that file; docs/reference/configuration.md tells what may be in it"
        return Check("configuration", Outcome.PROBLEM, facts.configuration_problem, remedy)
    return Check("configuration", Outcome.OK, facts.configuration)


def _qemu(facts: HostFacts) -> Check:
    if not facts.qemu:
        return Check(
            "QEMU",
            Outcome.PROBLEM,
            f"{facts.qemu_name!r} was not found",
            "sudo apt install qemu-system-x86; or let qemu_binary in [qemu] name it",
        )
    if not facts.qemu_version:
        remedy = "sudo apt install --reinstall qemu-system-x86"
        return Check("QEMU", Outcome.PROBLEM, f"{facts.qemu} tells no version", remedy)
    told = f"{facts.qemu}, version {'.'.join(map(str, facts.qemu_version))}"
    if facts.qemu_version < _OLDEST_QEMU:
        oldest = ".".join(map(str, _OLDEST_QEMU))
        return Check(
            "QEMU", Outcome.WARNING, told, f"install a newer one: this is for {oldest} and later"
        )
    return Check("QEMU", Outcome.OK, told)


def _accelerator(facts: HostFacts) -> Check:
    if not facts.qemu:
        return Check("accelerator", Outcome.WARNING, "not tried: there is no QEMU")
    if facts.accelerator != "tcg" and facts.kvm_problem is None:
        return Check("accelerator", Outcome.OK, "KVM was tried, and works")
    if facts.tcg_problem:
        detail = f"emulation was tried and does not work: {facts.tcg_problem}"
        return Check("accelerator", Outcome.PROBLEM, detail, "install QEMU anew")
    if facts.accelerator == "tcg":
        return Check("accelerator", Outcome.OK, "emulation, as configured; it was tried, and works")
    outcome = Outcome.PROBLEM if facts.accelerator == "kvm" else Outcome.WARNING
    detail = f"KVM does not work: {facts.kvm_problem}"
    if outcome is Outcome.WARNING:
        detail += "; emulation works, some ten times slower"
    return Check("accelerator", outcome, detail, _mend_kvm(facts))


def _mend_kvm(facts: HostFacts) -> str:
    if not facts.kvm_exists:
        return (
            "sudo modprobe kvm_intel (or kvm_amd); switch on virtualization in the firmware, or "
            "nested virtualization where this host is a virtual machine"
        )
    if not facts.kvm_allowed:
        if facts.in_kvm_group:
            return "you are in the group 'kvm', but /dev/kvm is not its: ls -l /dev/kvm"
        return "sudo usermod -aG kvm $USER, and log in anew"
    return "nothing on this host; another one may have KVM that works"


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


def _room(facts: HostFacts, name: str) -> Check:
    path, free = facts.room[name]
    if name in facts.unusable:
        return Check(
            f"disk of {name}",
            Outcome.PROBLEM,
            f"{path} cannot be used: {facts.unusable[name]}",
            f"let {name} in [qemu] name a directory of yours",
        )
    detail = f"{size_in_words(free)} free in {path}"
    remedy = f"make room, or let {name} in [qemu] name another place; 'pycloudlib prune' may help"
    if free < _LEAST_DISK:
        return Check(f"disk of {name}", Outcome.PROBLEM, detail, remedy)
    if free < _ENOUGH_DISK:
        return Check(f"disk of {name}", Outcome.WARNING, detail, remedy)
    return Check(f"disk of {name}", Outcome.OK, detail)


def _key(facts: HostFacts) -> Iterator[Check]:
    if facts.key_problem:
        remedy = "or let public_key_path in [qemu] name another key"
        yield Check("SSH key", Outcome.PROBLEM, facts.key_problem, remedy)
    elif facts.key:
        yield Check("SSH key", Outcome.OK, facts.key)


def _processors(facts: HostFacts) -> Iterator[Check]:
    if facts.processors:
        detail = f"{facts.processors} that programs may keep busy here, as many machines at once"
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
    remedy = "delete machines that are not needed, or end the programs: ss -tlnp"
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
            "set HTTPS_PROXY, or image_mirror in [qemu]; Debian's images are built without it: "
            "'pycloudlib images build'",
        )
    return Check("image server", Outcome.OK, f"{facts.server} answers")


def _leftovers(facts: HostFacts) -> Check:
    if facts.leftovers:
        some = ", ".join(facts.leftovers[:3]) + (" …" if len(facts.leftovers) > 3 else "")
        detail = f"{len(facts.leftovers)} left by programs that died: {some}"
        return Check("leftover machines", Outcome.WARNING, detail, "pycloudlib prune")
    return Check("leftover machines", Outcome.OK, "none")


def _package(facts: HostFacts) -> Check:
    if facts.other_packages:
        return Check(
            "other pycloudlib",
            Outcome.PROBLEM,
            f"another one is in the way: {', '.join(facts.other_packages)}",
            "pip uninstall pycloudlib, until it says that there is none; then install this one "
            "again, best in an environment of its own",
        )
    return Check("other pycloudlib", Outcome.OK, f"none; this one is {facts.own_package}")


_PROGRAM = "pycloudlib"
_COMPLETE_VARIABLE = "_PYCLOUDLIB_COMPLETE"
_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@command("prune", short_help="Remove what dead programs have left behind.")
@click.option("--stopped", is_flag=True, help="Machines that are off, too, yours among them.")
@click.option("--images", is_flag=True, help="Old builds of images, too.")
@click.option("--warm", is_flag=True, help="Machines that are kept ready, too.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
def prune(
    session: Session, stopped: bool, images: bool, warm: bool, yes: bool, as_json: bool
) -> None:
    """Remove what programs have left behind that were killed or crashed, and print its paths.

    What belongs to a program that is alive stays, and so do machines of the command line.
    """
    if stopped and not yes:
        click.confirm("Delete all machines that are off?", abort=True, err=True)
    cloud = session.cloud
    removed = [*cloud.prune(stopped=stopped), *drop_fork_bases(session)]
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
@click.option("--offline", is_flag=True, help="Leave the image server alone.")
@json_option
def doctor(session: Session, offline: bool, as_json: bool) -> int:
    """Check what a launch needs, and say how to mend what is missing.

    The exit code is 1 when something is in the way of a launch.
    """
    from pycloudlib.cli import hostfacts  # noqa: PLC0415 - seldom

    pass

    if not as_json:
        session.note("Looking, which takes some seconds …")
    found = judge(hostfacts.collect(ask_server=not offline))
    if as_json:
        print_json(found)
    else:
        for check in found:
            word = check.outcome.value
            mark = click.style(f"{word:8}", fg=_COLOURS[word], bold=True)
            click.echo(f"{mark} {check.name}: {check.detail}")
            if check.remedy:
                click.echo(f"{'':8} → {check.remedy}")
    return int(any(check.outcome is Outcome.PROBLEM for check in found))


@command("completion", short_help="Print what makes a shell complete commands and names.")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(context: click.Context, _session: Session, shell: str) -> None:
    """Print the script that makes a SHELL complete commands, options and names.

    \b
    bash:  eval "$(pycloudlib completion bash)"           in ~/.bashrc
    zsh:   eval "$(pycloudlib completion zsh)"            in ~/.zshrc
    fish:  pycloudlib completion fish | source            in ~/.config/fish/config.fish
    """  # noqa: D301 - click's mark for a paragraph that is left as it is
    from click.shell_completion import get_completion_class  # noqa: PLC0415 - seldom

    kind = get_completion_class(shell)
    assert kind is not None  # click knows all three
    click.echo(kind(context.find_root().command, {}, _PROGRAM, _COMPLETE_VARIABLE).source())
