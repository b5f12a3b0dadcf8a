"""Run the commands of the README's transcript, and write there what they print.

    python -m scripts.transcript [--image IMAGE]

The image is Debian's bookworm, built here, unless another one is named.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pycloudlib.config import ENVIRONMENT_VARIABLE

README = Path(__file__).resolve().parent.parent / "README.md"
_BLOCK = re.compile(r"(<!-- transcript -->\n```console\n).*?(^```$)", re.MULTILINE | re.DOTALL)
# The time of each is told; no comments are needed then.
COMMANDS = (
    "pycloudlib launch {image} --name web --wait",
    "pycloudlib exec web -- sudo sh -c 'echo greetings >/srv/index.html'",
    "pycloudlib snapshot web --memory",
    "pycloudlib fork web --count 2",
    "pycloudlib exec web-2 -- cat /srv/index.html",
    "pycloudlib exec web -- sudo rm -r /etc /srv",
    "pycloudlib rollback web",
    "pycloudlib exec web -- cat /srv/index.html",
    "pycloudlib list",
)
_CLEAN_UP = "pycloudlib delete web web-1 web-2"


def run(command: str, config: Path) -> str:
    """Run a command; give what was typed, what it printed, and how long it took.

    Raises:
        RuntimeError: It failed.
    """
    words = shlex.split(command)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1", ENVIRONMENT_VARIABLE: str(config)},
    )
    took = time.monotonic() - started
    if done.returncode != 0:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stdout}")
    return f"$ {command}    # {took:.1f} s\n{done.stdout}"


def record(image: str, config: Path) -> str:
    """Run all commands; give what a terminal would show."""
    try:
        return "".join(run(command.format(image=image), config) for command in COMMANDS)
    finally:
        run(_CLEAN_UP, config)


def main() -> int:
    """Run the commands and write the transcript."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--image", default="bookworm")
    image = parser.parse_args().image
    with tempfile.TemporaryDirectory() as directory:
        # So that machines of whoever runs it are in nobody's way.
        config = Path(directory) / "pycloudlib.toml"
        config.write_text(f'[qemu]\nworking_dir = "{directory}"\n')
        transcript = record(image, config)
    print(transcript)
    text, count = _BLOCK.subn(lambda match: match[1] + transcript + match[2], README.read_text())
    if count != 1:
        raise RuntimeError(f"{README} has no place for a transcript")
    README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
