"""What puts a guest right whose first boot began where another machine was stopped.

The guest cannot know that it has been asleep, and that it has twins: its clock, its random numbers
and its machine-id are those of the machine that was stopped. A program in the vendor-data corrects
them, as a boothook: cloud-init runs those before its modules.
"""

from __future__ import annotations

import re
import secrets
import uuid
from importlib import resources

_ENTROPY_BYTES = 64
_PLACEHOLDER = re.compile(r"^FACTS = .*$", re.MULTILINE)
RESULT = "/run/pycloudlib/first-boot"
"""The file in the guest in which the program tells what went wrong, if anything."""


def program(*, saved_at: float, rtc_lag: float) -> str:
    """Give the program that puts one guest right, made when it is launched; it holds secrets.

    Args:
        saved_at: When the other machine was stopped, in seconds since the epoch.
        rtc_lag: Seconds that the machine's real-time clock is behind the host's clock.
    """
    facts = {
        "saved_at": str(saved_at),
        "rtc_lag": str(rtc_lag),
        "entropy": secrets.token_hex(_ENTROPY_BYTES),
        "machine_id": uuid.uuid4().hex,
    }
    text = resources.files(__package__).joinpath("firstboot_in_guest.py").read_text("utf-8")
    return _PLACEHOLDER.sub(lambda _: f"FACTS = {facts!r}", text, count=1)


def boothook(text: str) -> bytes:
    """Make that program a document for cloud-init."""
    return f"#cloud-boothook\n{text}".encode()


def check_command() -> str:
    """Give the command that tells what went wrong, and runs the program if it has not been run.

    It takes the program on its standard input.
    """
    return f"cat {RESULT} 2>/dev/null || {{ sudo python3 -IS -; cat {RESULT}; }}"
