"""The helper: runs inside a guest that is to be saved, and answers on one virtio-serial port.

Not imported: its text is sent to the guest and run there by the guest's own Python (3.5 or newer,
nothing but its standard library). It lives in the guest's memory only and is gone after a reboot.

Requests and answers are lines of JSON, some followed by bytes:

    {"id": 1, "op": "clock"}                       {"id": 1, "now": 1700000000.25}
    {"id": 2, "op": "fix", "ahead": 0.5, …}        {"id": 2, "done": ["clock", …]}
    {"id": 3, "op": "exec", "argv": […], "stdin": 5}⏎hello
                                                   {"id": 3, "out": 2}⏎hi   (and "err")
                                                   {"id": 3, "exit": 0}
    {"id": 4, "op": "lend", "program": …}          what that program writes, then
                                                   {"id": 4, "exit": 0}
    whatever failed                                {"id": 3, "error": "…"}
"""

import base64
import contextlib
import fcntl
import json
import os
import pwd
import re
import select
import signal
import struct
import subprocess
import sys
import time
from typing import Any, Dict, Iterator, List, Optional, TextIO, Tuple, Union

DIRECTORY = "/run/pycloudlib"
PORT_NAME = "org.pycloudlib.helper.0"
CHUNK = 1 << 16
# linux/random.h: _IOW('R', 0x03, int[2]) and _IO('R', 0x07).
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
CLOUD = "/var/lib/cloud"
SSH_PID = "/run/sshd.pid"
# When the pid file of an SSH server was written that was restarted, and may not listen yet.
SSH_RESTARTS = []  # type: List[int]
KNOWN_USERS = {}  # type: Dict[str, Any]


def to_bytes(text: str) -> bytes:
    """Encode a text; bytes that were not text come back as they were."""
    return text.encode("utf-8", "surrogateescape")


def open_text(path: str) -> TextIO:
    """Open a file that other programs write, too: bytes that are not text are kept."""
    return open(path, encoding="utf-8", errors="surrogateescape")


class HungUp(Exception):
    """The host has closed the connection."""


class Port:
    """The virtio-serial port; the host connects and disconnects as it likes."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.buffer = b""
        # The kernel sends a signal when the host connects, for which poll() alone does not wait.
        # Commands start with the signal unblocked, so it must not end a process.
        signal.signal(signal.SIGIO, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
        fcntl.fcntl(self.fd, fcntl.F_SETOWN, os.getpid())
        self.take_back()

    def lend(self) -> None:
        """Let another process read and write in the usual way, which waits."""
        fcntl.fcntl(self.fd, fcntl.F_SETFL, 0)

    def take_back(self) -> None:
        fcntl.fcntl(self.fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)

    def poll(self, seconds: Optional[float] = None) -> int:
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        events = poller.poll(None if seconds is None else seconds * 1000)
        return events[0][1] if events else 0

    def wait_for_host(self) -> None:
        while self.poll(0) & select.POLLHUP:
            self.buffer = b""
            # With a limit, as the signal may have come just before.
            signal.sigtimedwait([signal.SIGIO], 2)

    def fill(self) -> None:
        if self.poll() & select.POLLHUP:
            raise HungUp
        with contextlib.suppress(BlockingIOError):
            self.buffer += os.read(self.fd, CHUNK)

    def read_line(self) -> bytes:
        while b"\n" not in self.buffer:
            self.fill()
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def read(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self.fill()
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def end_request(self) -> None:
        """Forget the received part of a request."""
        self.buffer = b""

    def write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self.fd, data[:CHUNK]) :]
            except BlockingIOError:
                poller = select.poll()
                poller.register(self.fd, select.POLLOUT)
                if poller.poll(5000) and self.poll(0) & select.POLLHUP:
                    raise HungUp from None


class Pipe:
    """Standard input and output instead of a port: all requests are there from the start."""

    fd = None  # type: Optional[int]

    def read_line(self) -> bytes:
        line = sys.stdin.buffer.readline()
        if not line:
            raise HungUp
        return line

    def read(self, size: int) -> bytes:
        return sys.stdin.buffer.read(size)

    def write(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


Channel = Union[Port, Pipe]
Request = Dict[str, Any]


def find_port() -> str:
    """Find the port's device by its name."""
    for directory in sorted(os.listdir("/sys/class/virtio-ports")):
        with open_text("/sys/class/virtio-ports/" + directory + "/name") as file:
            if file.read().strip() == PORT_NAME:
                return "/dev/" + directory
    raise SystemExit("no virtio-serial port named " + PORT_NAME)


