"""What is said of a binary that is no QEMU, or cannot run here."""

from __future__ import annotations

from pathlib import Path

import pytest

from pycloudlib.errors import CloudSetupError
from pycloudlib.qemu.host.accelerator import find_features


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (
            "#!/bin/sh\necho error while loading shared libraries: libx.so >&2\nexit 127\n",
            "it ended with exit status 127, and said: error while loading shared libraries: libx",
        ),
        ("#!/bin/sh\nkill -ABRT $$\n", "it ended with signal 6;"),
        ("#!/bin/sh\necho hello\n", "it ended with exit status 0, and said: hello;"),
        ("#!/nonexistent/interpreter\n", "No such file or directory"),
        ("\0\1\2", "Exec format error"),
    ],
)
def test_binary_that_cannot_run_is_told_in_its_own_words(
    program: str, told: str, tmp_path: Path
) -> None:
    binary = tmp_path / "qemu"
    binary.write_text(program, encoding="ascii")
    binary.chmod(0o755)
    with pytest.raises(CloudSetupError, match="does not answer as QEMU does") as caught:
        find_features(binary)
    assert told in str(caught.value)
    assert repr(str(binary)) in str(caught.value)
