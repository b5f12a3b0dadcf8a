"""A few sectors in the place of a guest: it works, and finds out itself when it is not as it was.

It goes through rounds, some 70 a second, which it counts. In each it

- compares a thousand pages of memory with the number of the last round, and writes the next one,
- compares a thousand other pages with what was last typed: zeros, or 0x5a for an "f",
- reads what it wrote to the disk in the last round and 64 rounds ago, compares that, and writes the
  next number,
- prints ">" and the number, in eight hexadecimal digits.

When something differs it prints "X" and halts. What is typed on its console is remembered; "?"
prints all of it after a "=", and "r" resets the processor. The power button powers it off.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from pathlib import Path
from types import TracebackType

from pycloudlib import Qemu
from pycloudlib._base.deadline import Deadline
from pycloudlib.qemu.cloud import Disk
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.vm.machine import PowerOff
from pycloudlib.qemu.vm.running import State
from tests.qemu.machines import SMALL, becomes, hurry, runs

# Loads the next two sectors, since the end of this one has a partition table, an empty one.
_BOOT = bytes.fromhex(
    "31c0 8ed8 8ec0 8ed0 bc007c"  # ds = es = ss = 0; sp = 0x7c00
    "be177c b442 b280 cd13"  # read what packet says, of drive 0x80
    "e9e901"  # jmp 0x7e00
    "1000 0200 007e0000 0100000000000000"  # packet: two sectors, address, first sector
)
# Variables: 0x7000 the round, 0x7004 what the other pages hold, 0x7008 how much was typed, which is
# at 0x7100. Disk buffer: 0x9000. Begins at 0x7e00.
_PROGRAM = bytes.fromhex(
    # No interrupts but when it waits: the firmware would use them to read what is typed.
    "fc fa b8ffff e621 e6a1"  # mask all interrupts in both controllers
    "ba0206 b80001 ef"  # enable the power button (ACPI's PM1 enable register)
    "e8b001"  # call unreal
    "6631c0 bf0070 b94000 66f3ab"  # clear the variables
    "a32200 c7062000e57f b040 e640 e640"  # let the timer call tick, some 70 times a second
    "31c0 66bf00002000 66b900002000 6766f3ab"  # clear 8 MiB from 2 MiB on
    "e83801"  # call disk_write
    # round:
    "b0fe e621 fb f4 fa b0ff e621"  # wait for a tick, halted
    "e87201"  # call unreal
    "66bb00002000"  # ebx = 2 MiB
    "66a10070 67668d5001"  # eax = round; edx = round + 1
    "b90004"  # a thousand times:
    "67663903 0f858c00"  # a page's first word is eax, otherwise: jmp bad
    "67663983fc0f0000 0f858000"  # and its last
    "67668913 67668993fc0f0000"  # set both to edx
    "6681c300100000 e2d7"  # next page
    "66a10470 b90004"  # eax = what the other pages hold; a thousand times:
    "67663903 755e"  # a page's first word is eax, otherwise: jmp bad
    "67663983fc0f0000 7554"  # and its last
    "6681c300100000 e2e7"  # next page
    "66a10070 e8a300"  # eax = round; call disk_check
    "66a10070 6683e83f 7203 e89600"  # eax = round - 63; if it is not negative: call disk_check
    "66ff060070 e8b300"  # add one to round; call disk_write
    "b03e e8e500 66a10070 e8c700"  # print ">" and the number
    "bafd03 ec a801 7406"  # if a character has come:
    "b2f8 ec e81c00"  # read it; call typed
    "ba0006 ed f6c401 0f8456ff"  # until the power button was pressed: jmp round
    "ba0406 b80020 ef"  # power off (ACPI's PM1 control register: sleep, S5)
    # halt:
    "f4 ebfd"
    # bad:
    "b058 e8b600 ebf6"  # print "X"; jmp halt
    # typed:
    "3c72 7506 b0fe e664 ebec"  # "r": reset by the keyboard controller; jmp halt
    "3c3f 7519"  # "?":
    "b03d e8a100"  # print "="
    "be0071 8b0e0870 e306 ac e89400 e2fa"  # and what was typed
    "b00a e98d00"  # and a line's end; return
    "8b1e0870 88870071 ff060870"  # otherwise: remember it
    "3c66 66b85a5a5a5a 7403"  # "f": eax = 0x5a5a5a5a
    "6631c0"  # otherwise: 0
    "66a30470 e87e00"  # the other pages hold that; call unreal
    "66bf00006000 66b900001000 6766f3ab c3"  # fill them, from 6 MiB on; return
    # disk_check:
    "6650 e81600 b442 e82e00 6658"  # read the sector of round eax
    "6639060090 758e 663906fc91 7587 c3"  # it holds eax, otherwise: jmp bad; return
    # sector:
    "83e03f 83c003 a30a80 c3"  # let packet name the sector of round eax, one of 64; return
    # disk_write:
    "66a10070 bf0090 b98000 66f3ab"  # fill the buffer with the round's number
    "e8e6ff b80043"  # call sector; write
    # disk:
    "be0280 b280 cd13 fa 0f825dff c3"  # what packet says, of drive 0x80; an error: jmp bad; return
    # hex:
    "b90800 66c1c004 50 240f 3c0a 1c69 2f e80500 58 e2ee"  # print eax, digit by digit
    "b00a"  # and a line's end
    # put:
    "52 50 bafd03 ec a820 74fb"  # wait until the serial port is ready
    "58 baf803 ee 5a c3"  # print al; return
    # unreal: lets ds and es reach all memory
    "0f0116ec7f 0f20c1 80c901 0f22c1"  # load gdt; protected mode
    "bb0800 8edb 8ec3 80e1fe 0f22c1"  # ds and es of 4 GiB; real mode
    "31db 8edb 8ec3 c3"  # ds = es = 0, of 4 GiB still; return
    # tick:
    "50 b020 e620 58 cf"  # tell the interrupt controller; return
    "0f00 f27f0000"  # gdt's size and place
    "0000000000000000 ffff00000092cf00"  # gdt
    "1000 0100 00900000 0100000000000000"  # packet: one sector, buffer, sector's number
)
# The beginning of `disk`, for drive 0x80 and for drive 0x81.
_DISK = bytes.fromhex("be0280 b280 cd13 fa")
_SECOND_DISK = bytes.fromhex("be0280 b281 cd13 fa")
_ROUND = re.compile(rb">([0-9A-F]{8})\n")
# Far more than a busy host needs for a few rounds.
_LIMIT = 60


def write_worker(image: Path, *, works_on_second: bool = False) -> Path:
    """Write a disk that a worker boots from.

    Args:
        image: The disk.
        works_on_second: Whether it reads and writes the machine's second disk, not this one.
    """
    program = _PROGRAM
    if works_on_second:
        assert program.count(_DISK) == 1
        program = program.replace(_DISK, _SECOND_DISK)
    image.write_bytes(_BOOT.ljust(510, b"\0") + b"\x55\xaa" + program.ljust(1 << 20, b"\0"))
    return image


def start_worker(
    cloud: Qemu,
    image: Path,
    launch_args: list[str] | None = None,
    disks: list[int | Disk] | None = None,
) -> QemuInstance:
    """Start a machine with a worker, and wait until it works: on its second disk if it has one."""
    write_worker(image, works_on_second=bool(disks))
    worker = hurry(cloud.launch(str(image), SMALL, launch_args=launch_args, disks=disks))
    assert works(worker)
    return worker


def copy_worker(cloud: Qemu, image_id: str) -> QemuInstance:
    """Start a copy of a saved one; it is a copy that goes on, not one that boots."""
    copy = hurry(cloud.launch(image_id))
    assert works(copy)
    log = copy.console_log()
    assert "SeaBIOS" not in log, log
    return copy


def rounds(output: bytes) -> list[int]:
    """List the numbers of the rounds that were printed."""
    return [int(number, 16) for number in _ROUND.findall(output)]


def output_of(worker: QemuInstance) -> bytes:
    """Return all that a worker has printed."""
    return worker.machine.rundir.console_log.read_bytes()


def are_in_order(numbers: list[int]) -> bool:
    """Whether each number is one more than the one before."""
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def works(worker: QemuInstance, more: int = 10) -> bool:
    """Wait until a worker has done some more rounds; none of them found anything wrong."""
    before = len(rounds(output_of(worker)))
    assert becomes(
        lambda: finds_fault(worker) or len(rounds(output_of(worker))) >= before + more, _LIMIT
    ), output_of(worker)[-500:]
    assert not finds_fault(worker), output_of(worker)[-500:]
    assert runs(worker)
    return True


def finds_fault(worker: QemuInstance) -> bool:
    """Whether a worker has found anything that is not as it was."""
    return re.search(rb"^X", output_of(worker), re.MULTILINE) is not None


class Console:
    """A telnet client of a worker's console, which stays connected."""

    def __init__(self, worker: QemuInstance) -> None:
        self._worker = worker
        self._socket = socket.create_connection(("127.0.0.1", int(worker.telnet_port)), _LIMIT)
        self._socket.settimeout(None)
        self._received = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._reader.join(_LIMIT)

    @property
    def is_open(self) -> bool:
        """Whether QEMU has not closed the connection."""
        return self._reader.is_alive()

    @property
    def received(self) -> bytes:
        """All that has come."""
        return bytes(self._received)

    def send(self, text: str) -> None:
        """Type something."""
        self._socket.sendall(text.encode())

    def ask(self) -> str:
        """Ask the worker what was typed so far."""
        before = self.received.count(b"=")
        self.send("?")
        assert becomes(
            lambda: len(self._answers()) > before and self._answers()[-1].endswith(b"\n"), _LIMIT
        ), self.received[-500:]
        return self._answers()[-1].decode().rstrip("\n")

    def _answers(self) -> list[bytes]:
        return re.findall(rb"=([a-z]*\n?)", self.received)

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._socket.recv(1 << 16):
                self._received += data


def type_in(worker: QemuInstance, text: str) -> None:
    """Type something, and wait until a worker has got it all."""
    with Console(worker) as console:
        before = console.ask()
        console.send(text)
        assert console.ask() == before + text
    assert works(worker)


def typed(worker: QemuInstance) -> str:
    """Return what was typed so far, by the worker's own memory."""
    with Console(worker) as console:
        return console.ask()


def reboot(worker: QemuInstance) -> str:
    """Reset a worker; return what its firmware printed before it came to the disk."""
    before = len(output_of(worker))
    worker.machine.execute("system_reset")
    assert becomes(lambda: b">00000001\n" in output_of(worker)[before:], _LIMIT), output_of(worker)[
        before:
    ]
    assert works(worker)
    printed = output_of(worker)[before:].decode()
    return printed[printed.index("SeaBIOS") : printed.index("Booting from Hard Disk")]


def power_off(worker: QemuInstance) -> None:
    """Press the power button; the worker powers itself off."""
    assert worker.machine.power_off(Deadline.after(2 * _LIMIT)) is PowerOff.ACPI
    assert worker.machine.state is State.OFF
