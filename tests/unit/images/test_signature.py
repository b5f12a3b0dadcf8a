from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from pycloudlib.errors import ImageVerificationError, MissingPrerequisiteError
from pycloudlib.images.source import (
    TrustedKeys,
    dearmor_keys,
    load_trusted_keys,
    verify_clearsigned,
    verify_detached,
)
from tests.unit.imageserver import SigningKey, new_signing_key

DATA = Path(__file__).parent / "data"
SUMS = (DATA / "noble-SHA256SUMS").read_bytes()
SIGNATURE = (DATA / "noble-SHA256SUMS.gpg").read_bytes()
UBUNTU_KEYS = {
    "4A3CE3CD565D7EB5C810E2B97FF3F408476CF100",
    "D2EB44626FDDC30B513D5BB71A5D6C4C7DB87C81",
}


@pytest.fixture(scope="module")
def stranger() -> Iterator[SigningKey]:
    with new_signing_key() as made:
        yield made


@pytest.fixture
def keyring(key: SigningKey, tmp_path: Path) -> Path:
    return key.write_keyring(tmp_path / "keyring.asc")


def test_really_published_checksums_verify() -> None:
    verify_detached(SUMS, SIGNATURE, load_trusted_keys(), "SHA256SUMS")


@pytest.mark.parametrize("place", [0, 1, 63, 64, 4000, len(SUMS) - 2, len(SUMS) - 1])
def test_published_checksums_do_not_verify_once_a_byte_is_changed(place: int) -> None:
    changed = bytearray(SUMS)
    changed[place] ^= 1
    with pytest.raises(ImageVerificationError, match="SHA256SUMS"):
        verify_detached(bytes(changed), SIGNATURE, load_trusted_keys(), "SHA256SUMS")


@pytest.mark.parametrize("changed", [SUMS[:-1], SUMS + b"\n", b"\n" + SUMS, b""])
def test_published_checksums_do_not_verify_longer_or_shorter(changed: bytes) -> None:
    with pytest.raises(ImageVerificationError):
        verify_detached(changed, SIGNATURE, load_trusted_keys(), "SHA256SUMS")


@pytest.mark.parametrize("place", [100, 400, 700])
def test_published_checksums_do_not_verify_with_a_changed_signature(place: int) -> None:
    changed = bytearray(SIGNATURE)
    changed[place] = ord("A") if changed[place] != ord("A") else ord("B")
    with pytest.raises(ImageVerificationError):
        verify_detached(SUMS, bytes(changed), load_trusted_keys(), "SHA256SUMS")


@pytest.mark.parametrize("place", [4, 8, 9, 20, 100, 300, 520])
def test_published_checksums_do_not_verify_with_a_changed_key(place: int) -> None:
    whole = load_trusted_keys().packets
    published = resources.files("pycloudlib.images") / "keys/uec-image-automatic-signing-key.asc"
    begin = whole.index(dearmor_keys(published.read_bytes()))
    # The first packet is the key itself (RFC 9580, 5.5.2): its time, its algorithm, its numbers.
    changed = bytearray(whole)
    changed[begin + place] ^= 1
    with pytest.raises(ImageVerificationError):
        verify_detached(SUMS, SIGNATURE, TrustedKeys("changed", bytes(changed)), "SHA256SUMS")


@pytest.mark.parametrize("signature", [b"", b"<html>Log in</html>", SIGNATURE[:200]])
def test_what_is_no_signature_is_refused(signature: bytes) -> None:
    with pytest.raises(ImageVerificationError, match="SHA256SUMS"):
        verify_detached(SUMS, signature, load_trusted_keys(), "SHA256SUMS")


