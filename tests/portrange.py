"""A range of ports for the tests of one process, whatever else runs on this host.

Tests that look at a port after its machine has gone need ports that nobody else leases meanwhile:
neither the user's machines, nor the other workers of this run, nor another run. A socket that
listens on the first port of a block claims the block for as long as the process lives.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

# Below the ports that the kernel gives to programs that ask for any.
_FIRST, _LAST = 20_000, 32_000
_CLAIMED = 102
"""Ports of a block: the one that claims it, and as many as the real range has."""


@contextlib.contextmanager
def claimed_ports() -> Iterator[range]:
    """Claim a hundred and one ports for this process."""
    with socket.socket() as claim:
        first = next(filter(lambda port: _binds(claim, port), range(_FIRST, _LAST, _CLAIMED)))
        claim.listen()
        yield range(first + 1, first + _CLAIMED)


def _binds(claim: socket.socket, port: int) -> bool:
    try:
        claim.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True
