"""What a course is told: handed over as JSON on its command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """What a course works with.

    Attributes:
        image: Path of the image that machines boot from.
        instance_type: Their size.
        config_file: The configuration of the package that is measured.
        scratch: Directory for the course's own files.
        machines: How many machines where there are to be many at once.
        wanted: Keys of the scenarios to measure; others are left out where they can be.
        dead_limit: Seconds after which nobody waits any more for the error of a dead QEMU.
    """

    image: str
    instance_type: str
    config_file: str
    scratch: str
    machines: int
    wanted: tuple[str, ...]
    dead_limit: float

    def to_argument(self) -> str:
        """Write it as one argument."""
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, text: str) -> Plan:
        """Read it."""
        data = json.loads(text)
        return cls(**{**data, "wanted": tuple(data["wanted"])})