def test_exactly_the_two_ubuntu_keys_are_trusted(tmp_path: Path) -> None:
    keyring = tmp_path / "keyring.gpg"
    keyring.write_bytes(load_trusted_keys().packets)
    listed = subprocess.run(
        ["gpg", "--homedir", tmp_path, "--with-colons", "--show-keys", keyring],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    # The subkeys (encryption only) have fingerprints, too; each stands after its own "sub".
    lines = listed.splitlines()
    primary = {
        after.split(":")[9] for line, after in itertools.pairwise(lines) if line.startswith("pub:")
    }
    assert primary == UBUNTU_KEYS


def test_published_checksums_do_not_verify_with_other_keys(keyring: Path) -> None:
    with pytest.raises(ImageVerificationError, match=r"keyring\.asc"):
        verify_detached(SUMS, SIGNATURE, load_trusted_keys(keyring), "SHA256SUMS")


def test_dearmored_keys_are_the_binary_keys(key: SigningKey, stranger: SigningKey) -> None:
    assert dearmor_keys(key.armored) == key.binary
    assert dearmor_keys(b"note\n" + key.armored + stranger.armored) == key.binary + stranger.binary
    with_header = key.armored.replace(b"BLOCK-----\n\n", b"BLOCK-----\nVersion: 1: x\n\n", 1)
    assert dearmor_keys(with_header) == key.binary
    assert dearmor_keys(key.armored.replace(b"\n", b"\r\n")) == key.binary
    assert dearmor_keys(b"nothing") == b""


@pytest.mark.parametrize("form", ["armored", "binary"])
def test_keyring_may_be_armored_or_binary(key: SigningKey, tmp_path: Path, form: str) -> None:
    keyring = tmp_path / "keyring"
    keyring.write_bytes(getattr(key, form))
    keys = load_trusted_keys(keyring)
    verify_detached(b"content", key.sign_detached(b"content"), keys, "content")


@pytest.mark.parametrize("content", [b"", b"no key", b"\n", b"-----BEGIN PGP SIGNATURE-----\n"])
def test_keyring_without_keys_is_refused(tmp_path: Path, content: bytes) -> None:
    keyring = tmp_path / "keyring"
    keyring.write_bytes(content)
    with pytest.raises(ValueError, match=f"{keyring} holds no OpenPGP public key"):
        load_trusted_keys(keyring)


def test_damaged_keyring_is_refused(key: SigningKey, tmp_path: Path) -> None:
    keyring = tmp_path / "keyring"
    keyring.write_bytes(key.armored.replace(b"m", b"?"))
    with pytest.raises(ValueError, match=f"{keyring} is damaged"):
        load_trusted_keys(keyring)


def test_missing_keyring_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_trusted_keys(tmp_path / "nowhere")


def test_clear_signed_text_is_given(key: SigningKey, keyring: Path) -> None:
    text = b'{\n "dash": "- -----",\n- at the start\n}\n'
    assert verify_clearsigned(key.sign_clear(text), load_trusted_keys(keyring), "here") == text


def test_text_around_the_signed_one_is_not_given(key: SigningKey, keyring: Path) -> None:
    message = b"forged\n" + key.sign_clear(b"genuine\n") + b"forged\n"
    assert verify_clearsigned(message, load_trusted_keys(keyring), "here") == b"genuine\n"


def test_changed_clear_signed_text_is_refused(key: SigningKey, keyring: Path) -> None:
    message = key.sign_clear(b"genuine\n").replace(b"genuine", b"Genuine")
    with pytest.raises(ImageVerificationError, match=r"^http://here has no good signature"):
        verify_clearsigned(message, load_trusted_keys(keyring), "http://here")


def test_clear_signed_text_of_a_stranger_is_refused(stranger: SigningKey, keyring: Path) -> None:
    with pytest.raises(ImageVerificationError, match="public key"):
        verify_clearsigned(stranger.sign_clear(b"text\n"), load_trusted_keys(keyring), "here")


@pytest.mark.parametrize("message", [b"", b"{}\n", b"<html>Log in</html>\n"])
def test_text_without_signature_is_refused(keyring: Path, message: bytes) -> None:
    with pytest.raises(ImageVerificationError):
        verify_clearsigned(message, load_trusted_keys(keyring), "here")


def test_two_messages_in_one_are_refused(key: SigningKey, keyring: Path) -> None:
    message = key.sign_clear(b"one\n") + key.sign_clear(b"two\n")
    with pytest.raises(ImageVerificationError):
        verify_clearsigned(message, load_trusted_keys(keyring), "here")


@pytest.mark.parametrize("form", ["sign_clear", "sign_inline"])
def test_another_signed_text_is_no_detached_signature(
    key: SigningKey, keyring: Path, form: str
) -> None:
    # It is signed by a trusted key; but not the content beside it.
    elsewhere = getattr(key, form)(b"genuine\n")
    with pytest.raises(ImageVerificationError):
        verify_detached(b"forged\n", elsewhere, load_trusted_keys(keyring), "here")


def test_signature_of_an_expired_key_is_refused(tmp_path: Path) -> None:
    with new_signing_key(faked_time="20200101T000000!", expires="1w") as expired:
        keys = load_trusted_keys(expired.write_keyring(tmp_path / "keyring"))
        with pytest.raises(ImageVerificationError, match="EXPKEYSIG"):
            verify_clearsigned(expired.sign_clear(b"text\n"), keys, "here")


def test_the_users_own_gnupg_home_is_neither_read_nor_made(
    stranger: SigningKey, keyring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "gnupg"
    home.mkdir()
    (home / "trustedkeys.gpg").write_bytes(stranger.binary)
    monkeypatch.setenv("GNUPGHOME", str(home))
    with pytest.raises(ImageVerificationError):
        verify_clearsigned(stranger.sign_clear(b"text\n"), load_trusted_keys(keyring), "here")
    monkeypatch.setenv("GNUPGHOME", str(tmp_path / "none"))
    verify_detached(SUMS, SIGNATURE, load_trusted_keys(), "SHA256SUMS")
    assert not (tmp_path / "none").exists()


def test_missing_gpgv_is_told_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_arguments, **_options: None)
    with pytest.raises(MissingPrerequisiteError, match="install the package 'gpgv'"):
        verify_detached(SUMS, SIGNATURE, load_trusted_keys(), "SHA256SUMS")
