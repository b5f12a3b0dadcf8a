"""The user's SSH agent: asked for one key, with a limit in time, and believed what it proves.

The protocol is the one of draft-ietf-sshm-ssh-agent. `paramiko` speaks it, too, but waits for an
agent that hangs without an end.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

from pycloudlib.deadline import Deadline
from pycloudlib.descriptors import make_socket

_FAILURE, _LIST, _LISTED, _SIGN, _SIGNED = 5, 11, 12, 13, 14
_RSA_HASHES = {"rsa-sha2-256": 2, "rsa-sha2-512": 4}
_LIST_LIMIT = 5.0
# The agent may ask its user first, who may have to touch a token.
_SIGN_LIMIT = 30.0
_LONGEST_ANSWER = 1 << 20


class AgentError(Exception):
    """The agent is of no help; the message goes on a sentence that begins with "the SSH agent"."""


def pack(data: bytes) -> bytes:
    """Write a byte string as SSH does (RFC 4251, section 5)."""
    return struct.pack(">I", len(data)) + data


def unpack(data: bytes) -> Iterator[bytes]:
    """Read the byte strings that data consists of.

    Raises:
        ValueError: It consists of something else.
    """
    while data:
        length = int.from_bytes(data[:4], "big")
        if len(data) < 4 + length:
            raise ValueError("it is cut off")
        yield data[4 : 4 + length]
        data = data[4 + length :]


def check_holds(public: bytes) -> None:
    """Make sure that the agent holds the private half of a key.

    Args:
        public: The public half in SSH's binary form.

    Raises:
        AgentError: It does not, or cannot be asked; says why.
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
        AgentError: It did not; says why.
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
