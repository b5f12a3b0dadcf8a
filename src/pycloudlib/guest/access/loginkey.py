"""The key to log in with: checked before anything boots, in a file or in an SSH agent."""

from __future__ import annotations

import base64
import io
import os
import shlex
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import make_socket
from pycloudlib.errors import InvalidKeyError
from pycloudlib.key import KeyPair

if TYPE_CHECKING:
    import paramiko

_MAGIC = b"openssh-key-v1\0"
_OPENSSH = b"-----BEGIN OPENSSH PRIVATE KEY-----"
_OPENSSH_END = b"-----END OPENSSH PRIVATE KEY-----"
_LEAST_RSA_BITS = 1024  # sshd_config(5), RequiredRSASize
_DSA = "a DSA key, which no SSH server accepts any more"
# Signed to try an agent. It cannot be a request to log in, which begins differently.
_TRIAL = b"pycloudlib looks whether this agent signs"
# The SSH agent's protocol.
_LIST, _LISTED, _SIGN, _SIGNED = 11, 12, 13, 14
_RSA_HASHES = {"rsa-sha2-256": 2, "rsa-sha2-512": 4}
_LIST_LIMIT = 5.0
# The agent may ask its user first, who may have to touch a token.
_SIGN_LIMIT = 30.0
_LONGEST_ANSWER = 1 << 20


class AgentError(Exception):
    """The agent cannot help; the message continues "the SSH agent …"."""


@dataclass(frozen=True, slots=True)
class PublicHalf:
    """The public half of a key.

    Attributes:
        kind: Its type, such as `ssh-ed25519`.
        blob: The key in SSH's binary form.
    """

    kind: str
    blob: bytes


def check(key_pair: KeyPair, origin: str, *, private: bool = True) -> None:
    """Check, by a look at its files, that a key can be used.

    The agent is asked for a private half that is not in a file.

    Args:
        key_pair: The key.
        origin: Where its paths come from, for the error.
        private: Whether the private half is checked, too.

    Raises:
        InvalidKeyError: It cannot; names the file, what it is, what to do, and `origin`.
    """
    with _from(origin):
        public = _read_public(key_pair)
        if private and _read_private(key_pair, public) is None:
            _ask_agent(key_pair, public)


def prove(key_pair: KeyPair, origin: str) -> None:
    """Check that a key can be used, by using it: load it, or have the agent sign.

    Args:
        key_pair: The key.
        origin: Where its paths come from, for the error.

    Raises:
        InvalidKeyError: It cannot; names the file, what it is, what to do, and `origin`.
    """
    with _from(origin):
        public = _read_public(key_pair)
        secret = _read_private(key_pair, public)
        if secret is None:
            _ask_agent(key_pair, public, trial=True)
        else:
            _load(key_pair, secret, public)


def open_key(public_key_path: str | None, private_key_path: str) -> paramiko.PKey:
    """Open a key to log in with: from its file, or by the agent if it is not in a file.

    Args:
        public_key_path: The public half; by default beside the private one.
        private_key_path: The private half.

    Raises:
        InvalidKeyError: It cannot be used; names the file, what it is and what to do.
    """
    pair = KeyPair(public_key_path or f"{private_key_path}.pub", private_key_path, "login")
    private = Path(private_key_path)
    # A file alone is enough to log in.
    public = None
    if public_key_path is not None or not private.exists():
        public = _read_public(pair)
    secret = _read_private(pair, public)
    if secret is not None:
        return _open_file(_load(pair, secret, public))
    public = public or _read_public(pair)
    _ask_agent(pair, public)
    return _open_agent(public)


@contextmanager
def _from(origin: str) -> Iterator[None]:
    try:
        yield
    except InvalidKeyError as error:
        raise InvalidKeyError(f"{origin}: {error}") from error.__cause__