def read_environment() -> Dict[bytes, bytes]:
    """Read what the login user's SSH session had in its environment."""
    with open(DIRECTORY + "/environment", "rb") as file:
        words = [word.partition(b"=") for word in file.read().split(b"\0") if word]
    return {name: value for name, _, value in words}


def find_user(name: str) -> Tuple[pwd.struct_passwd, List[int]]:
    """Find a user and the user's groups; looked up again when the files of users have changed.

    The look-up takes long in a copy that was just restored.
    """
    changed = tuple(os.stat(path).st_mtime for path in ("/etc/passwd", "/etc/group"))
    if KNOWN_USERS.get(name, (None,))[0] != changed:
        user = pwd.getpwnam(name)
        KNOWN_USERS[name] = (changed, user, os.getgrouplist(name, user.pw_gid))
    user, groups = KNOWN_USERS[name][1:]
    return user, groups


def execute(port: Channel, request: Request, environment: Dict[bytes, bytes]) -> None:
    """Run a command as the login user, and pass its outputs on while they come."""
    stdin = port.read(request["stdin"])
    user, groups = find_user(request["user"])
    try:
        with acting_as(user, groups):
            child = subprocess.Popen(
                [to_bytes(word) for word in request["argv"]],
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=user.pw_dir if os.path.isdir(user.pw_dir) else "/",
                env=environment,
                start_new_session=True,
            )
    except OSError as error:
        # As a shell prints it.
        words = to_bytes("{}: {}\n".format(request["argv"][0], error))
        answer(port, request, {"err": len(words)}, words)
        answer(port, request, {"exit": 127})
        return
    try:
        relay(port, request, child, stdin)
        wait_for(port, child)
    except BaseException:
        end_session(child.pid)
        child.poll()
        raise
    # As over SSH, a command that a signal has ended has no exit status.
    answer(port, request, {"exit": max(child.returncode, -1)})


def end_session(session: int) -> None:
    """Hang up on all processes of a session, and kill those that stay."""
    for number in (signal.SIGHUP, signal.SIGKILL):
        for pid in processes_of(session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                os.kill(pid, signal.SIGCONT)
        for _ in range(20):
            if not processes_of(session):
                return
            time.sleep(0.1)


def processes_of(session: int) -> List[int]:
    """List the processes of a session that run."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, IndexError):
            with open("/proc/" + name + "/stat", "rb") as file:
                state, _, _, its_session = file.read().rpartition(b") ")[2].split()[:4]
            if int(its_session) == session and state != b"Z":
                found.append(int(name))
    return found


@contextlib.contextmanager
def acting_as(user: pwd.struct_passwd, groups: List[int]) -> Iterator[None]:
    """Switch to another user in the block; a program executed in it cannot switch back.

    execve(2) makes the saved user id the effective one. Unlike a switch in the child, this allows
    Python to start it by vfork(), which is much cheaper.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO])
    if os.getuid() != 0:
        yield
        return
    own_groups = os.getgroups()
    os.setgroups(groups)
    os.setresgid(user.pw_gid, user.pw_gid, 0)
    os.setresuid(user.pw_uid, user.pw_uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(own_groups)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])


def relay(port: Channel, request: Request, child: "subprocess.Popen[bytes]", stdin: bytes) -> None:
    """Feed a command's input and pass on its outputs until all of them have ended."""
    assert child.stdout
    assert child.stderr
    outputs = {child.stdout.fileno(): "out", child.stderr.fileno(): "err"}
    poller = select.poll()
    for descriptor in outputs:
        poller.register(descriptor, select.POLLIN)
    if port.fd is not None:
        poller.register(port.fd, select.POLLIN)
    if child.stdin:
        os.set_blocking(child.stdin.fileno(), False)
        poller.register(child.stdin.fileno(), select.POLLOUT)
    while outputs or stdin:
        for descriptor, _ in poller.poll():
            if descriptor == port.fd:
                # The host sends no request while a command runs, unless it has given it up.
                raise HungUp
            if descriptor in outputs:
                data = os.read(descriptor, CHUNK)
                if data:
                    answer(port, request, {outputs[descriptor]: len(data)}, data)
                else:
                    poller.unregister(descriptor)
                    del outputs[descriptor]
            elif child.stdin:
                try:
                    stdin = stdin[os.write(descriptor, stdin[:4096]) :]
                except BrokenPipeError:
                    stdin = b""
                if not stdin:
                    poller.unregister(descriptor)
                    child.stdin.close()


