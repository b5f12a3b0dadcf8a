"""A guest whose console anybody on this host can type on: what that can do to those who wait."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.diagnosis import Cause
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.qemu.instance import QemuInstance

pytestmark = pytest.mark.qemu

# Minutes: whatever takes so long hangs.
HANGS = 1.0
# Boot sectors that greet, and then send back what comes on the serial line, without BIOS, which
# would read it, too: cli; mov al, '`'; mov dx, 0x3f8; out dx, al.
GREETING = b"`"
_GREET = bytes.fromhex("fa b060 baf803 ee")
# loop: mov dx, 0x3fd; in al, dx; test al, 1; jz loop; mov dx, 0x3f8; in al, dx; out dx, al;
# jmp loop
QUIET_ECHO = _GREET + bytes.fromhex("bafd03 ec a801 74f8 baf803 ec ee ebf1")
# The same, and a dot now and then by itself: dec cx; jnz loop; mov al, '.'; out dx, al.
ECHO = _GREET + bytes.fromhex("31c9 bafd03 ec a801 7405 baf803 ec ee 49 75f0 b02e baf803 ee ebe8")
TYPED = b"\r\n[   44.3] ---[ end Kernel panic - not syncing: typed by somebody ]---\r\n"


def echoing(cloud: Qemu, tmp_path: Path, program: bytes) -> QemuInstance:
    image = tmp_path / "echo.img"
    image.write_bytes(program.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    return cloud.launch(str(image))


def type_on_console(instance: QemuInstance, text: bytes) -> None:
    """Type as anybody on this host can, until the guest has said it all again."""
    log = instance.machine.rundir.console_log
    deadline = time.monotonic() + 60 * HANGS
    with socket.create_connection(("127.0.0.1", int(instance.telnet_port))) as console:
        while GREETING not in log.read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for byte in text:
            before = log.read_bytes().count(bytes([byte]))
            console.sendall(bytes([byte]))
            while log.read_bytes().count(bytes([byte])) == before:
                assert time.monotonic() < deadline
                time.sleep(0.001)


def test_words_that_are_typed_are_taken_for_the_guests(cloud: Qemu, tmp_path: Path) -> None:
    """Which they look like: nothing on the console tells them apart."""
    instance = echoing(cloud, tmp_path, QUIET_ECHO)
    type_on_console(instance, TYPED)
    found = instance.machine.console.look().find_dead_end()
    assert found is not None
    assert found.cause is Cause.KERNEL_PANIC


@pytest.mark.thorough
def test_words_that_are_typed_end_no_wait_for_a_machine_that_lives(
    cloud: Qemu, tmp_path: Path
) -> None:
    instance = echoing(cloud, tmp_path, ECHO)
    # Its dots come in between.
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(
            socket.create_connection(("127.0.0.1", int(instance.telnet_port)))
        )
        stop = threading.Event()
        stack.callback(stop.set)

        def keep_typing() -> None:
            while not stop.wait(1):
                console.sendall(TYPED)

        threading.Thread(target=keep_typing, daemon=True).start()
        with pytest.raises(PycloudlibTimeoutError, match="could not be reached"):
            instance.wait(ready_timeout=8 / 60)


@pytest.mark.thorough
def test_machine_at_its_end_is_told_in_seconds(cloud: Qemu, tmp_path: Path) -> None:
    instance = echoing(cloud, tmp_path, QUIET_ECHO)
    type_on_console(instance, TYPED)
    with pytest.raises(PycloudlibTimeoutError, match="does not boot: kernel panic"):
        instance.wait(ready_timeout=HANGS)
