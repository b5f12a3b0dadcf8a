"""The SSH key pair a cloud logs in with."""

from __future__ import annotations

import getpass
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pycloudlib._base.files import copy_private, expand_user, write_private
from pycloudlib.errors import UnsetSSHKeyError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    _PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

_RSA_BITS = 3072  # ssh-keygen(1), since OpenSSH 8.0


class KeyPair:
    """Where the two halves of an SSH key are.

    Args:
        public_key_path: The public key file; None for no key at all.
        private_key_path: The private key file; by default the public one's path without `.pub`.
        name: The key's name; by default the login name of this process's user.

    Attributes:
        public_key_path: The public key file's path.
        private_key_path: The private key file's path.
        name: The key's name.
    """

    def __init__(
        self,
        public_key_path: str | Path | None,
        private_key_path: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        self.public_key_path = None if public_key_path is None else _expand(public_key_path)
        if private_key_path is not None:
            self.private_key_path: str | None = _expand(private_key_path)
        elif self.public_key_path is not None:
            self.private_key_path = self.public_key_path.removesuffix(".pub")
        else:
            self.private_key_path = None
        self.name = name or login_name()

    def __repr__(self) -> str:
        return (
            f"KeyPair({self.public_key_path!r}, private_key_path={self.private_key_path!r}, "
            f"name={self.name!r})"
        )

    @property
    def public_key_content(self) -> str:
        """The content of the public key file, with its line end.

        Raises:
            UnsetSSHKeyError: No key is set.
            OSError: The file cannot be read.
        """
        if self.public_key_path is None:
            raise UnsetSSHKeyError
        # The key is ASCII, its comment may be in any encoding.
        return Path(self.public_key_path).read_text(encoding="utf-8", errors="replace")

    @property
    def public_key_line(self) -> str:
        """The public key, one line without its line end.

        Raises:
            UnsetSSHKeyError: No key is set.
            OSError: The file cannot be read.
        """
        return self.public_key_content.strip()


def login_name() -> str:
    """Return the name of this process's user; the number of one without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        return str(os.getuid())


def _expand(path: str | Path) -> str:
    return str(expand_user(path))


def generate_key_pair(directory: Path, name: str) -> KeyPair:
    """Make an ed25519 key pair in a directory, the private half readable by its owner alone."""
    private_path = directory / "id_ed25519"
    public_path = directory / "id_ed25519.pub"
    private_text, public_text = generate_ed25519(comment=name)
    write_private(private_path, private_text)
    write_private(public_path, public_text + "\n")
    return KeyPair(public_path, private_path, name)


def copy_kept_file(path: str | None, kept: Path, target: Path) -> str | None:
    """Copy a key's file from one directory to another, unless it is the user's own elsewhere.

    Args:
        path: The file; None for none.
        kept: The directory of keys that are copied.
        target: The other directory.

    Returns:
        The path of the copy, or `path` of a key that is elsewhere.
    """
    if path is None or Path(path).parent != kept:
        return path
    copy = target / Path(path).name
    copy_private(Path(path), copy)
    return str(copy)


def generate_ed25519(comment: str) -> tuple[str, str]:
    """Make an ed25519 key.

    Returns:
        The private key in OpenSSH's format and the public key's line.
    """
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415 - heavy

    return _write_key(ed25519.Ed25519PrivateKey.generate(), comment)


def generate_ecdsa(comment: str) -> tuple[str, str]:
    """Make an ECDSA key on `ssh-keygen`'s default curve; see `generate_ed25519`."""
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 - heavy

    return _write_key(ec.generate_private_key(ec.SECP256R1()), comment)


def generate_rsa(comment: str, bits: int = _RSA_BITS) -> tuple[str, str]:
    """Make an RSA key of `ssh-keygen`'s default length, which takes up to a second."""
    from cryptography.hazmat.primitives.asymmetric import rsa  # noqa: PLC0415 - heavy

    return _write_key(rsa.generate_private_key(65537, bits), comment)


def _write_key(key: _PrivateKey, comment: str) -> tuple[str, str]:
    from cryptography.hazmat.primitives import serialization as form  # noqa: PLC0415 - heavy

    private = key.private_bytes(
        form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption()
    ).decode()
    public = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    return private, f"{public.decode()} {comment}".rstrip()
