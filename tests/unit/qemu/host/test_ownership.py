from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# An image is deleted just when the program that made it notes, at its end, that it is left.
ENDING = """
import sys, threading
from pathlib import Path
from pycloudlib.qemu.host import ownership

image = Path(sys.argv[1])
ends = []
ownership.at_normal_end = ends.append
ownership.claim(image, ownership.Orphans.REAP_AFTER_CRASH)

def delete():
    image.unlink()
    ownership.disown(image)

real = ownership.Ownership.write

def write(self, owned):
    other.start()
    other.join(0.1)  # it has to wait
    real(self, owned)

other = threading.Thread(target=delete)
ownership.Ownership.write = write
(end,) = ends
end()
other.join()
"""


def test_image_that_is_deleted_while_its_program_ends_leaves_no_note(tmp_path: Path) -> None:
    image = tmp_path / "snapshots" / "first.img"
    image.parent.mkdir()
    image.touch()
    subprocess.run([sys.executable, "-c", ENDING, str(image)], check=True, timeout=60)
    assert list(image.parent.iterdir()) == []
