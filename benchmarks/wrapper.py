"""A QEMU for programs that force KVM, where KVM does not work: only the accelerator differs."""

from __future__ import annotations

import shlex
from pathlib import Path

# Rotates through the arguments once: each is taken off the front and put at the back. A shell and
# not Python, which would take thirty times as long to start and be counted as the original's time.
_SCRIPT = """\
#!/bin/sh
# Runs QEMU with its accelerator swapped and nothing else.
accelerator={accelerator}
cpu={cpu}
before=
for argument do
    shift
    case $before:$argument in
    *:-enable-kvm | *:--enable-kvm)
        set -- "$@" -accel "$accelerator"
        before=
        continue
        ;;
    -accel:kvm | -accel:kvm,* | --accel:kvm | --accel:kvm,*)
        argument=$accelerator
        ;;
    -machine:*accel=kvm* | -M:*accel=kvm*)
        # The name alone: options of the accelerator are no properties of a machine.
        argument=${{argument%%accel=kvm*}}accel=${{accelerator%%,*}}${{argument#*accel=kvm}}
        ;;
    -cpu:host)
        argument=$cpu
        ;;
    -cpu:host,*)
        argument=$cpu,${{argument#host,}}
        ;;
    esac
    set -- "$@" "$argument"
    before=$argument
done
exec {qemu} "$@"
"""


def write_wrapper(path: Path, qemu: str, accelerator: str, cpu: str) -> None:
    """Write the wrapper, executable.

    Args:
        path: Where to.
        qemu: The QEMU that it runs.
        accelerator: What it has for `-accel` instead of KVM.
        cpu: The CPU model that it has instead of `host`, which only KVM knows.
    """
    script = _SCRIPT.format(
        qemu=shlex.quote(qemu), accelerator=shlex.quote(accelerator), cpu=shlex.quote(cpu)
    )
    path.write_text(script)
    path.chmod(0o755)
