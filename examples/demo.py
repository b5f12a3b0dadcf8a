"""Launch a machine, run a few commands in it, and show how long each step took.

python examples/demo.py                     an image built from Debian's packages
python examples/demo.py --release trixie
python examples/demo.py --release noble     Ubuntu's, from its image server
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pycloudlib import Qemu
from pycloudlib.errors import PycloudlibException
from pycloudlib.progress import Progress, ProgressCallback
from pycloudlib.qemu.instance import QemuInstance

BUILT_RELEASES = ("bookworm", "trixie")
COMMANDS = (
    "uname -srm",
    '. /etc/os-release && echo "$PRETTY_NAME"',
    "cloud-init --version",
    "lsblk --output NAME,SIZE,TYPE,MOUNTPOINT",
    "ip -brief address",
    "systemctl --failed --no-legend | wc -l",
)
USER_DATA = """\
#cloud-config
write_files:
  - path: /etc/motd
    content: "This machine was configured by cloud-init.\\n"
"""


class Steps:
    """Shows each step while it runs and remembers how long it took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.durations: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[ProgressCallback]:
        """Time a step; yields the callback for its progress."""
        started = time.monotonic()
        with _progress_line(self._console, name, started) as show:
            yield show
        seconds = time.monotonic() - started
        self.durations.append((name, seconds))
        self._console.print(f"[green]done[/] {escape(name)} [dim]({seconds:.1f} s)[/]")


@contextlib.contextmanager
def _progress_line(console: Console, name: str, started: float) -> Iterator[ProgressCallback]:
    if console.is_terminal:
        with Live(console=console, refresh_per_second=8, transient=True) as live:
            yield lambda report: live.update(_line(name, started, report))
    else:
        yield _printer(console, name, started)


def _printer(console: Console, name: str, started: float) -> ProgressCallback:
    """Return a callback that prints a line for each new activity, and one every 15 seconds."""
    last_activity, last_printed = "", 0.0

    def show(report: Progress) -> None:
        nonlocal last_activity, last_printed
        now = time.monotonic()
        if report.activity != last_activity or now - last_printed > 15:
            console.print(_line(name, started, report), soft_wrap=True)
            last_activity, last_printed = report.activity, now

    return show


def _line(name: str, started: float, report: Progress) -> Text:
    line = Text.assemble(
        (f"{time.monotonic() - started:6.1f} s  ", "cyan"), f"{name}: {report.activity}"
    )
    if report.total and report.done is not None:
        line.append(f" {100 * report.done / report.total:.0f} %", "cyan")
    if report.detail:
        line.append(f"  {report.detail}", "dim")
    line.no_wrap = True
    line.overflow = "ellipsis"
    return line


def get_image(cloud: Qemu, release: str, on_progress: ProgressCallback) -> str:
    """Build or download the image, unless it is here already."""
    if release in BUILT_RELEASES:
        return cloud.build_image(release, on_progress=on_progress)
    return cloud.released_image(release, on_progress=on_progress)


def run_commands(console: Console, execute: Callable[[str], str]) -> None:
    """Execute a few commands in the guest, and show their output."""
    for command in COMMANDS:
        console.print(f"[bold]$[/] {escape(command)}")
        console.print(escape(execute(command)), highlight=False)


def show_timeline(console: Console, instance: QemuInstance) -> None:
    """Show when each phase of the boot began and how long it took."""
    phases = instance.boot_timeline
    table = Table(title="The boot", title_justify="left")
    for column in ("phase", "began at", "took"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    ends = [*(start.seconds for start in phases[1:]), None]
    for start, end in zip(phases, ends, strict=True):
        took = "" if end is None else f"{end - start.seconds:.1f} s"
        table.add_row(start.phase.value, f"{start.seconds:.1f} s", took)
    console.print(table)


def show_durations(console: Console, durations: Sequence[tuple[str, float]]) -> None:
    """Show how long each step took."""
    table = Table(title="The steps", title_justify="left")
    table.add_column("step")
    table.add_column("took", justify="right")
    for name, seconds in durations:
        table.add_row(escape(name), f"{seconds:.2f} s")
    console.print(table)


def demo(release: str, console: Console) -> None:
    """Show the whole life of a machine."""
    steps = Steps(console)
    with Qemu(tag="demo") as cloud:
        with steps.step(f"image of {release}") as show:
            image = get_image(cloud, release, show)
        console.print(f"  {image} (serial {cloud.image_serial(image)})", highlight=False)
        with steps.step("launch"):
            instance = cloud.launch(image, instance_type="c2m1024", user_data=USER_DATA)
        console.print(
            f"  {instance.name}\n"
            f"  SSH: {instance.login_command()}\n"
            f"  serial console: telnet {instance.ip} {instance.telnet_port}",
            highlight=False,
        )
        with steps.step("boot") as show:
            instance.wait(on_progress=show)
        with steps.step(f"{len(COMMANDS)} commands"):
            run_commands(console, lambda command: instance.execute(command).stdout)
        with steps.step("delete"):
            instance.delete()
        show_timeline(console, instance)
    show_durations(console, steps.durations)


def main() -> int:
    """Parse the command line, run the demo, and print errors in one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--release",
        default="bookworm",
        help="bookworm or trixie (built here), or an Ubuntu series or version (downloaded)",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show the package's log")
    arguments = parser.parse_args()
    console = Console()
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False)],
    )
    try:
        demo(arguments.release, console)
    except (PycloudlibException, ValueError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; nothing is left behind")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
