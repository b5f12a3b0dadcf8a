"""A QEMU that ends at once because of a bad argument: how long until somebody says so."""

from __future__ import annotations

import time

from benchmarks.plan import Plan
from benchmarks.recorder import Recorder, TimeUp, describe, limit, run_course
from pycloudlib import Qemu


def course(plan: Plan, recorder: Recorder) -> None:
    """Launch it and wait for it; the error is what is measured."""
    with Qemu(tag="bench", config_file=plan.config_file) as cloud:
        started = time.perf_counter()
        try:
            with limit(plan.dead_limit):
                machine = cloud.launch(
                    plan.image,
                    instance_type=plan.instance_type,
                    launch_args=["-device", "no-such-device"],
                )
                machine.wait()
        except TimeUp:
            recorder.fail("dead", f"no error within {plan.dead_limit:.0f} s")
        except Exception as error:  # noqa: BLE001 - any error is what is waited for
            took = time.perf_counter() - started
            recorder.tell("dead", took, note=describe(error))
        else:
            recorder.fail("dead", "no error at all")


if __name__ == "__main__":
    run_course(course)
