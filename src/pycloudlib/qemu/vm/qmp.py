"""QMP as a synchronous, thread-safe interface.

`qemu.qmp`, the QEMU project's own client, is asyncio: one hidden loop in one thread runs all of its
sessions. A caller may have an event loop of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pycloudlib._base.documents import safe_repr
from pycloudlib._base.files import keep_standard_streams_free
from pycloudlib.errors import CloudError

# asyncio and qemu.qmp are most of what an import of this package would cost: only a machine that
# runs needs them.
if TYPE_CHECKING:
    import asyncio

    from qemu.qmp import QMPClient

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_STOP_LIMIT = 2.0
# QEMU keeps this with a descriptor that it was lent, so that another program knows what is ours.
_FOR_A_MOMENT = "pycloudlib: for a moment"
_CLIENT_LOG = logging.getLogger(f"{__name__}.client")
_CLIENT_LOG.setLevel(logging.CRITICAL)


class QmpError(CloudError):
    """QEMU refused a QMP command, or could not be reached."""


@dataclass(frozen=True, slots=True)
class Event:
    """A QMP event.

    Attributes:
        name: QEMU's name for it (`SHUTDOWN`, `RESET`, `BLOCK_IO_ERROR` …).
        data: Its data.
        timestamp: When it happened, in seconds since the epoch.
    """

    name: str
    data: Mapping[str, Any]
    timestamp: float


class LoopThread:
    """The thread that runs the asyncio loop; made at its first use, once in a process."""

    _lock = threading.Lock()
    _instance: LoopThread | None = None

    def __init__(self) -> None:
        import asyncio  # noqa: PLC0415 - heavy

        with keep_standard_streams_free():
            self.loop = asyncio.new_event_loop()
        self.sessions: set[QmpSession] = set()
        self._thread = threading.Thread(
            target=self.loop.run_forever, name="pycloudlib-qmp", daemon=True
        )
        try:
            self._thread.start()
        except BaseException:
            self.loop.close()
            raise

    @classmethod
    def get(cls) -> LoopThread:
        """Return this process's thread; a forked child gets one of its own."""
        with cls._lock:
            if cls._instance is None:
                cls._instance = cls()
            return cls._instance

    def run(self, coroutine: Coroutine[Any, Any, _T], timeout: float) -> _T:
        """Run a coroutine to its end.

        Raises:
            TimeoutError: It took longer than `timeout` seconds; it is cancelled.
        """
        import asyncio  # noqa: PLC0415 - heavy
        import concurrent.futures  # noqa: PLC0415 - heavy

        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError(f"no answer within {timeout:g} s") from None
        except BaseException:
            future.cancel()
            raise

    def watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        """Call back, once and in this thread, when a file descriptor becomes readable."""

        def fire() -> None:
            self.loop.remove_reader(descriptor)
            callback()

        self.loop.call_soon_threadsafe(self.loop.add_reader, descriptor, fire)

    def end_sessions(self) -> None:
        """End the sessions that are open; others may still be opened."""
        import asyncio  # noqa: PLC0415 - heavy

        async def end_sessions() -> None:
            # A session that is cancelled in the middle would complain on stderr.
            ends = [asyncio.ensure_future(session.disconnect()) for session in self.sessions]
            if ends:
                await asyncio.wait(ends, timeout=_STOP_LIMIT)

        with contextlib.suppress(TimeoutError):
            self.run(end_sessions(), 2 * _STOP_LIMIT)

    def forget(self, process: object, descriptor: int) -> None:
        """Stop watching a descriptor; its owner is kept until that has happened."""

        def remove(_owner: object) -> None:
            self.loop.remove_reader(descriptor)

        self.loop.call_soon_threadsafe(remove, process)


def _end_sessions() -> None:
    """End the sessions before the interpreter ends; the machines run on.

    A program's exit handlers that were registered earlier run later. So the loop keeps running and
    reports processes that end; a handler that needs a QEMU opens a session.
    """
    thread = LoopThread._instance
    if thread is not None:
        thread.end_sessions()


def _forget_parents_thread() -> None:
    # Threads do not survive a fork, and another thread may have held the lock at that moment.
    LoopThread._lock = threading.Lock()
    LoopThread._instance = None


atexit.register(_end_sessions)
os.register_at_fork(after_in_child=_forget_parents_thread)


@dataclass(frozen=True, slots=True)
class Lent:
    """A file descriptor that QEMU was lent.

    Attributes:
        fdset: The set of descriptors of one file that contains it.
        number: Its number in QEMU's process.
    """

    fdset: int
    number: int

    @property
    def path(self) -> str:
        """The path by which QEMU opens the file."""
        return f"/dev/fdset/{self.fdset}"


