"""Who may import whom, and what importing the package costs."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import pycloudlib

ROOT: Final = Path(pycloudlib.__file__).parent
PACKAGE: Final = "pycloudlib"

# From the bottom up: each imports only from itself and from those before it, but for what `APART`
# says. A module beside the front door that is not named here is vocabulary.
ORDER: Final = (
    "vocabulary",
    "_base",
    "guest",
    "images",
    "base",
    "qemu.host",
    "qemu.parts",
    "qemu.state",
    "qemu.disk",
    "qemu.vm",
    "qemu.failure",
    "qemu.saved",
    "qemu.launching",
    "qemu",
    "placeholders",
    "front",
    "program",
)
LAYERS: Final = {
    PACKAGE: "front",
    f"{PACKAGE}.__main__": "program",
    f"{PACKAGE}._otherclouds": "placeholders",
    f"{PACKAGE}.cloud": "base",
    f"{PACKAGE}.instance": "base",
}
PACKAGE_LAYERS: Final = {
    "cli": "program",
    "pytest_plugin": "program",
    "images": "images",
    "guest": "guest",
    "_base": "_base",
    **dict.fromkeys(
        ("azure", "ec2", "gce", "ibm", "ibm_classic", "lxd", "oci", "openstack", "vmware"),
        "placeholders",
    ),
}
# Neighbours that know nothing of each other. The vocabulary uses the small tools.
APART: Final = {
    "images": {"guest"},
    "base": {"images"},
    "placeholders": {layer for layer in ORDER if layer.startswith("qemu")} | {"guest", "images"},
}
TOGETHER: Final = {"vocabulary": {"_base"}}

# Imported where they are used: each takes longer than all of this package.
HEAVY: Final = ("cryptography", "httpx", "paramiko", "pycdlib", "rich", "yaml")


def find_modules() -> dict[str, Path]:
    modules = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


MODULES: Final = find_modules()


def layer_of(module: str) -> str:
    if module in LAYERS:
        return LAYERS[module]
    inner = module.removeprefix(f"{PACKAGE}.")
    for room in ORDER:
        if room.startswith("qemu.") and f"{inner}.".startswith(f"{room}."):
            return room
    first, _, rest = inner.partition(".")
    if first == "qemu":
        return "qemu"
    if first in PACKAGE_LAYERS:
        return PACKAGE_LAYERS[first]
    assert not rest, f"the new package {first!r} has no layer yet: give it one here"
    return "vocabulary"


def find_imports(module: str) -> Iterator[tuple[str, int]]:
    """Give what a module imports of this package, wherever in it, with the line."""
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            source = importlib.util.resolve_name(relative, package)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                names.append(inner if inner in MODULES else source)
        for name in names:
            if name in MODULES:
                yield name, getattr(node, "lineno", 0)


def test_modules_are_found() -> None:
    assert {PACKAGE, "pycloudlib.cloud", "pycloudlib.qemu.cloud"} <= set(MODULES)
    assert "pycloudlib.cloud" in dict(find_imports("pycloudlib.qemu.imageshelf"))


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_is_below_it(module: str) -> None:
    layer = layer_of(module)
    wrong = [
        f"{MODULES[module]}:{line} imports {name} ({layer_of(name)})"
        for name, line in find_imports(module)
        if layer_of(name) not in allowed(layer)
    ]

    assert not wrong, f"{module} is of the layer {layer!r}, but " + "; ".join(wrong)


def allowed(layer: str) -> set[str]:
    below = set(ORDER[: ORDER.index(layer) + 1])
    return below - APART.get(layer, set()) | TOGETHER.get(layer, set())


@pytest.mark.parametrize("room", [room for room in ORDER if room.startswith("qemu")])
def test_nothing_below_the_engine_knows_it(room: str) -> None:
    assert not [layer for layer in ("base", "images", "guest", "_base") if room in allowed(layer)]


def loaded_by(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_by("import pycloudlib; pycloudlib.Qemu")

    assert not loaded.intersection(HEAVY)


def test_placeholders_are_loaded_when_they_are_named() -> None:
    """Each alone: a program that names one does not pay for the others."""
    loaded = loaded_by("import pycloudlib; pycloudlib.Qemu") & MODULES.keys()
    named = loaded_by("from pycloudlib import EC2, Qemu") & MODULES.keys()

    assert "placeholders" not in {layer_of(name) for name in loaded}
    assert named - loaded == {
        "pycloudlib._otherclouds",
        "pycloudlib.ec2",
        "pycloudlib.ec2.cloud",
    }


def test_importing_the_package_alone_makes_its_modules_reachable() -> None:
    names = ("cloud", "config", "errors", "instance", "key", "result", "util")
    uses = "; ".join(f"pycloudlib.{name}" for name in names)

    assert {f"pycloudlib.{name}" for name in names} <= loaded_by(f"import pycloudlib; {uses}")


def test_importing_the_package_alone_loads_nothing_that_is_not_named() -> None:
    loaded = loaded_by("import pycloudlib") & MODULES.keys()

    assert loaded == {PACKAGE, f"{PACKAGE}._version"}


@pytest.mark.parametrize("name", ["guest", "images", "progress", "diagnosis", "qemu.instance"])
def test_other_modules_are_reachable_as_they_were(name: str) -> None:
    assert f"{PACKAGE}.{name}" in loaded_by(f"import pycloudlib; pycloudlib.{name}")


def test_command_on_a_kept_connection_loads_little() -> None:
    """Whoever runs `pycloudlib exec` waits for it."""
    loaded = loaded_by("from pycloudlib.cli import app, inside")

    assert not loaded.intersection({*HEAVY, "asyncio", "qemu.qmp"})
    assert not {name for name in loaded if name.startswith(f"{PACKAGE}.qemu.vm")}
    assert f"{PACKAGE}.qemu.cloud" not in loaded
