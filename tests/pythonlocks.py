"""The Python locks of an object and of all that it holds, whatever they are called."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_KINDS = (type(threading.Lock()), type(threading.RLock()), threading.Condition)


@contextlib.contextmanager
def holding_locks(owner: object) -> Iterator[int]:
    """Hold all of them in a block that gets their number, as other threads may at a fork."""
    with contextlib.ExitStack() as held:
        found = list(_find_locks(owner, set()))
        for lock in found:
            held.enter_context(lock)
        yield len(found)


def _find_locks(owner: object, seen: set[int]) -> Iterator[contextlib.AbstractContextManager[bool]]:
    seen.add(id(owner))
    for value in vars(owner).values():
        if id(value) in seen:
            continue
        if isinstance(value, _KINDS):
            seen.add(id(value))
            yield value
        elif type(value).__module__.startswith("pycloudlib.") and hasattr(value, "__dict__"):
            yield from _find_locks(value, seen)
