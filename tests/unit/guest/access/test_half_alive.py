"""Servers that are there and do not answer: each wait for one ends when its time is over."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko
import pytest

from pycloudlib._base.deadline import Deadline
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest.access import commands, sessions, ssh
from pycloudlib.guest.access.commands import interrupt_when
from pycloudlib.key import KeyPair
from tests.unit.public.test_base_classes import Instance
from tests.unit.sshserver import LocalInstance

# Whatever takes longer hangs; a limit of a test is a fraction of a second.
HANGS = 30.0
BANNER = b"SSH-2.0-half_alive\r\n"
# RFC 4253, 11.2: ignored by whoever receives it; before any key, in the clear.
IGNORED = bytes([0, 0, 0, 12, 6, 2, 0, 0, 0, 0]) + bytes(6)

Says = Callable[[socket.socket], None]


def _says(*chunks: bytes) -> Says:
    def say(connection: socket.socket) -> None:
        for chunk in chunks:
            connection.sendall(chunk)

    return say


def _repeats(first: bytes, chunk: bytes, pause: float) -> Says:
    def say(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(chunk)
            time.sleep(pause)

    return say


class _Deliberating(paramiko.ServerInterface):
    """Never decides who may log in."""

    def __init__(self) -> None:
        self.decided = threading.Event()

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self.decided.wait(HANGS)
        return paramiko.common.AUTH_FAILED


HOST_KEY = paramiko.ECDSAKey.generate()


def _deliberates(connection: socket.socket) -> None:
    transport = paramiko.Transport(connection)
    transport.add_server_key(HOST_KEY)
    transport.start_server(event=threading.Event(), server=_Deliberating())


HALF_ALIVE: dict[str, Says] = {
    "nothing": _says(),
    "one letter": _says(b"S"),
    "a banner without an end": _says(b"SSH-2.0-x"),
    "a banner in single bytes, for ever": _repeats(b"SSH-", b"x", 0.02),
    "a banner and nothing more": _says(BANNER),
    "a banner and half a packet": _says(BANNER, IGNORED[:5]),
    "packets that say nothing, for ever": _repeats(BANNER, IGNORED, 0.02),
    "a key exchange and no login": _deliberates,
}
NO_SERVER: dict[str, Says] = {
    "lines of a greeting, for ever": _repeats(b"", b"hello\r\n", 0),
    "a line without an end": _repeats(b"SSH-", b"x" * 1000, 0),
    "another protocol": _says(b"220 mail ready\r\n"),
}


def _packet(payload: bytes) -> bytes:
    """A packet in the clear (RFC 4253, 6)."""
    padding = 12 - (1 + len(payload)) % 8
    return struct.pack(">IB", 1 + len(payload) + padding, padding) + payload + bytes(padding)


def _key_exchange() -> bytes:
    message = paramiko.Message()
    message.add_bytes(bytes([20]) + bytes(16))
    for names in ("curve25519-sha256@libssh.org", "ssh-ed25519", *2 * ("aes128-ctr",)):
        message.add_string(names)
    for names in (*2 * ("hmac-sha2-256",), *2 * ("none",), "", ""):
        message.add_string(names)
    message.add_bytes(bytes(5))
    return message.asbytes()


def _key_reply(host_key: bytes, shared: bytes) -> bytes:
    message = paramiko.Message()
    message.add_byte(bytes([31]))
    for part in (host_key, shared, b""):
        message.add_string(part)
    return message.asbytes()


# Its text has to be UTF-8.
DISCONNECT = bytes([1, 0, 0, 0, 2, 0, 0, 0, 1]) + b"\xff"
NO_SSH: dict[str, Says] = {
    "an empty packet": _says(BANNER, struct.pack(">IB", 12, 11) + bytes(11)),
    "names that are no text": _says(BANNER, _packet(bytes([20]) + bytes(19) + b"\1\xff")),
    "a goodbye that is no text": _says(BANNER, _packet(_key_exchange()), _packet(DISCONNECT)),
    "a key exchange that is cut off": _says(
        BANNER, _packet(_key_exchange()), _packet(_key_reply(b"", b""))
    ),
    "a host key that is none": _says(
        BANNER,
        _packet(_key_exchange()),
        _packet(_key_reply(b"\0\0\0\x0bssh-ed25519\0\0\0\1x", b"\x09" + bytes(31))),
    ),
}


@pytest.fixture
def serve() -> Iterator[Callable[[Says], int]]:
    """A function that starts a server, and returns its port."""
    with contextlib.ExitStack() as stack:

        def start(says: Says) -> int:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            stack.callback(listener.shutdown, socket.SHUT_RDWR)

            def accept() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        connection = listener.accept()[0]
                        stack.callback(connection.close)
                        threading.Thread(target=talk, args=(connection,), daemon=True).start()

            def talk(connection: socket.socket) -> None:
                with contextlib.suppress(OSError):
                    says(connection)

            threading.Thread(target=accept, daemon=True).start()
            port: int = listener.getsockname()[1]
            return port

        yield start


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    """A key to log in with."""
    private = tmp_path_factory.mktemp("key") / "id"
    made = paramiko.ECDSAKey.generate()
    made.write_private_key_file(str(private))
    public = private.with_suffix(".pub")
    public.write_text(f"{made.get_name()} {made.get_base64()}\n", encoding="ascii")
    return KeyPair(str(public), str(private), "test")


def _endpoint(port: int, key: KeyPair) -> ssh.Endpoint:
    private, public = key.private_key_path, key.public_key_path
    return ssh.Endpoint("127.0.0.1", port, "ubuntu", private, public)


@pytest.mark.parametrize("says", HALF_ALIVE.values(), ids=HALF_ALIVE)
def test_login_ends_at_its_deadline(serve: Callable[[Says], int], says: Says, key: KeyPair) -> None:
    begun = time.monotonic()
    endpoint = _endpoint(serve(says), key)
    with pytest.raises(paramiko.SSHException) as caught:
        ssh.connect(endpoint, None, banner_timeout=20, deadline=Deadline.after(0.3))
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert time.monotonic() - begun < HANGS


@pytest.mark.parametrize("says", NO_SERVER.values(), ids=NO_SERVER)
def test_other_servers_are_told_at_once(
    serve: Callable[[Says], int], says: Says, key: KeyPair
) -> None:
    with pytest.raises(paramiko.SSHException, match="not an SSH server"):
        ssh.connect(_endpoint(serve(says), key), None, banner_timeout=2 * HANGS)


@pytest.mark.parametrize("says", NO_SSH.values(), ids=NO_SSH)
def test_messages_that_are_none_are_errors_of_ssh(
    serve: Callable[[Says], int], says: Says, key: KeyPair
) -> None:
    with pytest.raises(paramiko.SSHException, match="what the server sent is not SSH") as caught:
        ssh.connect(_endpoint(serve(says), key), None, banner_timeout=2 * HANGS)
    assert not isinstance(caught.value.__cause__, paramiko.SSHException)


def test_messages_that_are_none_are_errors_of_ssh_after_the_login(tmp_path: Path) -> None:
    machine = LocalInstance(tmp_path)
    with contextlib.closing(machine):
        client = machine._ssh_connect()
        transport = machine.transports[0]

        def answer(*_request: object) -> int:
            transport._send_message(paramiko.Message(DISCONNECT))  # type: ignore[attr-defined]
            return paramiko.common.OPEN_SUCCEEDED

        transport.server_object.check_channel_request = answer  # type: ignore[union-attr, method-assign]
        with pytest.raises(paramiko.SSHException, match="what the server sent is not SSH"):
            sessions.open_session(client)


@pytest.mark.parametrize("says", [HALF_ALIVE["one letter"], HALF_ALIVE["a banner without an end"]])
def test_part_of_a_banner_costs_no_processor(serve: Callable[[Says], int], says: Says) -> None:
    used = time.thread_time()
    with pytest.raises(TimeoutError, match="alone"):
        ssh.open_with_banner("127.0.0.1", serve(says), 0.5)
    assert time.thread_time() - used < 0.25


def test_banner_that_comes_in_pieces_is_left_unread(serve: Callable[[Says], int]) -> None:
    def slow(connection: socket.socket) -> None:
        for byte in BANNER:
            connection.sendall(bytes([byte]))
            time.sleep(0.001)

    with ssh.open_with_banner("127.0.0.1", serve(slow), HANGS) as connection:
        assert connection.recv(100) == BANNER


def test_server_that_hangs_up_in_its_banner_is_told_at_once(serve: Callable[[Says], int]) -> None:
    def leaves(connection: socket.socket) -> None:
        connection.sendall(b"SSH-2")
        connection.shutdown(socket.SHUT_WR)

    with pytest.raises(ConnectionError, match="closed before SSH's banner"):
        ssh.open_with_banner("127.0.0.1", serve(leaves), 2 * HANGS)


class _Machine(Instance):
    """A machine whose SSH server is a test's."""

    def __init__(self, port: int, key: KeyPair) -> None:
        super().__init__(key)
        self.port = str(port)

    @property
    def ip(self) -> str:
        return "127.0.0.1"


