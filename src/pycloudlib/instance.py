"""The base class of instances: what every machine that is reached by SSH can do; no QEMU in it."""

from __future__ import annotations

import contextlib
import logging
import shlex
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pycloudlib._base.deadline import (
    Deadline,
    command_limit,
    current_deadline,
    positive,
    use_deadline,
)
from pycloudlib.errors import GuestRefusedError
from pycloudlib.guest.access import commands, filecopy, ssh
from pycloudlib.guest.access.portstream import FilePort
from pycloudlib.guest.access.sessions import Connections
from pycloudlib.guest.boot.readiness import (
    DEFAULT_READY_MINUTES,
    Readiness,
    ready_limit,
)
from pycloudlib.key import KeyPair
from pycloudlib.progress import ProgressCallback, ignore_progress
from pycloudlib.result import Result
from pycloudlib.util import raise_cleanup_errors

if TYPE_CHECKING:
    import paramiko
    from typing_extensions import Self

_BANNER_LIMIT = 10.0


class BaseInstance(Readiness):
    """A machine that can be logged in to.

    Args:
        key_pair: The key to log in with.
        username: The login user; `ubuntu` by default.
    """

    _type = "base"

    def __init__(self, key_pair: KeyPair, username: str | None = None) -> None:
        self._log = logging.getLogger(f"{__name__}.{type(self).__name__}")
        self.key_pair = key_pair
        self.username = username or "ubuntu"
        self.port = "22"
        self.banner_timeout = _BANNER_LIMIT
        self._ready_minutes: float | None = None
        # A weak reference, since the instance's end closes them.
        weak = weakref.ref(self)

        def connect(deadline: Deadline | None) -> paramiko.SSHClient:
            instance = weak()
            assert instance is not None
            # The hook has no parameter for a deadline.
            with contextlib.nullcontext() if deadline is None else use_deadline(deadline):
                return instance._ssh_connect()

        self._connections = Connections(connect)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        raise_cleanup_errors(self.delete(), exc)

    def __del__(self) -> None:
        """Close the connections, not the machine; harmless at any time, and twice."""
        connections = getattr(self, "_connections", None)
        if connections is not None:
            connections.close()

    def __repr__(self) -> str:
        # A subclass may have a method instead of the property, whose repr() would call this one.
        identity: object = self.id
        return f"{type(self).__name__}({identity() if callable(identity) else identity})"

    @property
    @abstractmethod
    def id(self) -> str:
        """The id for `get_instance`."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name."""

    @property
    @abstractmethod
    def ip(self) -> str:
        """The address to reach it."""

    @property
    def private_ip(self) -> str:
        """The address inside its cloud; raises NotImplementedError if the cloud has none."""
        raise NotImplementedError(f"{type(self).__name__} tells no private address")

    @property
    def ready_timeout(self) -> float:
        """Minutes that a wait for readiness may take in all, unless the call has its own limit.

        Raises:
            ValueError: On setting: it is not a positive number.
        """
        return self._ready_minutes or self._default_ready_minutes

    @ready_timeout.setter
    def ready_timeout(self, minutes: float | None) -> None:
        ready_limit(minutes)
        self._ready_minutes = minutes

    @property
    def _default_ready_minutes(self) -> float:
        """How long the machine may take until it is ready, if no limit is set."""
        return DEFAULT_READY_MINUTES

    @abstractmethod
    def delete(self, wait: bool = True) -> list[Exception]:
        """Delete it and return the errors met on the way."""

    @abstractmethod
    def _do_restart(self, **kwargs: Any) -> None:
        """Start a reboot."""

    @abstractmethod
    def shutdown(self, wait: bool = True, **kwargs: Any) -> None:
        """Power it off."""

    @abstractmethod
    def start(self, wait: bool = True) -> None:
        """Power it on."""

    @abstractmethod
    def wait_for_delete(self, **kwargs: Any) -> None:
        """Wait until it is deleted."""

    @abstractmethod
    def wait_for_stop(self, **kwargs: Any) -> None:
        """Wait until it is powered off."""

    def wait(self, ready_timeout: float | None = None, **kwargs: Any) -> None:
        """Wait until the machine runs, executes commands over SSH, and cloud-init has finished.

        A failure of cloud-init does not raise; it is logged in cloud-init's own words.

        Args:
            ready_timeout: Minutes it may take in all; by default the instance's `ready_timeout`.
            **kwargs: Passed to `_wait_for_instance_start`.

        Raises:
            PycloudlibTimeoutError: The machine could not be reached in time, or not at all.
            ValueError: `ready_timeout` is not a positive number.
        """
        with use_deadline(ready_limit(ready_timeout, self.ready_timeout)):
            self._wait_for_instance_start(**kwargs)
            self._wait_for_execute()
            self._wait_for_cloudinit()

    def wait_for_restart(self, old_boot_id: str) -> None:
        """Wait until the machine has rebooted and cloud-init has finished.

        Args:
            old_boot_id: The result of `get_boot_id` before.

        Raises:
            PycloudlibTimeoutError: It could not be reached in time, or did not reboot.
        """
        with use_deadline(ready_limit(None, self.ready_timeout)):
            self._wait_for_execute(old_boot_id=old_boot_id)
            self._wait_for_cloudinit()

    def restart(self, wait: bool = True, **kwargs: Any) -> None:
        """Reboot the machine.

        Args:
            wait: Whether to wait until it has rebooted and cloud-init has finished.
            **kwargs: Passed to the cloud's own way of rebooting.
        """
        self._log.info("Restarting %s", self.name)
        old_boot_id = self._find_boot_id() if wait else ""
        self._do_restart(**kwargs)
        if wait:
            self.wait_for_restart(old_boot_id)

    def get_boot_id(self) -> str:
        """Return the id of the current boot, a UUID that the kernel makes at each boot."""
        return self.execute("cat /proc/sys/kernel/random/boot_id").strip()

    def add_network_interface(self, **kwargs: Any) -> str:
        """Add a network interface to the running machine and return its address.

        Here and below, a cloud without the feature raises NotImplementedError.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot add network interfaces")

    def remove_network_interface(self, ip_address: str) -> None:
        """Remove the network interface that has an address."""
        raise NotImplementedError(f"{type(self).__name__} cannot remove network interfaces")

    def get_status(self) -> str:
        """Return the machine's state in one word, such as `running`."""
        raise NotImplementedError(f"{type(self).__name__} tells no status")

    def console_log(self) -> str:
        """Return what the machine wrote to its serial console."""
        raise NotImplementedError(f"{type(self).__name__} keeps no console log")

    def execute(
        self,
        command: str | Sequence[str],
        stdin: str | bytes | None = None,
        description: str | None = None,
        *,
        use_sudo: bool = False,
        get_pty: bool = False,
        timeout: float | None = None,
        no_log: bool = False,
        **kwargs: Any,
    ) -> Result:
        """Execute a command in the guest, as the login user.

        Args:
            command: A text is run by `sh -c`; a list is run as it is.
            stdin: What the command reads.
            description: What it is for; logged.
            use_sudo: Whether to run it as root.
            get_pty: Whether to give it a terminal.
            timeout: Seconds it may take, connecting included; no limit by default.
            no_log: Whether the command, which may contain secrets, is left out of log and errors.
            **kwargs: Ignored; older programs have further arguments.

        Returns:
            Its output, error output and exit status, whatever that is.

        Raises:
            paramiko.SSHException: The machine cannot be reached.
            PycloudlibTimeoutError: The command took longer than `timeout`.
            TypeError: `command` or `stdin` is of a wrong type.
            ValueError: `command` has a NUL byte, `timeout` is not a positive number.
        """
        argv = commands.build_argv(command, use_sudo=use_sudo)
        commands.encode_stdin(stdin)
        # Overrides of _ssh() in older programs have `stdin` only: the rest is passed when needed.
        options: dict[str, Any] = {"get_pty": True} if get_pty else {}
        if timeout is not None:
            options["timeout"] = positive("timeout", timeout, "seconds")
        if kwargs:
            self._log.debug("Ignored by execute(): %s", kwargs)
        if description:
            self._log.info("%s: %s", self.name, description)
        if not no_log:
            self._log_command(command)
        with commands.hide_command() if no_log else contextlib.nullcontext():
            result = self._ssh(argv, stdin=stdin, **options)
        self._log.debug("Exit status in %s: %d", self.name, result.return_code)
        return result

    def _log_command(self, command: str | Sequence[str]) -> None:
        # The repeated commands of a wait are not the program's own.
        level = logging.INFO if current_deadline() is None else logging.DEBUG
        line = command if isinstance(command, str) else shlex.join(command)
        self._log.log(level, "executing: %s", line)

    def run_script(self, script: str, description: str | None = None) -> Result:
        """Run a script given as text; its first line names the interpreter.

        Args:
            script: The script; `#!/bin/sh` is assumed without a `#!` line.
            description: What it is for; logged.
        """
        if not isinstance(script, str):
            raise TypeError(f"script must be a text, not {type(script).__name__}")
        text = script if script.startswith("#!") else f"#!/bin/sh\n{script}"
        # One round trip: the text comes by standard input, so that no quoting touches it.
        runner = 'f=$(mktemp) && cat >"$f" && chmod 700 "$f" && "$f"; s=$?; rm -f "$f"; exit $s'
        return self.execute(runner, stdin=text, description=description or "running a script")

    def push_file(
        self,
        local_path: str | Path,
        remote_path: str,
        *,
        on_progress: ProgressCallback = ignore_progress,
    ) -> None:
        """Copy a local file to the guest, as the login user.

        Args:
            local_path: The file.
            remote_path: Where it goes.
            on_progress: Called with the bytes that have been copied.

        Raises:
            FileNotFoundError: The local file, or the directory in the guest, does not exist.
            paramiko.SSHException: The machine cannot be reached.
        """
        self._log.debug("Pushing %s to %s:%s", local_path, self.name, remote_path)
        with self._ended_early():
            filecopy.push(
                self._connections, local_path, remote_path, on_progress, self._file_port()
            )

    def pull_file(
        self,
        remote_path: str | Path,
        local_path: str | Path,
        *,
        on_progress: ProgressCallback = ignore_progress,
    ) -> None:
        """Copy a file from the guest, as the login user.

        Args:
            remote_path: The file.
            local_path: Where it goes.
            on_progress: Called with the bytes that have been copied.

        Raises:
            FileNotFoundError: The file in the guest, or the local directory, does not exist.
            paramiko.SSHException: The machine cannot be reached.
        """
        self._log.debug("Pulling %s:%s to %s", self.name, remote_path, local_path)
        with self._ended_early():
            filecopy.pull(
                self._connections, remote_path, local_path, on_progress, self._file_port()
            )

    def update(self) -> Result:
        """Refresh the package lists and upgrade all packages."""
        return self._run_apt("dist-upgrade --quiet --yes", "upgrading packages")

    def install(self, packages: str | Sequence[str]) -> Result:
        """Install packages.

        Args:
            packages: Their names, in a list or in one text.
        """
        names = packages.split() if isinstance(packages, str) else list(packages)
        arguments = f"install --quiet --yes {shlex.join(names)}"
        return self._run_apt(arguments, f"installing {' '.join(names)}")

    def _run_apt(self, arguments: str, description: str) -> Result:
        apt = "DEBIAN_FRONTEND=noninteractive apt-get"
        command = f"{apt} update --quiet && {apt} {arguments}"
        return self.execute(command, use_sudo=True, description=description)

    def clean(self) -> None:
        """Make the next boot a first boot: forget cloud-init's state, logs and the machine-id.

        Raises:
            PycloudlibError: The guest could not do it; gives its reason.
        """
        result = self.execute(
            "set -e; cloud-init clean --logs; : >/etc/machine-id; "
            "if [ -f /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ]; then "
            "rm -f /var/lib/dbus/machine-id; fi; sync",
            use_sudo=True,
            description="making the next boot a first boot",
        )
        if result.failed:
            raise GuestRefusedError(f"{self.name} could not be cleaned: {result.stderr}")

    # For subclasses: clients override and call what follows.

    def _ssh_connect(self) -> paramiko.SSHClient:
        """Open a new connection.

        Raises:
            paramiko.SSHException: The machine cannot be reached.
        """
        return ssh.connect(
            self._endpoint(),
            self._host_keys(),
            banner_timeout=self.banner_timeout,
            deadline=current_deadline(),
        )

    def _ssh(
        self,
        command: Sequence[str],
        stdin: str | bytes | None = None,
        get_pty: bool = False,
        timeout: float | None = None,
    ) -> Result:
        """Run an argument vector in the guest and return its result.

        Inside a wait for readiness, that wait's deadline is the limit of each command.
        """
        out, err, status = commands.run(
            self._connections,
            shlex.join(command),
            stdin=commands.encode_stdin(stdin),
            get_pty=get_pty,
            timeout=command_limit(timeout),
            on_wait=self._lookout(),
        )
        return Result(_text(out), _text(err), status)

    def _ended_early(self) -> contextlib.AbstractContextManager[None]:
        """End a block that waits for the guest as soon as it cannot answer any more."""
        return commands.interrupt_when(self._lookout(), self._forget_client)

    def _file_port(self) -> FilePort | None:
        """Return what large files go by instead of SSH; None if there is no such thing."""
        return None

    def _find_boot_id(self) -> str:
        """Return the boot id; empty if the machine cannot be reached."""
        import paramiko  # noqa: PLC0415 - heavy

        try:
            return self.get_boot_id()
        except paramiko.SSHException:
            return ""

    def _host_keys(self) -> ssh.HostKeys | None:
        """Return which host keys the machine may show; None accepts any."""
        return None

    def _endpoint(self) -> ssh.Endpoint:
        key = self.key_pair
        return ssh.Endpoint(
            self.ip, int(self.port), self.username, key.private_key_path, key.public_key_path
        )

    def _is_connected(self) -> bool:
        return self._connections.any_open

    def _forget_client(self) -> None:
        """Close the connections; the next use makes a new one."""
        self._connections.close()


def _text(output: bytes) -> str:
    return output.decode("utf-8", errors="replace").rstrip()
