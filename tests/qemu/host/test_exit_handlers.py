"""Exit handlers of programs, which use machines when this package's own has run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.qemu

AT_EXIT = """\
import atexit, io, sys, time

def end():
    begun = time.monotonic()
    print(instance.machine.execute("query-status")["status"])
    instance.machine.execute("cont")
    print(instance.get_status())
    instance.machine.execute("quit")
    instance.wait_for_stop()
    print(instance.get_status())
    print(instance.delete(), instance.instance_dir.exists())
    print("slow" if time.monotonic() - begun > 25 else "quick")

atexit.register(end)

from pycloudlib import Qemu

working_dir, image = sys.argv[1:]
config = f'[qemu]\\nworking_dir = "{working_dir}"\\naccelerator = "tcg"\\n'
cloud = Qemu("late", timestamp_suffix=False, config_file=io.StringIO(config))
instance = cloud.launch(image, launch_args=["-S"])
"""


def test_exit_handlers_that_were_there_before_the_import(
    working_dir: Path, tiny_image: Path
) -> None:
    """They run after ours: a machine is theirs to use as before."""
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, str(working_dir), str(tiny_image)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("prelaunch\nrunning\noff\n[] False\nquick\n", "")
