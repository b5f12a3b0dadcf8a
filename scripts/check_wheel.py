"""Check the wheel as a user gets it: what is in it, and that it works without the checkout.

python -m scripts.check_wheel dist/*.whl
"""

from __future__ import annotations

import argparse
import email.parser
import re
import sys
import zipfile
from pathlib import Path

from packaging.specifiers import SpecifierSet

from pycloudlib import __version__
from scripts.wheel_install import Installation, open_installation

SOURCE = Path(__file__).resolve().parent.parent / "src"
CLIENTS_PIN = ">=1!10.0.2,<1!12"
SIZE_LIMIT = 60_000_000
SIGNING_KEYS = ("ubuntu-cloud-image-builder.asc", "uec-image-automatic-signing-key.asc")


class Checks:
    """Tells each check and remembers whether all went well."""

    def __init__(self) -> None:
        self.failed = False

    def check(self, what: str, passed: bool, seen: object = "") -> None:
        """Tell a check; what was seen instead is told when it failed."""
        self.failed |= not passed
        print(f"  ok      {what}" if passed else f"  FAILED  {what}: {seen}")


def check_content(checks: Checks, wheel: Path) -> None:
    """Look into the archive."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(metadata_name).decode())
    information = metadata_name.partition("/")[0]
    files = {name for name in names if not name.startswith(f"{information}/")}
    expected = {
        str(file.relative_to(SOURCE))
        for file in SOURCE.rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    checks.check("it holds the package's files and no others", files == expected, files ^ expected)
    tests = [name for name in files if re.search(r"(^|/)(tests/|test_|conftest)", name)]
    checks.check("no tests are in it", not tests, tests)
    checks.check("py.typed is in it", "pycloudlib/py.typed" in files)
    keys = {f"pycloudlib/images/keys/{name}" for name in SIGNING_KEYS}
    checks.check("the keys of Ubuntu's images are in it", keys <= files, keys - files)
    checks.check("its licence is in it", f"{information}/licenses/LICENSE" in names, names)
    version = str(metadata["Version"])
    checks.check(f"its version is {__version__}", version == __version__, version)
    pin = SpecifierSet(CLIENTS_PIN)
    checks.check(f"programs that ask for {CLIENTS_PIN} accept it", version in pin, version)


def check_installation(checks: Checks, installation: Installation) -> None:
    """Use what was installed, away from the checkout."""
    where = installation.run(
        "import pycloudlib; from pycloudlib import Qemu; print(pycloudlib.__file__)"
    )
    inside = Path(where).is_relative_to(installation.site_packages)
    checks.check("`from pycloudlib import Qemu` works, from the installation", inside, where)
    versions = installation.run(
        "import importlib.metadata, pycloudlib;"
        "print({pycloudlib.__version__, importlib.metadata.version('pycloudlib')})"
    )
    checks.check("it tells that version itself", versions == str({__version__}), versions)
    command = str(installation.python.parent / "pycloudlib")
    told = installation.run(
        f"import subprocess; print(subprocess.check_output([{command!r}, '--version'], text=True))"
    )
    checks.check("the command `pycloudlib` is there", __version__ in told, told)
    plugins = installation.run(
        "from importlib.metadata import entry_points;"
        "print(*(entry.value for entry in entry_points(group='pytest11')))"
    )
    found = "pycloudlib.pytest_plugin.plugin" in plugins.split()
    checks.check("pytest finds the plugin", found, plugins)
    trusted = installation.run(
        "from pycloudlib.images.source import load_trusted_keys;"
        "print(len(load_trusted_keys().packets))"
    )
    checks.check("the keys of Ubuntu's images can be read", int(trusted) > 0, trusted)
    size = installation.size
    checks.check(
        f"with all dependencies it takes {size / 1e6:.1f} MB, less than {SIZE_LIMIT / 1e6:.0f}",
        size < SIZE_LIMIT,
        size,
    )


def main() -> int:
    """Read the command line and check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    wheel: Path = parser.parse_args().wheel
    print(f"Checking {wheel}")
    checks = Checks()
    check_content(checks, wheel)
    with open_installation(wheel) as installation:
        check_installation(checks, installation)
    return int(checks.failed)


if __name__ == "__main__":
    sys.exit(main())