def _read_public(key_pair: KeyPair) -> PublicHalf:
    path = Path(str(key_pair.public_key_path))
    try:
        text = path.read_bytes()
    except (OSError, ValueError) as error:
        raise InvalidKeyError(f"cannot read the public key {str(path)!r}: {error}") from error
    quoted = shlex.quote(str(path))
    if b"PRIVATE KEY" in text:
        raise InvalidKeyError(f"{str(path)!r} is a private key, and the public one is wanted")
    if b"BEGIN SSH2 PUBLIC KEY" in text:
        raise InvalidKeyError(
            f"{str(path)!r} is a public key in the form of RFC 4716, and OpenSSH's is wanted: "
            f"ssh-keygen -i -f {quoted}"
        )
    if b"BEGIN PUBLIC KEY" in text or b"BEGIN RSA PUBLIC KEY" in text:
        raise InvalidKeyError(
            f"{str(path)!r} is a public key in PEM form, and OpenSSH's is wanted: "
            f"ssh-keygen -i -m {'PKCS8' if b'BEGIN PUBLIC' in text else 'PEM'} -f {quoted}"
        )
    public = _parse_public(text)
    if public is None:
        raise InvalidKeyError(
            f"{str(path)!r} is not an OpenSSH public key (one line: type, key, comment)"
        )
    if "-cert-v" in public.kind:
        raise InvalidKeyError(
            f"{str(path)!r} is a certificate, which machines do not know the authority of: let "
            "public_key_path name the plain public key"
        )
    if public.kind == "ssh-dss":
        raise _unusable(path, _DSA)
    return public


def _parse_public(text: bytes) -> PublicHalf | None:
    """Read a line `type base64 …`, with the same type named inside (RFC 4253, 6.6)."""
    words = text.split()
    if len(words) < 2 or b"\n" in text.strip():
        return None
    try:
        blob = base64.b64decode(words[1], validate=True)
        kind = next(unpack(blob), b"")
        return PublicHalf(kind.decode("ascii"), blob) if kind == words[0] else None
    except ValueError:
        return None


def _read_private(key_pair: KeyPair, public: PublicHalf | None) -> bytes | None:
    """Read the private half; None if only an agent can use it: with a passphrase, on a token."""
    path = Path(str(key_pair.private_key_path))
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InvalidKeyError(f"cannot read the private key {str(path)!r}: {error}") from error
    quoted = shlex.quote(str(path))
    if text.startswith(b"PuTTY-User-Key-File"):
        raise InvalidKeyError(
            f"{str(path)!r} is a key of PuTTY's: puttygen {quoted} -O private-openssh -o FILE"
        )
    if b"BEGIN DSA PRIVATE KEY" in text:
        raise _unusable(path, _DSA)
    if b"PRIVATE KEY-----" not in text:
        what = "is a public key" if _parse_public(text) else "is not a private key"
        raise InvalidKeyError(f"{str(path)!r} {what}, and a private key is wanted")
    if _OPENSSH not in text:
        return None if b"ENCRYPTED" in text else text
    cipher, inside = _parse_openssh(path, text)
    if public is not None and inside != public.blob:
        raise _mismatch(key_pair)
    return text if cipher == b"none" and not inside[4:].startswith(b"sk-") else None


def _parse_openssh(path: Path, text: bytes) -> tuple[bytes, bytes]:
    """Read what is plain in OpenSSH's form: the cipher and the public half (PROTOCOL.key)."""
    try:
        body = text.partition(_OPENSSH)[2].partition(_OPENSSH_END)[0]
        blob = base64.b64decode(b"".join(body.split()), validate=True)
        if not blob.startswith(_MAGIC):
            raise ValueError("it begins otherwise")
        parts = unpack(blob.removeprefix(_MAGIC))
        cipher, _kdf, _options = (next(parts) for _ in range(3))
        at = len(_MAGIC) + sum(4 + len(part) for part in (cipher, _kdf, _options)) + 4
        return cipher, next(unpack(blob[at:]))
    except (ValueError, StopIteration, RuntimeError) as error:
        raise _is_damaged(path, error) from error