class QmpSession:
    """One QMP session with a running QEMU."""

    def __init__(self, client: QMPClient, events: asyncio.Task[None], thread: LoopThread) -> None:
        self._client = client
        self._events = events
        self._thread = thread
        self._ending = False
        thread.sessions.add(self)

    @property
    def ended(self) -> bool:
        """Whether it has ended, or is just ending."""
        return self._ending

    @classmethod
    def open(
        cls,
        sock: socket.socket,
        on_event: Callable[[Event], None],
        timeout: float,
    ) -> QmpSession:
        """Connect and negotiate.

        Args:
            sock: A connected socket.
            on_event: Called with each event, in the loop's thread.
            timeout: Seconds that QEMU may take to answer.

        Raises:
            QmpError: QEMU closed the connection, did not answer, or is not QEMU.
        """
        import asyncio  # noqa: PLC0415 - heavy

        from qemu.qmp import QMPClient  # noqa: PLC0415 - heavy

        thread = LoopThread.get()

        async def connect() -> QmpSession:
            client = QMPClient("pycloudlib")
            # It would log each lost connection as an error, which here is how a machine ends.
            client.logger = _CLIENT_LOG
            await client.connect(sock)
            return cls(client, asyncio.ensure_future(_deliver(client, on_event)), thread)

        with _translated("No QMP session"):
            return thread.run(connect(), timeout)

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 30
    ) -> Any:
        """Execute a QMP command.

        Args:
            command: Its name (`query-status` …).
            arguments: Its arguments.
            timeout: Seconds it may take.

        Returns:
            What the command returns, as JSON values.

        Raises:
            QmpError: QEMU refused it, is gone, or did not answer in time.
        """
        _log.debug("QMP %s %s", command, arguments or {})
        _check_is_text(command, arguments)
        with _translated(f"QEMU did not carry out {command}"):
            return self._thread.run(
                self._client.execute(command, dict(arguments) if arguments else None), timeout
            )

    def send_descriptor(self, name: str, descriptor: int) -> None:
        """Send QEMU a file descriptor, to be named in the next commands of this session.

        Raises:
            QmpError: QEMU is gone, or did not take it.
        """

        async def send() -> None:
            # Sent with one byte of the stream; `getfd` takes the one that came last.
            self._client.send_fd_scm(descriptor)
            await self._client.execute("getfd", {"fdname": name})

        with _translated("QEMU did not take a file descriptor"):
            self._thread.run(send(), 30)

    def lend(self, descriptor: int, fdset: int | None = None, *, keep: bool = False) -> Lent:
        """Lend QEMU a file descriptor, by which it opens the file.

        Args:
            descriptor: The descriptor.
            fdset: QEMU's set of descriptors of the same file to which it is added; None for a new
                one. QEMU uses the one that is open in the mode that it needs.
            keep: Whether `take_back_all` leaves it with QEMU.

        Raises:
            QmpError: QEMU is gone, or did not take it.
        """

        async def send() -> Lent:
            self._client.send_fd_scm(descriptor)
            arguments: dict[str, Any] = {} if fdset is None else {"fdset-id": fdset}
            if not keep:
                arguments["opaque"] = _FOR_A_MOMENT
            answer: Any = await self._client.execute("add-fd", arguments)
            return Lent(answer["fdset-id"], answer["fd"])

        with _translated("QEMU did not take a file descriptor"):
            return self._thread.run(send(), 30)

    def take_back(self, lent: Lent) -> None:
        """Have QEMU close a descriptor that it was lent; what it has opened by that stays open.

        Before version 9, QEMU closes none while the machine is paused: see `take_back_all`.
        """
        with contextlib.suppress(QmpError):
            self.execute("remove-fd", {"fdset-id": lent.fdset, "fd": lent.number})

    def take_back_all(self) -> None:
        """Have QEMU close what it still has of all that any program has lent it for a moment."""
        with contextlib.suppress(QmpError):
            for fdset in self.execute("query-fdsets"):
                for lent in fdset["fds"]:
                    if lent.get("opaque") == _FOR_A_MOMENT:
                        self.take_back(Lent(fdset["fdset-id"], lent["fd"]))

    def close(self) -> None:
        """End the session; QEMU runs on."""
        with contextlib.suppress(TimeoutError):
            self._thread.run(self.disconnect(), _STOP_LIMIT)

    def close_soon(self) -> None:
        """End the session without waiting for it, from any thread."""
        loop = self._thread.loop
        loop.call_soon_threadsafe(lambda: loop.create_task(self.disconnect()))

    async def disconnect(self) -> None:
        """End the session, within the loop's thread, unless it is ending already."""
        from qemu.qmp import QMPError  # noqa: PLC0415 - heavy

        if self._ending:
            return
        self._ending = True
        try:
            with contextlib.suppress(QMPError, OSError, EOFError):
                await self._client.disconnect()
        finally:
            self._events.cancel()
            self._thread.sessions.discard(self)


def _check_is_text(command: str, arguments: Mapping[str, Any] | None) -> None:
    """Raise QmpError for arguments that are not text: QEMU would end the session."""
    try:
        json.dumps(arguments, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise QmpError(
            f"{command} cannot be sent by QMP: {safe_repr(arguments)} is not text"
        ) from error


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Translate the library's errors into ours."""
    from qemu.qmp import QMPError  # noqa: PLC0415 - heavy

    try:
        yield
    except (QMPError, OSError) as error:
        raise QmpError(f"{what}: {error}") from error


async def _deliver(client: QMPClient, on_event: Callable[[Event], None]) -> None:
    async for message in client.events:
        try:
            event = parse_event(message)
        except ValueError as error:
            # Others follow, which may be waited for.
            _log.warning("An event of QEMU cannot be read: %s", error)
        else:
            on_event(event)


def parse_event(message: Mapping[str, Any]) -> Event:
    """Read an event as QEMU sends it; raise ValueError if it is none."""
    try:
        stamp = message["timestamp"]
        seconds = stamp["seconds"] + stamp["microseconds"] / 1e6
        name, data = message["event"], message.get("data", {})
        if not (isinstance(name, str) and isinstance(data, Mapping) and math.isfinite(seconds)):
            raise TypeError("a name, data and a time are expected")
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{safe_repr(message)} is not an event ({error!r})") from error
    return Event(name, data, seconds)
