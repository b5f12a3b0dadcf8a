"""QMP behind a synchronous, thread-safe face.

`qemu.qmp`, the QEMU project's own client, is asyncio: one loop in one thread of ours runs all of
its sessions, and nobody else sees it. A caller with a running event loop of its own may call us.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError
from qemu.qmp.protocol import ConnectError

from pycloudlib.errors import CloudError

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

# The library logs every lost connection as an error; here that is how each machine ends.
logging.getLogger("qemu.qmp.protocol").setLevel(logging.CRITICAL)


class QmpError(CloudError):
    """QEMU refused a QMP command, or could not be talked to."""


@dataclass(frozen=True, slots=True)
class Event:
    """A QMP event.

    Attributes:
        name: QEMU's name of it (`SHUTDOWN`, `RESET`, `BLOCK_IO_ERROR` …).
        data: What comes with it.
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
        self.loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._thread = threading.Thread(
            target=self.loop.run_forever, name="pycloudlib-qmp", daemon=True
        )
        self._thread.start()

    @classmethod
    def get(cls) -> LoopThread:
        """Give this process's thread; a forked child gets one of its own."""
        with cls._lock:
            if cls._instance is None or cls._instance._pid != os.getpid():
                cls._instance = cls()
            return cls._instance

    def run(self, coroutine: Coroutine[Any, Any, _T], timeout: float) -> _T:
        """Run a coroutine to its end.

        Raises:
            TimeoutError: It took longer than `timeout` seconds; it is cancelled.
        """
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


class QmpSession:
    """One QMP session with a running QEMU."""

    def __init__(self, client: QMPClient, events: asyncio.Task[None]) -> None:
        self._client = client
        self._events = events

    @classmethod
    def open(
        cls,
        address: socket.socket | str,
        on_event: Callable[[Event], None],
        timeout: float,
    ) -> QmpSession:
        """Connect and negotiate.

        Args:
            address: A connected socket, or the path of a listening one.
            on_event: Called with each event, in the loop's thread.
            timeout: Seconds that QEMU may take to answer.

        Raises:
            QmpError: QEMU closed the connection, did not answer, or is not QEMU.
        """

        async def connect() -> QmpSession:
            client = QMPClient("pycloudlib")
            await client.connect(address)
            return cls(client, asyncio.ensure_future(_deliver(client, on_event)))

        try:
            return LoopThread.get().run(connect(), timeout)
        except (ConnectError, QMPError, OSError) as error:
            raise QmpError(f"No QMP session: {error}") from error

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
        try:
            return LoopThread.get().run(
                self._client.execute(command, dict(arguments) if arguments else None), timeout
            )
        except ExecuteError as error:
            raise QmpError(f"QEMU refused {command}: {error}") from error
        except (QMPError, OSError) as error:
            raise QmpError(f"{command} got no answer from QEMU: {error}") from error

    def close(self) -> None:
        """End the session; QEMU runs on."""
        with contextlib.suppress(TimeoutError):
            LoopThread.get().run(self._disconnect(), 5)

    def close_soon(self) -> None:
        """End the session, from within the loop's thread."""
        self._closing = asyncio.ensure_future(self._disconnect())

    async def _disconnect(self) -> None:
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()
        self._events.cancel()


async def _deliver(client: QMPClient, on_event: Callable[[Event], None]) -> None:
    async for message in client.events:
        on_event(_parse_event(message))


def _parse_event(message: Mapping[str, Any]) -> Event:
    stamp = message["timestamp"]
    seconds = stamp["seconds"] + stamp["microseconds"] / 1e6
    return Event(str(message["event"]), message.get("data", {}), seconds)
