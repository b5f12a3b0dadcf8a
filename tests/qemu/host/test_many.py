"""Many machines from many processes: their ports never collide, and nothing is left.

Half of the processes share a tag, and so a directory in which each cleans up while others work.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.qemu

PROCESSES = 8
MACHINES_EACH = 25
FEW_EACH = 10
# All processes together stay within the 50 pairs of ports that the range has.
BATCH = 5

WORKER = f"""
import io, sys
from concurrent.futures import ThreadPoolExecutor
from pycloudlib import Qemu
from pycloudlib.qemu.host import resources

config, image, tag, batches, first, last = sys.argv[1:]
resources.PORTS = range(int(first), int(last) + 1)
for batch in range(int(batches)):
    with Qemu(tag, timestamp_suffix=False, config_file=io.StringIO(config)) as cloud:
        # A seed needs host keys, which would cost more than all the rest.
        more = dict(launch_args=["-S"], no_seed_iso=True)
        launch = lambda _number: cloud.launch(image, "c1m64", **more)
        with ThreadPoolExecutor({BATCH}) as threads:
            machines = list(threads.map(launch, range({BATCH})))
        for machine in machines:
            # The port leads to this very machine: QEMU itself says which ports it has bound.
            bound = machine.machine.execute(
                "human-monitor-command", {{"command-line": "info usernet"}}
            )
            assert f" {{machine.port}} " in bound, (machine.port, bound)
            print("PORTS", batch, machine.port, machine.telnet_port, flush=True)
"""


@pytest.mark.parametrize(
    "each", [FEW_EACH, pytest.param(MACHINES_EACH, marks=pytest.mark.thorough)]
)
def test_many_machines_from_eight_processes(
    each: int, tmp_path: Path, tiny_image: Path, claimed: range
) -> None:
    working_dir = tmp_path / "many"
    working_dir.mkdir()
    config = f'[qemu]\nworking_dir = "{working_dir}"\naccelerator = "tcg"\n'
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                WORKER,
                config,
                str(tiny_image),
                f"many-{number % 2}",
                str(each // BATCH),
                str(claimed[0]),
                str(claimed[-1]),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * PROCESSES, "\n".join(outputs)
    # Who waits long for a lock says so there, too.
    lines = [line for output in outputs for line in output.splitlines()]
    pairs = [line.split()[2:] for line in lines if line.startswith("PORTS ")]
    assert len(pairs) == PROCESSES * each
    assert all(int(port) in claimed for pair in pairs for port in pair)
    assert list(working_dir.iterdir()) == []
