"""An SSH server that lets one key in, and an SSH agent, both of the tests' own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL

from pycloudlib.guest.access.loginkey import pack, unpack

_HOST_KEY = paramiko.ECDSAKey.generate()


class _OneKey(paramiko.ServerInterface):
    def __init__(self, server: KeyServer) -> None:
        self._server = server

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self._server.tried.append(key.asbytes())
        return AUTH_SUCCESSFUL if key.asbytes() == self._server.key else AUTH_FAILED


class KeyServer:
    """A server that lets one key in.

    Attributes:
        port: Where it listens on the loopback.
        key: The public half in SSH's binary form.
        tried: The keys that were shown.
    """

    def __init__(self, listener: socket.socket, key: bytes) -> None:
        self.port: int = listener.getsockname()[1]
        self.key = key
        self.tried: list[bytes] = []
        self._listener = listener
        self._transports: list[paramiko.Transport] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _address = self._listener.accept()
                transport = paramiko.Transport(connection)
                transport.add_server_key(_HOST_KEY)
                transport.start_server(event=threading.Event(), server=_OneKey(self))
                self._transports.append(transport)

    def close(self) -> None:
        self._listener.close()
        for transport in self._transports:
            transport.close()


@contextlib.contextmanager
def serving(key: bytes) -> Iterator[KeyServer]:
    """Run a server for a test."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = KeyServer(listener, key)
        try:
            yield server
        finally:
            server.close()


class Agent:
    """An agent that holds keys, and behaves as it is told.

    Attributes:
        path: Its socket.
        keys: Private keys by their public halves in SSH's binary form.
        manner: `good`, `locked`, `refuses`, `hangs`, `hangs signing`, `garbage` or `hangs up`.
        asked: The numbers of the requests that came.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: dict[bytes, Any] = {}
        self.manner = "good"
        self.asked: list[int] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._held: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for connection in self._held:
            connection.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _address = self._listener.accept()
                self._held.append(connection)
                threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while header := connection.recv(4):
                request = connection.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL)
                self.asked.append(request[0])
                if self.manner == "hangs" or (self.manner == "hangs signing" and request[0] == 13):
                    threading.Event().wait(20)
                    return
                if self.manner == "hangs up":
                    return
                connection.sendall(pack(self._answer(request)))

    def _answer(self, request: bytes) -> bytes:
        if self.manner == "garbage":
            return bytes([12]) + b"\0\0\0\1\xff\xff\xff\xff"
        if request[0] == 11:
            keys = {} if self.manner == "locked" else self.keys
            listed = b"".join(pack(public) + pack(b"a comment") for public in keys)
            return bytes([12]) + len(keys).to_bytes(4, "big") + listed
        public, data = list(unpack(request[1:-4]))
        key = self.keys.get(public)
        if key is None or self.manner in ("refuses", "locked"):
            return bytes([5])
        return bytes([14]) + pack(_sign(key, data, int.from_bytes(request[-4:], "big")))


def _sign(key: Any, data: bytes, flags: int) -> bytes:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return pack(b"ssh-ed25519") + pack(key.sign(data))
    assert isinstance(key, rsa.RSAPrivateKey)
    name, algorithm = {
        0: (b"ssh-rsa", hashes.SHA1()),
        2: (b"rsa-sha2-256", hashes.SHA256()),
        4: (b"rsa-sha2-512", hashes.SHA512()),
    }[flags]
    return pack(name) + pack(key.sign(data, padding.PKCS1v15(), algorithm))
