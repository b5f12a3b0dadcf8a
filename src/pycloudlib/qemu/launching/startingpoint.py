"""First boots that begin at cloud-init: the way up to there is gone once for each image.

A machine is let run, with a seed that has nothing in it, until its guest opens the seed for the
first time: that is cloud-init, and nothing of it has been read yet. QEMU stops the machine at that
very read and keeps the request. The machine is saved and deleted. Each machine that is restored
from it has a seed of its own: the request is repeated, reads that seed, and cloud-init does its
genuine first boot.

    once:   firmware ▸ boot loader ▸ kernel ▸ initrd ▸ systemd ▸ cloud-init opens the seed ■ saved
    each:                                                        ▶ reads its own seed ▸ … ▸ ready
"""

from __future__ import annotations

import calendar
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import copy_private, write_private
from pycloudlib._base.tools import uninterrupted
from pycloudlib.errors import CloudError, PycloudlibTimeoutError
from pycloudlib.guest import helper
from pycloudlib.guest.boot.bootlines import Phase
from pycloudlib.guest.boot.readiness import BootWatch
from pycloudlib.guest.data import seed as nocloud
from pycloudlib.guest.data import userdata
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.host.ownership import Orphans
from pycloudlib.qemu.host.resources import PortLease
from pycloudlib.qemu.launching.beginning import (
    Host,
    PowerOn,
    create_disks,
    create_run_directory,
    describe_machine,
    start_machine,
    supply_seed,
)
from pycloudlib.qemu.launching.login import Login
from pycloudlib.qemu.launching.request import LaunchRequest, SeedRequest, make_seed
from pycloudlib.qemu.parts.part import SHARED, Origin
from pycloudlib.qemu.parts.standard import SEED_NODE
from pycloudlib.qemu.saved.restoring import create_overlays, prepared_restore
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import LoginFacts, RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import MachineSpec
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.qmp import Event
from pycloudlib.qemu.vm.running import MachineEndedError

# Seconds until an image's guest must have opened its seed; a boot takes a tenth of it.
_LIMITS = {Accelerator.KVM: 180.0, Accelerator.TCG: 600.0}
_LOOK = 0.5
# The real-time clock has whole seconds: looked at this often, in seconds, for one to begin.
_RTC_LOOK = 0.002
_RTC_LIMIT = 5.0
# Between two looks so close to each other, a second's beginning is known well enough.
_RTC_SURE = 0.02
_HELD = "-S"
# Once one of these is there, cloud-init has not been waiting for the seed.
_TOO_LATE = (Phase.CLOUD_INIT_NETWORK, Phase.CLOUD_INIT_CONFIG, Phase.CLOUD_INIT_DONE)


class UnfitImageError(CloudError):
    """The image's guest does not open its seed, so that no first boot can begin there.

    Attributes:
        timed_out: Whether that is all there is to tell: it might have opened it later.
    """

    def __init__(self, message: str, *, timed_out: bool) -> None:
        self.timed_out = timed_out
        super().__init__(message)


def find_obstacle(request: LaunchRequest) -> str | None:
    """Return why a machine has to boot from its beginning; None when it can begin later.

    What the guest has learned before it reads its seed must be the same for all.
    """
    if request.seed is None:
        return "it has no seed"
    for part in request.parts:
        if part.start_obstacle is not None:
            return part.start_obstacle
    if any(argument != _HELD for argument in request.launch_args):
        return "it has launch_args of its own"
    return _find_seed_obstacle(request.seed)


# By which cloud-init does something else than, or something before, what puts a machine right: in
# the documents or, as MIME types, in their headers.
_OBSTACLES = {
    b"vendor_data": "decides about vendor-data",
    b"boothook": "has a boothook",
    b"part-handler": "has a part handler",
    b"#include": "includes other documents",
    b"x-include": "includes other documents",
}


def _find_seed_obstacle(seed: SeedRequest) -> str | None:
    documents = {"user-data": seed.user_data, "vendor-data": seed.vendor_data}
    for name, given in documents.items():
        # What is given as a mapping is none of all these.
        if isinstance(given, (str, bytes)) and (obstacle := _find_in_document(given, name)):
            return f"its {name} {obstacle}"
    if "seedfrom" in nocloud.parse_mapping("meta_data", seed.meta_data):
        return "its meta-data names another seed (seedfrom)"
    return None


def _find_in_document(given: str | bytes, name: str) -> str | None:
    try:
        document = given.encode() if isinstance(given, str) else given
        parts = [userdata.decompress(document, name), *userdata.split(document, name)]
    except ValueError as error:
        # cloud-init may read in part what cannot be read here.
        return f"cannot be read whole: {error}"
    text = b"\n".join(parts).lower()
    return next((says for mark, says in _OBSTACLES.items() if mark in text), None)


@contextlib.contextmanager
def make_starting_point(
    host: Host, request: LaunchRequest, parent_dir: Path
) -> Iterator[SavedMachine]:
    """Run a machine until its guest opens the seed, and save it there.

    Args:
        host: What it runs on.
        request: A machine of the kind that is to be restored from there.
        parent_dir: Where it has its directory, until the block ends.

    Raises:
        UnfitImageError: Its guest does not open the seed.
        BootFailedError: Its boot goes no further.
        CloudError: It could not be started or saved.
    """
    # Whether each of the others is held back is its own affair.
    request = dataclasses.replace(request, launch_args=())
    with contextlib.ExitStack() as stack:
        rundir = create_run_directory(parent_dir / request.name, stack, Orphans.REAP)
        create_disks(rundir, request)
        nocloud.write_iso(nocloud.Seed(b"", b""), rundir.seed, make_seed(request).volume_length)

        def switch_on(machine: Machine) -> None:
            machine.power_on(Origin(SHARED, stops_at=nocloud.ROOT_DIRECTORY_SECTOR))

        machine = start_machine(
            host,
            rundir,
            lambda lease: describe_machine(host, rundir, request, lease),
            stack,
            switch_on,
        )
        rtc_lag = _measure_rtc_lag(machine)
        wait_for_seed(machine, Deadline.after(_LIMITS[host.accelerator]))
        yield save_start(host, machine, rtc_lag)


