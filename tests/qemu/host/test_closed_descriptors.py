"""Programs that run with their standard input or outputs closed, as daemons do."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.qemu.machines import alive, becomes

pytestmark = pytest.mark.qemu

# What it has to say goes into a file: its outputs are closed.
PROGRAM = """
import io, json, os, sys, traceback
from pathlib import Path
from pycloudlib import Qemu
from pycloudlib._base.tools import run_tool, run_tool_streaming
from tests.qemu.machines import hurry, run, runs, save

result, working_dir, image, numbers, end = sys.argv[1:]
for number in map(int, numbers):
    os.close(number)

def closed(number):
    try:
        os.fstat(number)
    except OSError:
        return True
    return False

said = {}
try:
    config = f'[qemu]\\nworking_dir = "{working_dir}"\\naccelerator = "tcg"\\n'
    cloud = Qemu("t", timestamp_suffix=False, config_file=io.StringIO(config))
    instance = run(cloud, Path(image))
    said["pid"] = instance.machine.pid
    saved = str(save(instance).image)
    copy = hurry(cloud.launch(saved))
    instance.rollback(saved)
    said["run"] = [runs(instance), runs(copy), runs(cloud.get_instance(copy.id))]
    done = run_tool("a tool", ["sh", "-c", "cat; echo err >&2"], input_bytes=b"in")
    said["tool"] = done.stdout.decode()
    lines = []
    run_tool_streaming("a tool", ["sh", "-c", "echo out; echo err >&2"], on_line=lines.append)
    said["lines"] = sorted(lines)
    # The program's own stay closed, and nothing of ours has their numbers while machines run.
    said["closed"] = [closed(int(number)) for number in numbers]
    said["pids"] = [instance.machine.pid, copy.machine.pid]
    if end == "clean":
        said["errors"] = [str(error) for error in cloud.clean()]
except BaseException:
    said["failed"] = traceback.format_exc()
with open(result + ".new", "w") as file:
    json.dump(said, file)
os.rename(result + ".new", result)
if end == "hang":
    import signal
    signal.pause()
"""
COMBINATIONS = ["".join(each) for n in (1, 2, 3) for each in itertools.combinations("012", n)]


def start(
    tmp_path: Path, working_dir: Path, image: Path, closed: str, end: str
) -> subprocess.Popen[bytes]:
    words = [str(tmp_path / "result"), str(working_dir), str(image), closed, end]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *words], env=env)


@pytest.mark.parametrize("closed", COMBINATIONS)
def test_machines_run_with_closed_descriptors(
    closed: str, tmp_path: Path, working_dir: Path, tiny_image: Path
) -> None:
    start(tmp_path, working_dir, tiny_image, closed, "clean").wait()

    said = json.loads((tmp_path / "result").read_text())
    assert "failed" not in said, said["failed"]
    assert said["run"] == [True, True, True]
    assert said["tool"] == "in"
    assert said["lines"] == ["err", "out"]
    assert said["closed"] == [True] * len(closed)
    assert said["errors"] == []
    assert list(working_dir.iterdir()) == []


@pytest.mark.parametrize("closed", ["1", "012"])
def test_machines_end_with_a_killed_program_whose_descriptors_are_closed(
    closed: str, tmp_path: Path, working_dir: Path, tiny_image: Path
) -> None:
    program = start(tmp_path, working_dir, tiny_image, closed, "hang")
    result = tmp_path / "result"
    assert becomes(lambda: result.exists() or program.poll() is not None, 120)
    said = json.loads(result.read_text())
    assert "failed" not in said, said["failed"]

    program.send_signal(signal.SIGKILL)
    program.wait()

    assert becomes(lambda: not any(alive(pid) for pid in said["pids"]))
