"""Measure what verification and bookkeeping add to a download: against curl and sha256sum.

    python -m scripts.measure_download [--rounds 5] [--mib 600]

Both get the same file from the same server on the loopback, in turn, and both write it to disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pycloudlib.images.source import Stream
from scripts.figures import describe, timed
from tests.unit.imageserver import new_signing_key, running_image_server

FETCH = r"""
import re, sys
from pathlib import Path
from pycloudlib.images.catalog import find_entry
from pycloudlib.images.releases import fetch_image
from pycloudlib.images.source import ImageSource, Stream
source = ImageSource(sys.argv[1], Path(sys.argv[2]))
print(fetch_image(find_entry(source, Stream.DAILY, "noble"), source, Path(sys.argv[3])))
print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=600, help="size of the image")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, new_signing_key() as key:
        directory = Path(name)
        content = directory / "content.img"
        content.write_bytes(os.urandom(arguments.mib << 20))
        for beside in ("content-vmlinuz-generic", "content-initrd-generic"):
            (directory / beside).write_bytes(os.urandom(8 << 20))
        with running_image_server(key, directory) as server:
            entry = server.add_image(Stream.DAILY, "noble", "20240821", built=content)
            content.unlink()
            plain: list[float] = []
            ours: list[float] = []
            memory = 0

            def with_curl() -> None:
                subprocess.run(["curl", "-sSfo", directory / "plain.img", entry.url], check=True)
                subprocess.run(
                    ["sha256sum", directory / "plain.img"], check=True, stdout=subprocess.DEVNULL
                )

            def with_ours() -> None:
                nonlocal memory
                told = subprocess.run(
                    [sys.executable, "-c", FETCH, server.url, server.keyring, directory / "images"],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                ).stdout.splitlines()
                memory = max(memory, int(told[1]))

            for number in range(arguments.rounds):
                for curl in (True, False) if number % 2 else (False, True):
                    (plain if curl else ours).append(timed(with_curl if curl else with_ours))
                subprocess.run(["rm", "-rf", directory / "images"], check=True)
    print(f"curl and sha256sum, {arguments.mib} MiB: {describe(plain)}")
    print(f"fetched, verified and stored, kernel and initrd too: {describe(ours)}")
    print(f"at most {memory >> 10} MiB of memory")


if __name__ == "__main__":
    main()
