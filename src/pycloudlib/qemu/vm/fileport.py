"""Files to and from the guest by the helper's port instead of SSH, where that is faster.

In emulation a byte costs the guest little on the port: there are no cipher, no TCP and no sshd in
between. The half of the copy in the guest runs as the login user. Where a helper runs, it lends its
port; otherwise SSH starts that half, which has `sudo` open the port.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Iterator
from contextlib import closing

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.documents import to_bytes
from pycloudlib.errors import CloudError
from pycloudlib.guest.access import portstream, sessions
from pycloudlib.guest.access.portstream import PortError, PortStream
from pycloudlib.guest.access.sessions import Connections
from pycloudlib.guest.helper import HelperError
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.vm.helper import LEAVING_LIMIT, HelperLink

_log = logging.getLogger(__name__)

# Bytes: SSH takes as long for them, in emulation, as Python and `sudo` take to start in the guest.
_LEAST = 6 << 20
# Bytes a second by SSH, in emulation.
_SSH_RATE = 7e6
_LONGEST_TURN = 60.0
# Seconds that the half in the guest may take to end.
_END_LIMIT = 3.0


class MachineFilePort:
    """The port of one machine; a `FilePort`.

    Args:
        link: The connection to the helper.
        connections: The SSH connections.
        user: The login user.
    """

    def __init__(self, link: HelperLink, connections: Connections, user: str) -> None:
        self._link = link
        self._connections = connections
        self._user = user

    @property
    def _is_emulated(self) -> bool:
        return self._link.machine.spec.accelerator is Accelerator.TCG

    @property
    def is_ready(self) -> bool:
        """Whether a helper has the port open, so that SSH is not needed; in emulation alone."""
        return self._is_emulated and self._link.expected

    def is_better(self, size: int) -> bool:
        """Whether a file of a size is copied sooner by it than by an open SSH connection.

        With KVM, SSH is as fast as the host's part of it, and nothing has to be started.
        """
        return self._is_emulated and not self._link.port_is_refused and size >= _LEAST

    @contextlib.contextmanager
    def copying(
        self, role: str, path: str, name: str = "", *, size: int = 0
    ) -> Iterator[PortStream | None]:
        """Run the half in the guest during the block; see `FilePort.copying`."""
        import paramiko  # noqa: PLC0415 - heavy

        argv = [role, path, name]
        turn = Deadline.after(min(size / _SSH_RATE, _LONGEST_TURN))
        way = self._by_helper if self._link.expected else self._by_ssh
        try:
            with way(argv, turn) as stream:
                yield stream
        except (PortError, HelperError) as error:
            raise paramiko.SSHException(f"the connection to the guest is lost: {error}") from error

    def _by_helper(
        self, argv: list[str], turn: Deadline
    ) -> contextlib.AbstractContextManager[PortStream | None]:
        return self._link.lend(portstream.program(), argv, self._user, turn)

    @contextlib.contextmanager
    def _by_ssh(self, argv: list[str], turn: Deadline) -> Iterator[PortStream | None]:
        import paramiko  # noqa: PLC0415 - heavy

        with contextlib.ExitStack() as stack:
            begun = None
            if stack.enter_context(self._link.free_port(turn)):
                try:
                    begun = self._start(argv, stack)
                except (PortError, CloudError, paramiko.SSHException) as error:
                    self._link.port_is_refused = True
                    _log.debug("%s: %s", self._link.machine.spec.name, error)
            if begun is None:
                stack.close()
                yield None
                return
            session, stream = begun
            yield stream
            stream.end()
            session.wait_for_end(_END_LIMIT)

    def _start(
        self, argv: list[str], stack: contextlib.ExitStack
    ) -> tuple[sessions.Session, PortStream]:
        session = stack.enter_context(self._connections.session())
        channel = session.channel
        # The half in the guest ends when the connection to the port does.
        stack.callback(session.wait_for_end, _END_LIMIT)
        sock = stack.enter_context(closing(self._link.connect(Deadline.after(LEAVING_LIMIT))))

        def check() -> None:
            if channel.closed or channel.status_event.is_set():
                raise PortError("the half of the copy in the guest has ended")

        stream = PortStream(sock, check)
        words = shlex.join(["python3", "-IS", "-c", portstream.program(), *argv, stream.token])
        with sessions.close_if_unanswered(channel, None):
            channel.exec_command(to_bytes(f"exec {words}"))
        stream.begin()
        return session, stream
