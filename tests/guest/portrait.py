"""What a guest is like after its boot, to be compared with another's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pycloudlib.qemu.instance import QemuInstance

Portrait = Mapping[str, Mapping[str, str]]
"""By aspect: a name for each thing, and what is to be said of it."""

_PAINTER = Path(__file__).with_name("painter.py")


def paint(vm: QemuInstance) -> Portrait:
    """Describe a guest."""
    result = vm.execute("python3 -", stdin=_PAINTER.read_text(), use_sudo=True)
    assert result.ok, result.stderr
    portrait: dict[str, dict[str, str]] = json.loads(result.stdout)
    assert len(portrait["files"]) > 300
    assert len(portrait["units"]) > 50
    assert [aspect for aspect, found in portrait.items() if not found] == []
    return portrait


def compare(one: Portrait, other: Portrait) -> list[str]:
    """List in what two portraits differ."""
    return [
        f"{aspect}: {name}: {left!r} / {right!r}"
        for aspect in one
        for name in sorted({*one[aspect], *other[aspect]})
        for left, right in [(one[aspect].get(name), other[aspect].get(name))]
        if left != right
    ]
