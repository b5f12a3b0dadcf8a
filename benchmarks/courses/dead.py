"""A QEMU that ends at once because of a bad argument: how long until an error says so."""

from __future__ import annotations

import time

from benchmarks.recorder import TimeUp, describe, limit
from benchmarks.worker import Bench


def run(bench: Bench) -> None:
    """Launch it and wait for it; the error is what is measured."""
    patience, recorder = bench.plan.dead_limit, bench.recorder
    started = time.perf_counter()
    try:
        with limit(patience):
            bench.boot(launch_args=["-device", "no-such-device"])
    except TimeUp:
        recorder.fail("dead", f"no error within {patience:.0f} s")
    except Exception as error:  # noqa: BLE001 - any error is what is waited for
        recorder.record("dead", time.perf_counter() - started, note=describe(error))
    else:
        recorder.fail("dead", "no error at all")
