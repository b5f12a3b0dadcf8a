from __future__ import annotations

from pathlib import Path

import pytest

from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.parts.part import ANONYMOUS, SHARED
from pycloudlib.qemu.vm.memory import choose_memory


def test_emulation_has_memory_that_can_be_saved_at_once() -> None:
    assert choose_memory(Accelerator.TCG) == SHARED


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("always within_size advise [never] deny force\n", ANONYMOUS),
        ("always within_size advise never [deny] force\n", ANONYMOUS),
        ("always within_size [advise] never deny force\n", SHARED),
        ("[always] within_size advise never deny force\n", SHARED),
        ("", ANONYMOUS),
        (None, ANONYMOUS),
    ],
)
def test_kvm_has_it_where_it_has_huge_pages(
    tmp_path: Path, words: str | None, expected: object
) -> None:
    setting = tmp_path / "shmem_enabled"
    if words is not None:
        setting.write_text(words)
    assert choose_memory(Accelerator.KVM, setting) == expected