def wait_for_seed(machine: Machine, deadline: Deadline) -> None:
    """Wait until the machine has stopped before it reads its seed.

    Raises:
        UnfitImageError: Its guest has not opened it in time, or is past that.
        BootFailedError: The boot goes no further. It may in the next one: a kernel can panic once.
    """
    qemu = machine.qemu()
    with BootWatch(machine.console, 0, machine.powered_on) as watch:
        while True:
            try:
                qemu.wait_for_event(_is_at_seed, Deadline.after(deadline.capped(_LOOK)))
                return
            except MachineEndedError:
                raise
            except PycloudlibTimeoutError:
                machine.check_boot(0)
                late = watch.phase in _TOO_LATE or watch.last_line.endswith("login:")
                if late or deadline.expired:
                    raise UnfitImageError(
                        f"its guest did not open the seed within {deadline.elapsed:.0f} s, of "
                        f"{deadline.limit:.0f} s that it may take; the console's last line: "
                        f"{watch.last_line!r}",
                        timed_out=not late,
                    ) from None


def _is_at_seed(event: Event) -> bool:
    return event.name == "BLOCK_IO_ERROR" and event.data.get("node-name") == SEED_NODE


def _measure_rtc_lag(machine: Machine) -> float:
    """Measure how far the machine's real-time clock is behind ours, as it stays from its start."""
    deadline = Deadline.after(_RTC_LIMIT)
    with machine.session() as session:

        def read() -> int:
            told = session.execute("qom-get", {"path": "/machine", "property": "rtc-time"})
            date = ("tm_mday", "tm_hour", "tm_min", "tm_sec")
            # struct tm: years since 1900, months from 0 on.
            day = (told["tm_year"] + 1900, told["tm_mon"] + 1)
            return calendar.timegm((*day, *(told[name] for name in date)))

        first, looked = read(), time.time()
        # Of each second that was seen to begin: how well its beginning is known, and the lag by it.
        known: list[tuple[float, float]] = []
        while not deadline.expired:
            time.sleep(_RTC_LOOK)
            before, seconds, looked = looked, read(), time.time()
            if seconds != first:
                known.append((looked - before, (before + looked) / 2 - seconds))
                if looked - before < _RTC_SURE:
                    break
            first = seconds
    if known:
        return min(known)[1]
    raise CloudError(f"The real-time clock of {machine.spec.name} does not advance")


def save_start(host: Host, machine: Machine, rtc_lag: float) -> SavedMachine:
    """Save the paused machine, and end it."""
    from pycloudlib.qemu.saved.capture import write_whole  # noqa: PLC0415 - for saves alone

    saved = SavedMachine(
        machine.rundir.disk,
        machine.spec,
        LoginFacts("", None, None),
        savedmachine.host_fingerprint(host.binary, host.accelerator),
        helper=False,
        saved_at=time.time(),
        rtc_lag=rtc_lag,
    )
    with savedmachine.new_directory(saved.directory):
        size = machine.spec.memory_kib << 10
        uninterrupted(lambda: write_whole(machine.qemu(), saved.directory, size))
        machine.kill()
        for source, target in (
            (machine.rundir.seed, saved.seed),
            (machine.rundir.console_log, saved.console_log),
        ):
            copy_private(source, target)
        for own in machine.spec.own_disks:
            if own.suffix:
                own.beside(saved.image).rename(own.kept_beside(saved.image))
        return savedmachine.write_facts(saved, saved.login)


@dataclass(frozen=True, slots=True)
class FirstBoot(PowerOn):
    """The steps of launching a machine whose first boot begins at a starting point.

    Attributes:
        request: The machine.
        start: Where it begins.
    """

    start: SavedMachine

    def write_files(self, host: Host, rundir: RunDirectory, login: Login) -> None:
        """Make its disk and its seed."""
        start = self.start
        assert start.rtc_lag is not None
        create_overlays(start, rundir)
        program = helper.first_boot_program(saved_at=start.saved_at, rtc_lag=start.rtc_lag)
        write_private(rundir.first_boot, program)
        supply_seed(
            host,
            rundir,
            self.request,
            boothook=helper.first_boot_hook(program),
            length=start.seed.stat().st_size,
        )
        # What its guest has gone through.
        copy_private(start.console_log, rundir.console_log)

    def describe(self, host: Host, rundir: RunDirectory, lease: PortLease) -> MachineSpec:
        """Return what machine it is."""
        spec = describe_machine(host, rundir, self.request, lease)
        # The guest has found its network card and its processors already.
        start = self.start.spec
        return dataclasses.replace(spec, mac=start.mac, without=start.without)

    def switch_on(self, machine: Machine) -> None:
        """Restore it at the starting point."""
        held = _HELD in self.request.launch_args
        with prepared_restore(self.start, machine.rundir, held=held) as (origin, load_state):
            machine.power_on(origin, load_state)