def _unusable(path: Path, what: str) -> InvalidKeyError:
    return InvalidKeyError(f"{str(path)!r} is {what}: make another, ssh-keygen -t ed25519")


def _is_damaged(path: Path, error: Exception) -> InvalidKeyError:
    return InvalidKeyError(
        f"the private key {str(path)!r} is damaged, or of a form that is not known "
        f"({error or 'it is cut off'}): ssh-keygen -y -f {shlex.quote(str(path))} says more"
    )


def _mismatch(key_pair: KeyPair) -> InvalidKeyError:
    private = shlex.quote(str(key_pair.private_key_path))
    return InvalidKeyError(
        f"{key_pair.public_key_path!r} and {key_pair.private_key_path!r} are halves of different "
        f"keys: ssh-keygen -y -f {private} prints the public half of the latter"
    )


def _load(key_pair: KeyPair, secret: bytes, public: PublicHalf | None) -> Any:
    """Load a private key, in any form that needs no passphrase."""
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - heavy
    from cryptography.hazmat.primitives import serialization as form  # noqa: PLC0415 - heavy
    from cryptography.hazmat.primitives.asymmetric import (  # noqa: PLC0415 - heavy
        dsa,
        ec,
        ed25519,
        rsa,
    )

    path = Path(str(key_pair.private_key_path))
    load = form.load_ssh_private_key if _OPENSSH in secret else form.load_pem_private_key
    try:
        try:
            # The public half shows whether the numbers of an RSA key are right.
            key = load(secret, None, unsafe_skip_rsa_key_validation=True)
        except TypeError:
            # Older versions of the library lack the option, and take half a second.
            key = load(secret, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _is_damaged(path, error) from error
    if isinstance(key, dsa.DSAPrivateKey):
        raise _unusable(path, _DSA)
    known = isinstance(key, (ed25519.Ed25519PrivateKey, rsa.RSAPrivateKey)) or (
        isinstance(key, ec.EllipticCurvePrivateKey)
        and isinstance(key.curve, (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1))
    )
    if not known:
        kind = type(key).__name__.lstrip("_").removesuffix("PrivateKey")
        curve = f" on the curve {key.curve.name}" if hasattr(key, "curve") else ""
        raise _unusable(path, f"a key ({kind}{curve}) that SSH does not know")
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size < _LEAST_RSA_BITS:
        raise _unusable(path, f"an RSA key of {key.key_size} bits, which SSH servers refuse")
    if public is not None:
        line = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
        if _parse_public(line) != public:
            raise _mismatch(key_pair)
    return key


def _ask_agent(key_pair: KeyPair, public: PublicHalf, *, trial: bool = False) -> None:
    path = Path(str(key_pair.private_key_path))
    try:
        check_holds(public.blob)
        if trial:
            sign(public.blob, _TRIAL, "rsa-sha2-256")
    except AgentError as error:
        if path.exists():
            why = f"the private key {str(path)!r} takes a passphrase or a token, and"
            remedy = f"ssh-add {shlex.quote(str(path))}"
        else:
            why = f"there is no private key {str(path)!r}, and"
            remedy = "let private_key_path name it, or ssh-add it"
        raise InvalidKeyError(f"{why} the SSH agent {error}: {remedy}") from error


def _open_file(key: Any) -> paramiko.PKey:
    import paramiko  # noqa: PLC0415 - heavy
    from cryptography.hazmat.primitives import serialization as form  # noqa: PLC0415 - heavy
    from cryptography.hazmat.primitives.asymmetric import ec, rsa  # noqa: PLC0415 - heavy

    if isinstance(key, rsa.RSAPrivateKey):
        return paramiko.RSAKey(key=key)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return paramiko.ECDSAKey(vals=(key, key.public_key()))
    text = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
    return paramiko.Ed25519Key(file_obj=io.StringIO(text.decode()))


def _open_agent(public: PublicHalf) -> paramiko.PKey:
    import paramiko  # noqa: PLC0415 - heavy

    class AgentKey(paramiko.PKey):
        """A key whose signatures the agent makes."""

        public_blob = None

        def asbytes(self) -> bytes:
            return public.blob

        def get_name(self) -> str:
            return public.kind

        def can_sign(self) -> bool:
            return True

        def sign_ssh_data(self, data: bytes, algorithm: str | None = None) -> paramiko.Message:
            try:
                signature = sign(public.blob, data, algorithm or "")
            except AgentError as error:
                raise paramiko.SSHException(f"the SSH agent {error}") from error
            return paramiko.Message(signature)

    return AgentKey()


def pack(data: bytes) -> bytes:
    """Write a byte string as SSH does (RFC 4251, section 5)."""
    return struct.pack(">I", len(data)) + data


def unpack(data: bytes) -> Iterator[bytes]:
    """Yield the byte strings that data consists of.

    Raises:
        ValueError: It does not consist of such.
    """
    while data:
        length = int.from_bytes(data[:4], "big")
        if len(data) < 4 + length:
            raise ValueError("it is cut off")
        yield data[4 : 4 + length]
        data = data[4 + length :]


def check_holds(public: bytes) -> None:
    """Check that the agent holds the private half of a key.

    Args:
        public: The public half in SSH's binary form.

    Raises:
        AgentError: It does not, or cannot be asked; gives the reason.
    """
    kind, answer = _ask(bytes([_LIST]), _LIST_LIMIT)
    if kind != _LISTED:
        raise AgentError("does not list its keys")
    try:
        keys = list(unpack(answer[4:]))[::2]
    except ValueError as error:
        raise AgentError(f"gave an answer that cannot be read: {error}") from error
    if not keys:
        raise AgentError("holds no key, or is locked")
    if public not in keys:
        raise AgentError(f"does not hold it (but {len(keys)} others)")


def sign(public: bytes, data: bytes, algorithm: str = "") -> bytes:
    """Have the agent sign data with a key; returns the signature in SSH's form.

    Args:
        public: The public half of the key in SSH's binary form.
        data: What is signed.
        algorithm: The name of the signature's algorithm, where the key has several.

    Raises:
        AgentError: It did not; gives the reason.
    """
    flags = struct.pack(">I", _RSA_HASHES.get(algorithm, 0))
    kind, answer = _ask(bytes([_SIGN]) + pack(public) + pack(data) + flags, _SIGN_LIMIT)
    if kind != _SIGNED:
        raise AgentError("refuses to sign with it")
    try:
        [signature] = unpack(answer)
    except ValueError as error:
        raise AgentError(f"gave a signature that cannot be read: {error}") from error
    return signature


def _ask(request: bytes, seconds: float) -> tuple[int, bytes]:
    path = os.environ.get("SSH_AUTH_SOCK")
    if not path:
        raise AgentError("is not there ($SSH_AUTH_SOCK is not set)")
    deadline = Deadline.after(seconds)
    try:
        with make_socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            connection.connect(path)
            connection.sendall(pack(request))
            length = int.from_bytes(_receive(connection, 4, deadline), "big")
            if not 0 < length <= _LONGEST_ANSWER:
                raise AgentError(f"at {path} is something else")
            answer = _receive(connection, length, deadline)
    except TimeoutError:
        raise AgentError(f"at {path} did not answer within {seconds:.0f} s") from None
    except OSError as error:
        raise AgentError(f"at {path} cannot be asked: {error.strerror or error}") from error
    return answer[0], answer[1:]


def _receive(connection: socket.socket, length: int, deadline: Deadline) -> bytes:
    data = b""
    while len(data) < length:
        connection.settimeout(max(deadline.remaining, 0.001))
        chunk = connection.recv(length - len(data))
        if not chunk:
            raise ConnectionError("it hung up")
        data += chunk
    return data