@pytest.mark.parametrize("says", HALF_ALIVE.values(), ids=HALF_ALIVE)
def test_limit_of_a_command_bounds_connecting(
    serve: Callable[[Says], int], says: Says, key: KeyPair
) -> None:
    machine = _Machine(serve(says), key)
    begun = time.monotonic()
    with pytest.raises(PycloudlibTimeoutError, match=r"within 0\.3 s"):
        machine.execute("true", timeout=0.3)
    assert time.monotonic() - begun < HANGS


@pytest.mark.parametrize("says", HALF_ALIVE.values(), ids=HALF_ALIVE)
def test_limit_of_a_wait_bounds_connecting(
    serve: Callable[[Says], int], says: Says, key: KeyPair
) -> None:
    machine = _Machine(serve(says), key)
    begun = time.monotonic()
    with pytest.raises(PycloudlibTimeoutError, match="could not be reached"):
        machine.wait(ready_timeout=0.3 / 60)
    assert time.monotonic() - begun < HANGS


def test_wait_of_a_block_ends_with_its_machine() -> None:
    hung_up = threading.Event()

    def check() -> None:
        raise PycloudlibTimeoutError("it is gone")

    def wait() -> None:
        assert hung_up.wait(HANGS)
        raise OSError("closed")

    with (
        pytest.raises(PycloudlibTimeoutError, match="it is gone"),
        interrupt_when(check, hung_up.set),
    ):
        wait()


def test_block_that_nothing_ends_is_left_alone() -> None:
    with pytest.raises(OSError, match="its own"), interrupt_when(lambda: None, pytest.fail):
        raise OSError("its own")


def test_command_whose_status_never_comes_is_not_waited_for(tmp_path: Path) -> None:
    """Its server has ended both outputs, and tells of no end."""
    looks = []

    def check() -> None:
        looks.append(1)
        if len(looks) > 1:
            raise PycloudlibTimeoutError("it is gone")

    machine = LocalInstance(tmp_path)
    with contextlib.closing(machine), machine._ssh_connect() as client:
        channel = sessions.open_session(client)
        channel.exec_command = lambda command: channel.event.set()  # type: ignore[method-assign]
        channel.in_buffer.close()
        channel.in_stderr_buffer.close()
        with pytest.raises(PycloudlibTimeoutError, match="it is gone"):
            commands.stream(channel, "true", stdout=len, stderr=len, on_wait=check)
        deadline = Deadline.after(0.1)
        with pytest.raises(PycloudlibTimeoutError, match=r"within 0\.1 s"):
            commands.stream(channel, "true", stdout=len, stderr=len, deadline=deadline)