def wait_for(port: Channel, child: "subprocess.Popen[bytes]") -> None:
    """Wait for the end of a command whose outputs have ended, unless the host gives it up."""
    delay = 0.001
    while child.poll() is None:
        if isinstance(port, Pipe):
            child.wait()
        elif port.poll(delay):
            raise HungUp
        delay = min(2 * delay, 0.05)


def lend(port: Channel, request: Request) -> None:
    """Have a program of the host's use the port, as the login user, until its end.

    It is run in a copy of this process, which has what takes long to start: Python itself. It ends
    when the host hangs up. Its last argument is the port's descriptor.
    """
    if not isinstance(port, Port):
        raise TypeError("there is no port")
    user, groups = find_user(request["user"])
    argv = [""] + request["argv"] + [str(port.fd)]
    port.lend()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            become(user, groups)
            sys.argv = argv
            exec(request["program"], {"__name__": "__main__"})
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    port.take_back()
    answer(port, request, {"exit": status})
    if status:
        # What is left of its input, which may look like requests, is none.
        while True:
            port.fill()
            port.end_request()


def become(user: pwd.struct_passwd, groups: List[int]) -> None:
    """Become another user for good, in the user's home directory."""
    if os.getuid() == 0:
        os.setgroups(groups)
        os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
        os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    os.chdir(user.pw_dir if os.path.isdir(user.pw_dir) else "/")


def answer(port: Channel, request: Request, fields: Request, data: bytes = b"") -> None:
    """Send one answer, and the bytes that it announces."""
    line = json.dumps(dict(fields, id=request.get("id"))).encode()
    # The first line end ends an answer that was cut off before, if any.
    port.write(b"\n" + line + b"\n" + data)


def fix(request: Request) -> List[str]:
    """Fix up this copy of a machine; return the names of what was done."""
    done = []
    # Random numbers first: the other steps may need some.
    entropy = base64.b64decode(request["entropy"])
    with open("/dev/random", "wb", buffering=0) as device:
        content = struct.pack("ii", 8 * len(entropy), len(entropy)) + entropy
        fcntl.ioctl(device, RNDADDENTROPY, content)
        fcntl.ioctl(device, RNDRESEEDCRNG)
    done.append("random numbers")
    if "ahead" in request:
        time.clock_settime(time.CLOCK_REALTIME, time.time() + request["ahead"])
        done.append("clock")
    if request.get("authorize"):
        authorize(request["authorize"])
        done.append("key")
    if request.get("identity"):
        set_identity(request["identity"])
        done.append("identity")
    return done


def authorize(keys: Dict[str, str]) -> None:
    """Replace an authorized SSH key by another."""
    home = find_user(keys["user"])[0].pw_dir
    for path in (home + "/.ssh/authorized_keys", "/root/.ssh/authorized_keys"):
        if not os.path.exists(path):
            continue
        with open_text(path) as file:
            text = file.read()
        if keys["old"] in text:
            rewrite(path, text.replace(keys["old"], keys["new"]))


def set_identity(identity: Request) -> None:
    """Change the hostname, the machine-id, the instance-id and the SSH host keys."""
    rewrite("/etc/machine-id", identity["machine_id"] + "\n")
    dbus = "/var/lib/dbus/machine-id"
    if os.path.isfile(dbus) and not os.path.islink(dbus):
        rewrite(dbus, identity["machine_id"] + "\n")
    set_host_keys(identity["host_keys"])
    set_hostname(identity["hostname"])
    set_instance_id(identity["instance_id"])


def set_hostname(hostname: str) -> None:
    old = os.uname().nodename
    with open("/proc/sys/kernel/hostname", "w", encoding="utf-8") as file:
        file.write(hostname)
    rewrite("/etc/hostname", hostname + "\n")
    with open_text("/etc/hosts") as file:
        hosts = file.read()
    pattern = r"(?<![\w.-])" + re.escape(old) + r"(?![\w-])"
    rewrite("/etc/hosts", re.sub(pattern, hostname, hosts))


def set_instance_id(instance_id: str) -> None:
    """Rename cloud-init's state to another instance-id, so that it sees no new instance."""
    path = CLOUD + "/data/instance-id"
    if not os.path.exists(path):
        return
    with open_text(path) as file:
        old = file.read().strip()
    if os.path.isdir(CLOUD + "/instances/" + old):
        os.rename(CLOUD + "/instances/" + old, CLOUD + "/instances/" + instance_id)
        link = CLOUD + "/instance"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(link + ".new")
        os.symlink(CLOUD + "/instances/" + instance_id, link + ".new")
        os.rename(link + ".new", link)
    for name in ("instance-id", "previous-instance-id"):
        rewrite(CLOUD + "/data/" + name, instance_id + "\n")
    for name in (".instance-id", "instance-data.json", "instance-data-sensitive.json"):
        path = "/run/cloud-init/" + name
        if os.path.exists(path):
            with open_text(path) as file:
                rewrite(path, file.read().replace(old, instance_id))


