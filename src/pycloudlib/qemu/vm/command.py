"""From a machine's description to QEMU's command line: a pure function."""

from __future__ import annotations

from pycloudlib.qemu.host.accelerator import Features
from pycloudlib.qemu.parts.part import POWER_ON, Channels, Origin, Start
from pycloudlib.qemu.state.spec import MachineSpec


def build_command(
    binary: str,
    spec: MachineSpec,
    channels: Channels,
    features: Features,
    origin: Origin = POWER_ON,
) -> list[str]:
    """Build the command line: what each part of the machine adds, and the caller's arguments."""
    start = Start(spec.disk, channels, features, origin)
    # fmt: off
    return [
        binary,
        "-name", f"guest={spec.name}",
        "-no-user-config", "-nodefaults",
        *(argument for part in spec.parts for argument in part.arguments(start)),
        *(spec.launch_args if origin.state is None else _incoming(spec.launch_args)),
        *(["-S"] if origin.is_twin else []),
    ]
    # fmt: on


def _incoming(launch_args: tuple[str, ...]) -> list[str]:
    """Have QEMU wait for a state, which says whether the machine runs: `-S` would overrule it."""
    return [*(argument for argument in launch_args if argument != "-S"), "-incoming", "defer"]
