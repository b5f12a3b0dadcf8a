from __future__ import annotations

import gzip
import json
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path

import pytest
import yaml

from pycloudlib.guest.hostkeys import (
    MachineHostKeys,
    announced_host_keys,
    configured_host_keys,
)
from pycloudlib.guest.seed import build_seed, write_iso

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
    return MachineHostKeys(
        tmp_path / "known_hosts", tmp_path / "console.log", tmp_path / "seed.iso"
    )


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


CONFIG = {
    "ssh_keys": {"ed25519_private": "secret\n", "ed25519_public": f"{OTHER} root@vm"},
    "ssh_authorized_keys": ["ssh-ed25519 AAAAlogin me"],
}
YAML = "#cloud-config\n" + yaml.safe_dump(CONFIG)


def make_mime(content: str) -> str:
    document = MIMEMultipart()
    document.attach(MIMEText("#!/bin/sh\n", "x-shellscript"))
    document.attach(MIMEText(content, "cloud-config"))
    return document.as_string()


KINDS: dict[str, str | bytes] = {
    "cloud-config": YAML,
    "JSON": "#cloud-config\n" + json.dumps(CONFIG),
    "quoted": f"#cloud-config\nssh_keys: {{'ed25519_public' : \"{OTHER}\"}}\n",
    "folded": "#cloud-config\nssh_keys:\n  ed25519_public: >-\n    " + OTHER.replace(" ", "\n    "),
    "anchors": "#cloud-config\nkey: &key " + OTHER + "\nssh_keys: {rsa_public: *key}\n",
    "archive": "#cloud-config-archive\n"
    + yaml.safe_dump([{"type": "text/cloud-config", "content": YAML}]),
    "jinja": "## template: jinja\n" + YAML,
    "MIME": make_mime(YAML),
    "gzip": gzip.compress(YAML.encode()),
    "gzip of MIME": gzip.compress(make_mime(YAML).encode()),
}


@pytest.mark.parametrize("user_data", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("document", ["user_data", "vendor_data"])
def test_key_in_the_seed_is_pinned_also_when_the_console_lost_it(
    document: str, user_data: str | bytes, keys: MachineHostKeys
) -> None:
    supply(keys)
    keys.console_log.write_text(f"-----BEGIN SSH HOST KEY KEYS-----\n{OTHER[:14]}\nvm login: ")
    seed = build_seed(
        instance_id="iid",
        hostname="vm",
        public_key="ssh-ed25519 AAAA me",
        host_key=("private\n", SUPPLIED),
        **{document: user_data},  # type: ignore[arg-type]
    )
    write_iso(seed, keys.seed)

    assert not keys.accepts("ssh-ed25519 AAAAlogin"), "that is no host key"
    assert keys.accepts(OTHER)
    assert list(keys.pinned()) == [OTHER]


SCRIPT_WITH_KEY = f"#!/bin/sh\nssh_keys: {{ed25519_public: {OTHER}}}\n"
COMMENT = f"#cloud-config\n# ssh_keys: {{ed25519_public: {OTHER}}}\na: 1\n"
FILE = "#cloud-config\n" + yaml.safe_dump({"write_files": [{"path": "/x", "content": YAML}]})


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"#!/bin/sh\n",
        b"\xff\xfe",
        b"#cloud-config\nssh_keys: [1, 2]\n",
        b"#cloud-config\nssh_keys: {ed25519_private: secret}\n",
        b"## template: jinja\n#cloud-config\n{% if v1.region %}\nssh_keys: {}\n{% endif %}\n",
        *(text.encode() for text in (SCRIPT_WITH_KEY, COMMENT, FILE)),
        gzip.compress(YAML.encode())[:-9],
    ],
)
def test_document_without_host_keys_has_none(document: bytes) -> None:
    assert configured_host_keys(document, "user-data") == set()


def test_keys_of_other_parts_are_found_beside_a_template() -> None:
    document = MIMEMultipart()
    document.attach(MIMEText("## template: jinja\n#cloud-config\n{% if %}: {", "cloud-config"))
    document.attach(MIMEText(YAML, "cloud-config"))
    assert configured_host_keys(document.as_bytes(), "user-data") == {OTHER}


def test_damaged_seed_tells_of_no_keys(
    keys: MachineHostKeys, caplog: pytest.LogCaptureFixture
) -> None:
    supply(keys)
    keys.seed.write_bytes(b"no volume")
    assert not keys.accepts(OTHER)
    assert str(keys.seed) in caplog.text
