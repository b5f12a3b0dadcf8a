"""What programs of the host get of this process's environment."""

from __future__ import annotations

import os

import pytest

from pycloudlib._base.tools import environment


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "QEMU_MODULE_DIR",
        "XDG_RUNTIME_DIR",
        "XDG_CONFIG_HOME",
        "XDG_DATA_DIRS",
        "WAYLAND_DISPLAY",
        "QEMU_AUDIO_DRV",
        "QEMU_PA_SERVER",
        "GTK_THEME",
        "LIBGL_ALWAYS_SOFTWARE",
        "SSL_CERT_FILE",
        "LOCALE_ARCHIVE",
        "NIX_LD",
        "NIX_LD_LIBRARY_PATH",
    ],
)
def test_what_a_program_needs_is_passed_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "a")
    assert environment() == {name: "a"}


@pytest.mark.parametrize(
    "name",
    [
        "GITHUB_TOKEN",
        "CI_JOB_TOKEN",
        "SSH_AUTH_SOCK",
        "AWS_SECRET_ACCESS_KEY",
        "PATH_TOKEN",
        "MY_LC_ALL",
        "NIX_CONFIG",
        "QEMU_TOKEN",
        "XDG_SESSION_ID",
        "PYTHONPATH",
        "PYCLOUDLIB_OWNER",
    ],
)
def test_all_else_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "a")
    assert environment() == environment(downloads=True) == {}


@pytest.mark.parametrize("name", ["https_proxy", "HTTP_PROXY", "no_proxy", "APT_CONFIG"])
def test_proxies_are_for_those_that_fetch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://me:secret@proxy")
    assert environment() == {}
    assert environment(downloads=True) == {name: "http://me:secret@proxy"}