def set_host_keys(host_keys: "List[Dict[str, str]]") -> None:
    """Replace the SSH host keys by others of the same types, and let the server take notice."""
    directory = "/etc/ssh"
    if not os.path.isdir(directory):
        return
    had = [name for name in os.listdir(directory) if re.match(r"ssh_host_.*_key(\.pub)?$", name)]
    for name in had:
        os.unlink(directory + "/" + name)
    bases = {"ssh_host_{}_key".format(key["type"]): key for key in host_keys}
    # A guest without any of these types gets all: without a key it could not be reached.
    for name in [name for name in bases if name in had] or bases:
        rewrite(directory + "/" + name, bases[name]["private"], 0o600)
        rewrite(directory + "/" + name + ".pub", bases[name]["public"] + "\n", 0o644)
    # A server that is started for each connection has no pid file, and reads the key then.
    with contextlib.suppress(OSError, ValueError), open_text(SSH_PID) as file:
        written = os.fstat(file.fileno()).st_mtime_ns
        os.kill(int(file.read()), signal.SIGHUP)
        SSH_RESTARTS.append(written)


def wait_for_ssh(limit: float) -> bool:
    """Wait until the SSH server that was restarted listens; return whether it does.

    sshd(8) removes its pid file when it restarts, and writes it when it listens. A connection would
    tell as well, but cost a process that starts in full.
    """
    end = time.monotonic() + limit
    while SSH_RESTARTS:
        with contextlib.suppress(FileNotFoundError):
            if os.stat(SSH_PID).st_mtime_ns != SSH_RESTARTS[-1]:
                del SSH_RESTARTS[:]
                break
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def rewrite(path: str, text: str, mode: Optional[int] = None) -> None:
    """Replace a file's content at once, keeping its owner and mode."""
    owner = (0, 0)
    with contextlib.suppress(FileNotFoundError):
        known = os.stat(path)
        mode = known.st_mode & 0o7777 if mode is None else mode
        owner = (known.st_uid, known.st_gid)
    temporary = path + ".pycloudlib"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    # No link is followed, as the user may have made one in a directory of theirs.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(temporary, flags, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(to_bytes(text))
        os.fchmod(file.fileno(), 0o644 if mode is None else mode)
        os.fchown(file.fileno(), *owner)
    os.rename(temporary, path)


def serve(port: Channel, environment: Dict[bytes, bytes]) -> None:
    """Answer one request."""
    line = port.read_line()
    try:
        request = json.loads(line.decode())
    except ValueError:
        request = None
    if not isinstance(request, dict):
        return  # the rest of a request whose beginning was cut off
    try:
        if request["op"] == "exec":
            execute(port, request, environment)
        elif request["op"] == "lend":
            lend(port, request)
        elif request["op"] == "fix":
            answer(port, request, {"done": fix(request)})
        elif request["op"] == "ssh":
            answer(port, request, {"up": wait_for_ssh(float(request["limit"]))})
        elif request["op"] == "clock":
            answer(port, request, {"now": time.time()})
        else:
            answer(port, request, {"error": "unknown operation " + request["op"]})
    except (OSError, LookupError, TypeError, ValueError, subprocess.SubprocessError) as error:
        answer(port, request, {"error": "{}: {}".format(type(error).__name__, error)})


def main() -> None:
    """Serve the port for ever; with the argument `once`, serve standard input to its end."""
    if sys.argv[1:] == ["once"]:
        with contextlib.suppress(HungUp):
            while True:
                serve(Pipe(), dict(os.environb))
        return
    environment = read_environment()
    with open_text(DIRECTORY + "/umask") as file:
        os.umask(int(file.read(), 8))
    port = Port(find_port())
    # A restored copy, whose clock is set, has much to do; the helper's answer is waited for, and
    # comes first. Its child processes have normal priority.
    with contextlib.suppress(OSError):
        policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, policy, os.sched_param(1))
    while True:
        port.wait_for_host()
        try:
            while True:
                serve(port, environment)
        except HungUp:
            # The next bytes begin another request.
            port.end_request()


if __name__ == "__main__":
    main()
