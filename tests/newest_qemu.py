"""The newest QEMU that Debian has for this release, beside the installed one.

It is of the release's backports, unpacked into `build/newest-qemu` and not installed. apt-get
fetches it, and verifies it, with package lists of its own: nothing on the host changes. It stays
until `make clean`, so later runs need no network.

    python -m tests.newest_qemu     # fetch it, and print the path of its binary
"""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import ROOT

DIRECTORY = ROOT / "build" / "newest-qemu"
_PACKAGE = "qemu-system-x86"
_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_DEFAULT_MIRROR = "http://deb.debian.org/debian"
_LIMIT_SECONDS = 300


class UnavailableError(Exception):
    """There is none newer than the installed one, or it cannot be fetched; says why."""


def find_newest_qemu() -> Path:
    """Return the path of the newest QEMU's binary; fetch it if it is not there.

    Raises:
        UnavailableError: It cannot be had here.
    """
    binary = DIRECTORY / "qemu-system-x86_64"
    if not binary.exists():
        DIRECTORY.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=DIRECTORY.parent, prefix=".qemu-") as temporary:
            made = Path(temporary) / "made"
            _unpack(_fetch(Path(temporary)), made / "root")
            _write_wrapper(made / binary.name)
            try:
                made.rename(DIRECTORY)
            except OSError:  # another run was faster
                if not binary.exists():
                    raise
    _run(str(binary), "--version")
    return binary


def _fetch(directory: Path) -> list[Path]:
    """Download the packages that an upgrade of QEMU to the backports would install."""
    release = _read_release()
    suite = f"{release}-backports"
    sources = directory / "sources.list"
    mirror = _find_mirror()
    sources.write_text(
        "".join(f"deb [signed-by={_KEYS}] {mirror} {name} main\n" for name in (release, suite))
    )
    for needed in ("lists/partial", "cache/archives/partial", "packages"):
        (directory / needed).mkdir(parents=True)
    # fmt: off
    apt_get = [
        "apt-get", "--quiet",
        "-o", f"Dir::Etc::SourceList={sources}",
        "-o", "Dir::Etc::SourceParts=/dev/null",
        "-o", f"Dir::State::Lists={directory / 'lists'}",
        "-o", f"Dir::Cache={directory / 'cache'}",
        "-o", "APT::Update::Error-Mode=any",
        # As root, apt would fetch as a user who cannot write here.
        "-o", "APT::Sandbox::User=root",
        "-t", suite,
    ]
    # fmt: on
    _run(*apt_get, "update")
    planned = _run(*apt_get, "--simulate", "--no-install-recommends", "install", _PACKAGE)
    packages = dict(re.findall(r"^Inst (\S+) (?:\[\S+\] )?\((\S+) ", planned, re.MULTILINE))
    if _PACKAGE not in packages:
        raise UnavailableError(f"{suite} has no newer QEMU than the installed one")
    named = [f"{name}={version}" for name, version in packages.items()]
    _run(*apt_get, "download", *named, directory=directory / "packages")
    return list((directory / "packages").iterdir())


def _read_release() -> str:
    """Return the name of this host's Debian release."""
    try:
        about = platform.freedesktop_os_release()
    except OSError as error:
        raise UnavailableError(f"this is not known to be Debian: {error}") from error
    if about["ID"] != "debian" or "VERSION_CODENAME" not in about:
        raise UnavailableError(f"{about['PRETTY_NAME']} is not a release of Debian")
    return about["VERSION_CODENAME"]


def _find_mirror() -> str:
    """Return the mirror that this host gets QEMU from."""
    policy = _run("apt-cache", "policy", _PACKAGE)
    found = re.search(r" (https?://\S+/debian/?) \S+/main ", policy)
    return found[1] if found else _DEFAULT_MIRROR


def _unpack(packages: list[Path], root: Path) -> None:
    root.mkdir(parents=True)
    for package in packages:
        _run("dpkg-deb", "--extract", str(package), str(root))


def _write_wrapper(wrapper: Path) -> None:
    """Write a program that runs the unpacked QEMU, which looks for its files below /usr."""
    root = DIRECTORY / "root" / "usr"
    made = wrapper.parent / "root" / "usr"
    libraries = [
        DIRECTORY / directory.relative_to(wrapper.parent)
        for directory in sorted((made / "lib").glob("*-linux-gnu"))
    ]
    # fmt: off
    command = [
        "exec", f"{root}/bin/qemu-system-x86_64",
        "-L", f"{root}/share/qemu",
        "-L", f"{root}/share/seabios",
    ]
    # fmt: on
    lines = [
        "#!/bin/sh",
        f"export LD_LIBRARY_PATH={shlex.quote(':'.join(map(str, libraries)))}",
        f"export QEMU_MODULE_DIR={shlex.quote(':'.join(f'{path}/qemu' for path in libraries))}",
        f'{shlex.join(command)} "$@"',
    ]
    wrapper.write_text("".join(f"{line}\n" for line in lines))
    wrapper.chmod(0o755)


def _run(*command: str, directory: Path | None = None) -> str:
    """Run a program and return what it prints."""
    try:
        finished = subprocess.run(
            command,
            cwd=directory,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIMIT_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        # The first line names the cause; those after it name what came of that.
        words = str(error.stderr).strip().partition("\n")[0]
        raise UnavailableError(f"{command[0]} failed: {words}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(str(error)) from error
    return finished.stdout


if __name__ == "__main__":
    try:
        print(find_newest_qemu())
    except UnavailableError as unavailable:
        sys.exit(f"There is no newer QEMU: {unavailable}")
