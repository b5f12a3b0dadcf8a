from __future__ import annotations

from pathlib import Path

import pytest

from pycloudlib.guest.hostkeys import MachineHostKeys, announced_host_keys

SUPPLIED = "ssh-ed25519 AAAAsupplied"
OTHER = "ssh-ed25519 AAAAother"
RSA = "ssh-rsa AAAArsa"


def announce(*keys: str) -> str:
    lines = "".join(f"{key} root@vm\r\n" for key in keys)
    return (
        "<14>Nov 23 12:00:00 cloud-init: ############\r\n"
        "<14>Nov 23 12:00:00 cloud-init: 256 SHA256:abc root@vm (ED25519)\r\n"
        "-----BEGIN SSH HOST KEY KEYS-----\r\n"
        f"{lines}"
        "-----END SSH HOST KEY KEYS-----\r\n"
        "[   12.345678] cloud-init[900]: Cloud-init v. 24.1 finished at Mon\r\n"
    )


@pytest.fixture
def keys(tmp_path: Path) -> MachineHostKeys:
    return MachineHostKeys(tmp_path / "known_hosts", tmp_path / "console.log")


def supply(keys: MachineHostKeys, key: str = SUPPLIED) -> None:
    keys.known_hosts.write_text(f"{key}\n")


def test_supplied_key_is_pinned(keys: MachineHostKeys) -> None:
    supply(keys)

    assert list(keys.pinned()) == [SUPPLIED]


def test_nothing_is_pinned_where_nothing_was_supplied(keys: MachineHostKeys) -> None:
    assert list(keys.pinned()) == []


def test_unknown_key_is_refused(keys: MachineHostKeys) -> None:
    supply(keys)

    assert not keys.accepts(OTHER)
    assert list(keys.pinned()) == [SUPPLIED]


@pytest.mark.parametrize("console", ["", "booting\n", announce(SUPPLIED, RSA)])
def test_key_that_the_console_does_not_tell_of_is_refused(
    console: str, keys: MachineHostKeys
) -> None:
    supply(keys)
    keys.console_log.write_text(console)

    assert not keys.accepts(OTHER)
    assert list(keys.pinned()) == [SUPPLIED]


def test_key_that_the_machine_announced_is_pinned_from_then_on(keys: MachineHostKeys) -> None:
    supply(keys)
    keys.console_log.write_text(announce(OTHER, RSA))

    assert keys.accepts(OTHER)
    assert OTHER in keys.pinned()
    keys.console_log.unlink()
    assert not keys.accepts(RSA)


def test_key_without_a_line_end_is_read(keys: MachineHostKeys) -> None:
    """As cloud-init prints a key that user-data gave without one."""
    supply(keys)
    keys.console_log.write_text(announce(OTHER).replace("root@vm\r\n-----END", "mine-----END"))

    assert keys.accepts(OTHER)


def test_announcement_after_gettys_prompt_is_read(keys: MachineHostKeys) -> None:
    supply(keys)
    prompt = "\r\nDebian GNU/Linux 12 vm ttyS0\r\n\r\nvm login: "
    keys.console_log.write_text(announce(OTHER).replace("-----BEGIN", f"{prompt}-----BEGIN"))

    assert keys.accepts(OTHER)


def test_what_is_typed_at_the_prompt_is_no_announcement(keys: MachineHostKeys) -> None:
    """Anybody on this host can connect to the console's port."""
    supply(keys)
    typed = announce(OTHER).replace("-----BEGIN", "vm login: -----BEGIN")
    typed = typed.replace(OTHER, f"vm login: {OTHER}").replace("-----END", "vm login: -----END")
    keys.console_log.write_text(typed)

    assert not keys.accepts(OTHER)


def test_key_elsewhere_on_the_console_is_not_an_announcement(keys: MachineHostKeys) -> None:
    supply(keys)
    keys.console_log.write_text(f"{OTHER} root@vm\n{announce(RSA)}{OTHER} root@vm\n")

    assert not keys.accepts(OTHER)


def test_first_key_seen_is_kept_where_none_was_supplied(keys: MachineHostKeys) -> None:
    assert keys.accepts(OTHER)
    assert list(keys.pinned()) == [OTHER]
    assert not keys.accepts(RSA)
    assert list(keys.pinned()) == [OTHER]


def test_rubbish_on_the_console_is_no_obstacle(keys: MachineHostKeys) -> None:
    supply(keys)
    keys.console_log.write_bytes(b"\xff\x00\x1b[0m" + announce(OTHER).encode())

    assert keys.accepts(OTHER)


def test_keys_are_given_without_their_comments() -> None:
    assert announced_host_keys(announce(OTHER, RSA)) == {OTHER, RSA}


def test_last_announcement_counts() -> None:
    assert announced_host_keys(announce(RSA) + announce(OTHER)) == {OTHER}


@pytest.mark.parametrize(
    "console",
    [
        "",
        "-----BEGIN SSH HOST KEY KEYS-----",
        f"-----BEGIN SSH HOST KEY KEYS-----\n{OTHER}",
        f"{OTHER}\n-----END SSH HOST KEY KEYS-----\n",
        f"-----END SSH HOST KEY KEYS-----\n{OTHER}\n-----BEGIN SSH HOST KEY KEYS-----\n",
    ],
)
def test_half_an_announcement_is_none(console: str) -> None:
    assert announced_host_keys(console) == set()
