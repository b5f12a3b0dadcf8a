"""Who can log in to a guest, for when nobody can."""

from __future__ import annotations

import gzip

import pytest

from pycloudlib.guest.data.userdata import explain_logins, find_users

# As Debian's cloud-init 22.4.2 and 25.1.4 print it.
CONSOLE = (
    "[   71.1] cloud-init[498]: ci-info: no authorized SSH keys fingerprints found for user bob.",
    "vm-1 login: ci-info: ++++++++++Authorized keys from /home/eve/.ssh/authorized_keys for user "
    "eve++++++++++",
    "ci-info: +---------+-------------+---------+---------+",
)
MIME = b"""\
Content-Type: multipart/mixed; boundary="b"
MIME-Version: 1.0

--b
Content-Type: text/cloud-config

users: [{name: bob}]
--b
Content-Type: text/x-shellscript

#!/bin/sh
users: [nobody]
--b--
"""


@pytest.mark.parametrize(
    ("user_data", "users"),
    [
        (b"", None),
        (b"#cloud-config\nhostname: x\n", None),
        (b"#cloud-config\nusers: [{name: bob}]\n", ("bob",)),
        (b"#cloud-config\nusers: [default, {name: bob}, eve]\n", ("default", "bob", "eve")),
        (b"#cloud-config\nusers: []\n", ()),
        (b"#cloud-config\nusers: bob, eve\n", ("bob", "eve")),
        (b"#cloud-config\nusers: {bob: true, default: false}\n", ("bob",)),
        (b"#cloud-config\nusers: 5\n", ()),
        (b"#cloud-config\nusers: [{gecos: x}]\n", ("?",)),
        (b"#cloud-config-archive\n- 'users: [{name: bob}]'\n- 'users: [eve]'\n", ("bob", "eve")),
        (MIME, ("bob",)),
        (gzip.compress(b"#cloud-config\nusers: [bob]\n", mtime=0), ("bob",)),
        (b"#!/bin/sh\nusers: [bob]\n", None),
        (b"#cloud-config\nusers: [bob\n", None),
        (b"\x1f\x8bdamaged", None),
        (b"\xff\xfe\x00", None),
    ],
)
def test_users_are_found_in_user_data_of_every_kind(
    user_data: bytes, users: tuple[str, ...] | None
) -> None:
    assert find_users(user_data) == users


def test_missing_default_user_is_what_is_wrong() -> None:
    told = explain_logins(b"#cloud-config\nusers: [{name: bob}]\n", (), "ubuntu")
    assert "users are bob, without 'default'" in told
    assert "add 'default'" in told
    assert "username=" in told


def test_users_of_the_console_are_told() -> None:
    told = explain_logins(b"#cloud-config\nusers: [default, eve]\n", CONSOLE, "ubuntu")
    assert told == "on the console, cloud-init lists keys of eve and no keys of bob"


def test_user_is_asked_about_where_nothing_tells() -> None:
    assert "is alice the user who gets the key (username=)" in explain_logins(b"", (), "alice")
