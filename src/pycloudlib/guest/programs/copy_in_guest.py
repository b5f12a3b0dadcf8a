"""Copies as `cp -rH` does, in two halves: one reads a file or a tree, the other writes it.

Both ends need both halves. The host imports them; a guest gets the text, which its own Python runs
(3.5 or newer, nothing but its standard library), with `read SOURCE ""`, `write TARGET NAME`, or
`write-regular TARGET ""`, which opens nothing but regular files. Between them is a stream of
records, each a letter, a length, and that many bytes. Problems of the half in the guest are
records, too.

The stream goes by standard input and output, as SSH has them; with `TOKEN` as a further argument by
the virtio-serial port, on which the host waits for that token first. Then its descriptor follows,
where the helper has the port open; otherwise it is opened. The host ends that by a record, too.

As `cp -rH`: a link that is named is followed, one in a tree stays a link. New files and directories
get the mode of their source, less the umask; existing ones keep theirs and are written into, also
through a link. Nothing replaces something of another kind, except that links, pipes and sockets
replace any file. Holes stay holes. Problems are reported, and the rest is copied.
"""

import _socket
import errno
import os
import select
import signal
import stat
import struct
import sys
from typing import Any, BinaryIO, Callable, Iterator, List, Optional, Tuple

# A directory begins and ends; a file begins, has data, ends; a link; a pipe, socket or device; a
# problem; the end of the stream.
DIRECTORY, UP, FILE, DATA, CLOSE, LINK, SPECIAL = b"D", b"U", b"F", b"W", b"C", b"L", b"S"
PROBLEM, END = b"E", b"."
HEAD = struct.Struct(">cI")
MODE = struct.Struct(">I")
NUMBER = struct.Struct(">q")
CHUNK = 1 << 18
LONGEST = 2 * CHUNK
PERMISSIONS = 0o777
MOST_PROBLEMS = 1000
"""How many are kept; the other half, if it is not trusted, may send any number."""
PORT = "/dev/virtio-ports/org.pycloudlib.helper.0"
NO_PORT = 75
"""The exit status of a program that cannot have the port; it has done nothing."""
# Run by root, opens the port, and sends its descriptor to the process that has the other end of its
# standard input. `_socket`, unlike `socket`, is imported in no time.
OPEN_PORT = """
import _socket, os, struct, sys
port = struct.pack("i", os.open(sys.argv[1], os.O_RDWR))
ours = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, 0)
ours.sendmsg([b"."], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, port)])
"""

Send = Callable[[bytes, bytes], None]
Record = Tuple[bytes, bytes]
Entry = Tuple[bytes, bytes]  # a path, and the name in its directory


class StreamError(Exception):
    """The stream is not what the other half writes."""


class Problem:
    """What could not be done: an attempt, its path, and the reason.

    The error's number is 0 if it is not the system's.
    """

    def __init__(self, attempt: str, path: bytes, number: int, why: str) -> None:
        self.attempt = attempt
        self.path = path
        self.number = number
        self.why = why

    def pack(self) -> bytes:
        words = [self.attempt.encode(), self.path, str(self.number).encode(), self.why.encode()]
        return b"\0".join(words)

    @classmethod
    def unpack(cls, payload: bytes) -> "Problem":
        try:
            attempt, path, number, why = payload.split(b"\0")
            return cls(attempt.decode(), path, int(number), why.decode())
        except ValueError as error:
            raise StreamError("a problem that cannot be read: {!r}".format(payload)) from error


def read_records(stream: BinaryIO) -> Iterator[Record]:
    """Read the records of a stream to its end."""
    while True:
        kind, length = HEAD.unpack(read_exactly(stream, HEAD.size))
        if length > LONGEST:
            raise StreamError("a record of {} bytes".format(length))
        payload = read_exactly(stream, length)
        if kind == END:
            return
        yield kind, payload


def read_problems(stream: BinaryIO) -> List["Problem"]:
    """Read the problems of the half that writes, which keeps no more than some."""
    problems = []  # type: List[Problem]
    for kind, payload in read_records(stream):
        if kind != PROBLEM or len(problems) > MOST_PROBLEMS:
            raise StreamError("{!r} in place of the end of the problems".format(kind))
        problems.append(Problem.unpack(payload))
    return problems


def read_exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise StreamError("it ends early")
    return data


def sender(stream: BinaryIO) -> Send:
    """Return the function that writes records to a stream."""

    def send(kind: bytes, payload: bytes) -> None:
        stream.write(HEAD.pack(kind, len(payload)))
        stream.write(payload)

    return send


class Reader:
    """The half that reads: a file or a tree, into records."""

    def __init__(self, send: Send) -> None:
        self.send = send

    def read(self, source: bytes) -> None:
        """Read a file or a tree; links in it, but not the source itself, stay links."""
        # Directories whose entries are left; a path may be deeper than the stack.
        left = [iter([(source, b"")])]
        while left:
            found = next(left[-1], None)
            if found is not None:
                entries = self.read_one(*found, follow=len(left) == 1)
                if entries is not None:
                    left.append(entries)
                continue
            left.pop()
            if left:
                self.send(UP, b"")

    def read_one(self, path: bytes, name: bytes, follow: bool) -> Optional[Iterator[Entry]]:
        """Read one entry; return the entries of a directory."""
        try:
            facts = os.stat(path, follow_symlinks=follow)
        except OSError as error:
            self.report("stat", path, error)
            return None
        mode = MODE.pack(facts.st_mode)
        if stat.S_ISDIR(facts.st_mode):
            self.send(DIRECTORY, mode + name)
            try:
                entries = sorted(os.listdir(path))
            except OSError as error:
                self.report("access", path, error)
                entries = []
            return iter([(os.path.join(path, entry), entry) for entry in entries])
        if stat.S_ISREG(facts.st_mode):
            self.read_file(path, mode + NUMBER.pack(facts.st_size) + name)
        elif stat.S_ISLNK(facts.st_mode):
            try:
                self.send(LINK, MODE.pack(len(name)) + name + os.readlink(path))
            except OSError as error:
                self.report("read symbolic link", path, error)
        else:
            self.send(SPECIAL, mode + NUMBER.pack(facts.st_rdev) + name)
        return None

    def read_file(self, path: bytes, beginning: bytes) -> None:
        try:
            # If it has become a pipe meanwhile, its other end is not waited for.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self.report("open", path, error)
            return
        try:
            self.send(FILE, beginning)
            end = 0
            try:
                for offset, data in pieces(descriptor):
                    self.send(DATA, NUMBER.pack(offset) + data)
                    end = offset + len(data)
            except OSError as error:
                self.report("read", path, error)
            self.send(CLOSE, NUMBER.pack(max(end, hole_at_end(descriptor))))
        finally:
            os.close(descriptor)

    def report(self, attempt: str, path: bytes, error: OSError) -> None:
        self.send(PROBLEM, problem_of(attempt, path, error).pack())


def problem_of(attempt: str, path: bytes, error: OSError) -> Problem:
    number = error.errno or 0
    return Problem(attempt, path, number, error.strerror or str(error))


def pieces(descriptor: int) -> Iterator[Tuple[int, bytes]]:
    """Yield the data of a file without its holes: pieces with their offsets."""
    facts = os.fstat(descriptor)
    sparse = facts.st_blocks * 512 < facts.st_size
    offset = 0
    while True:
        limit = CHUNK
        if sparse and offset < facts.st_size:
            try:
                offset = os.lseek(descriptor, offset, os.SEEK_DATA)
                limit = min(CHUNK, os.lseek(descriptor, offset, os.SEEK_HOLE) - offset)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no more data
                    return
                sparse = False  # the file system knows no holes
        # The size may not be the end: a file grows, or is in /proc.
        data = os.pread(descriptor, limit, offset)
        if not data:
            return
        yield offset, data
        offset += len(data)


def hole_at_end(descriptor: int) -> int:
    """Return the length of a file that may end with a hole."""
    facts = os.fstat(descriptor)
    return facts.st_size if facts.st_blocks * 512 < facts.st_size else 0


class Place:
    """Where something is written: a directory, and a name in it.

    The first one has no directory, and its name is a path as it was given.
    """

    def __init__(self, directory: Optional[int], name: bytes, path: bytes) -> None:
        self.directory = directory
        self.name = name
        self.path = path

    def look(self, follow: bool) -> Optional[os.stat_result]:
        """Return the facts of what is there; None if nothing is."""
        try:
            return os.stat(self.name, dir_fd=self.directory, follow_symlinks=follow)
        except FileNotFoundError:
            return None

    def below(self, descriptor: int, name: bytes) -> "Place":
        return Place(descriptor, name, os.path.join(self.path, name))

    def open(self, flags: int, mode: int = 0) -> int:
        return os.open(self.name, flags | os.O_CLOEXEC | os.O_NOCTTY, mode, dir_fd=self.directory)


class Refusal(Exception):
    """Something is not written: `cp` would not, or the other half is not trusted."""


class Writer:
    """The half that writes.

    Args:
        target: The target, as it was given.
        name: The source's name in a directory; empty if its content is copied there.
        trusting: Whether the other half is trusted: otherwise nothing is written through a link
            that leads out of the target, and no device is made.
        regular: Whether files that are there have to be regular ones.
    """

    def __init__(self, target: bytes, name: bytes, trusting: bool, regular: bool = False) -> None:
        self.regular = regular
        self.problems = []  # type: List[Problem]
        self.trusting = trusting
        self.target = target
        # The directories that are not left if the other half is not trusted: for the first entry,
        # and for those in it. Both are empty while the target is what the caller named.
        self.given = b""
        self.root = b""
        if os.path.isdir(target):
            # An empty name leaves a slash, by which a link to a directory is followed.
            self.target = os.path.join(target, name)
            self.given = os.path.realpath(target) if name else b""
        # Directories that are being written: each with its descriptor, and with its final mode, if
        # that is another one. None for a directory that is left out.
        self.open_directories = []  # type: List[Tuple[Optional[Place], int, Optional[int]]]
        self.file = None  # type: Optional[OpenFile]
        self.begun = False

    def take(self, kind: bytes, payload: bytes) -> None:
        """Write one record."""
        try:
            self.write_record(kind, payload)
        except struct.error as error:
            raise StreamError("a record that is too short") from error

    def write_record(self, kind: bytes, payload: bytes) -> None:
        if kind == PROBLEM:
            self.keep(Problem.unpack(payload))
        elif kind == DATA:
            self.write_to_file(payload)
        elif kind == CLOSE:
            self.end_file(NUMBER.unpack(payload)[0])
        elif kind == UP:
            self.leave()
        else:
            self.begin(kind, payload)

    def begin(self, kind: bytes, payload: bytes) -> None:
        """Begin an entry that has a name."""
        first, rest = unpack_first(payload)
        if kind == DIRECTORY:
            self.enter(self.place(rest), first)
        elif kind == FILE:
            NUMBER.unpack(rest[: NUMBER.size])
            place = self.place(rest[NUMBER.size :])
            self.attempt("create regular file", place, self.begin_file, first)
        elif kind == LINK:
            place = self.place(rest[:first])
            self.attempt("create symbolic link", place, self.make_link, rest[first:])
        elif kind == SPECIAL:
            place = self.place(rest[NUMBER.size :])
            device = NUMBER.unpack(rest[: NUMBER.size])[0]
            self.attempt("create special file", place, self.make_special, first, device)
        else:
            raise StreamError("a record of kind {!r}".format(kind))

    def keep(self, problem: Problem) -> None:
        if len(self.problems) == MOST_PROBLEMS:
            problem = Problem("list all", self.target, 0, "there are more than these")
        if len(self.problems) <= MOST_PROBLEMS:
            self.problems.append(problem)

    def close(self) -> None:
        """Close all files and directories that are open."""
        while self.open_directories:
            self.leave()
        if self.file is not None:
            self.file.close()
            self.file = None

    def place(self, name: bytes) -> Optional[Place]:
        """Return where an entry goes; None if its directory is left out."""
        if self.file is not None:
            raise StreamError("a file that has no end")
        if not self.open_directories:
            if self.begun or name:
                raise StreamError("more than one beginning")
            self.begun = True
            return Place(None, self.target, self.target)
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
            raise StreamError("the name {!r}".format(name))
        place, descriptor, _mode = self.open_directories[-1]
        return None if place is None else place.below(descriptor, name)

    def attempt(
        self, what: str, place: Optional[Place], make: Callable[..., None], *arguments: Any
    ) -> bool:
        """Call `make` for a place, if there is one; return whether it succeeded; keep problems."""
        if place is None:
            return False
        try:
            make(place, *arguments)
        except OSError as error:
            self.keep(problem_of(what, place.path, error))
            return False
        except Refusal as refusal:
            self.keep(Problem(what, place.path, 0, str(refusal)))
            return False
        return True

    def enter(self, place: Optional[Place], mode: int) -> None:
        """Begin a directory; it is left out where something else is in its place."""
        if not self.attempt("create directory", place, self.make_directory, mode):
            self.open_directories.append((None, -1, None))

    def make_directory(self, place: Place, mode: int) -> None:
        wanted = None  # type: Optional[int]
        # A link to a directory is not a directory.
        found = place.look(follow=False)
        if found is None:
            os.mkdir(place.name, mode & (PERMISSIONS | stat.S_ISVTX), dir_fd=place.directory)
            made = stat.S_IMODE(os.stat(place.name, dir_fd=place.directory).st_mode)
            if made & stat.S_IRWXU != stat.S_IRWXU:
                # Files are written into it first.
                os.chmod(place.name, made | stat.S_IRWXU, dir_fd=place.directory)
                wanted = made
        elif not stat.S_ISDIR(found.st_mode):
            raise Refusal("there is something that is no directory")
        descriptor = place.open(os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        self.open_directories.append((place, descriptor, wanted))
        self.root = self.root or os.path.realpath(link_to(descriptor))

    def leave(self) -> None:
        if not self.open_directories:
            raise StreamError("an end without a beginning")
        place, descriptor, mode = self.open_directories.pop()
        if place is None:
            return
        os.close(descriptor)
        if mode is not None:
            self.attempt("set the mode of", place, set_mode, mode)

    def begin_file(self, place: Place, mode: int) -> None:
        found = place.look(follow=True)
        if found is not None:
            if stat.S_ISDIR(found.st_mode):
                raise Refusal("there is a directory")
            if self.regular and not stat.S_ISREG(found.st_mode):
                raise Refusal("there is no regular file")
            self.check_link(place)
            self.file = OpenFile(place, place.open(os.O_WRONLY | os.O_TRUNC))
            return
        if place.look(follow=False) is not None:
            raise Refusal("there is a symbolic link that leads nowhere")
        if place.name.endswith(b"/"):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self.file = OpenFile(place, place.open(flags, mode & PERMISSIONS))

    def check_link(self, place: Place) -> None:
        """Check that no link leads out of the target, where the other half is not trusted."""
        if place.directory is None:
            root, path = self.given, place.name
        else:
            root, path = self.root, os.path.join(link_to(place.directory), place.name)
        if self.trusting or not root:
            return
        if not os.path.realpath(path).startswith(os.path.join(root, b"")):
            raise Refusal("there is a symbolic link that leads out of the target")

    def write_to_file(self, payload: bytes) -> None:
        file = self.file
        if file is None:
            return
        offset = NUMBER.unpack(payload[: NUMBER.size])[0]
        if not self.attempt("write", file.place, file.write, offset, payload[NUMBER.size :]):
            file.close()
            self.file = None

    def end_file(self, size: int) -> None:
        if self.file is not None:
            file, self.file = self.file, None
            self.attempt("write", file.place, file.finish, size)

    def make_room(self, place: Place) -> None:
        """Remove what is there, unless it is a directory."""
        found = place.look(follow=False)
        if found is not None:
            if stat.S_ISDIR(found.st_mode):
                raise Refusal("there is a directory")
            os.unlink(place.name, dir_fd=place.directory)

    def make_link(self, place: Place, points_at: bytes) -> None:
        if b"\0" in points_at:
            raise StreamError("a link to {!r}".format(points_at))
        if place.directory is None:
            # The reader follows it; otherwise the next copy to this name would follow it.
            raise StreamError("a link in place of what was named")
        self.make_room(place)
        os.symlink(points_at, place.name, dir_fd=place.directory)

    def make_special(self, place: Place, mode: int, device: int) -> None:
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            device = 0
        elif stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
            if not self.trusting:
                raise Refusal("no device is made at a guest's word")
        else:
            raise StreamError("a special file of mode {:o}".format(mode))
        self.make_room(place)
        kind = stat.S_IFMT(mode) | (mode & PERMISSIONS)
        os.mknod(place.name, kind, device, dir_fd=place.directory)


class OpenFile:
    """A file that is being written: a regular one, a device, a pipe."""

    def __init__(self, place: Place, descriptor: int) -> None:
        self.place = place
        self.descriptor = descriptor
        self.regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self.end = 0

    def write(self, _place: Place, offset: int, data: bytes) -> None:
        if offset < self.end:
            raise StreamError("data behind the place where it belongs")
        if self.regular:
            os.lseek(self.descriptor, offset, os.SEEK_SET)
        else:
            self.fill(offset)
        self.put(data)
        self.end = offset + len(data)

    def finish(self, _place: Place, size: int) -> None:
        try:
            if size < self.end:
                raise StreamError("an end before the data")
            if not self.regular:
                self.fill(size)
            elif size > self.end:
                os.truncate(self.descriptor, size)
        finally:
            self.close()

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def fill(self, offset: int) -> None:
        """Write the zeros of a hole where there are no holes."""
        while self.end < offset:
            zeros = min(CHUNK, offset - self.end)
            self.put(bytes(zeros))
            self.end += zeros

    def put(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self.descriptor, left) :]


def unpack_first(payload: bytes) -> Tuple[int, bytes]:
    """Split off what a record begins with: a mode, or a length."""
    return MODE.unpack(payload[: MODE.size])[0], payload[MODE.size :]


def size_told(payload: bytes) -> int:
    """Return the size that the record of a new file announces; 0 if that is damaged."""
    sizes = payload[MODE.size : MODE.size + NUMBER.size]
    return max(0, NUMBER.unpack(sizes)[0]) if len(sizes) == NUMBER.size else 0


def set_mode(place: Place, mode: int) -> None:
    os.chmod(place.name, mode, dir_fd=place.directory)


def link_to(descriptor: int) -> bytes:
    """Return a path of what a descriptor has open."""
    return "/proc/self/fd/{}".format(descriptor).encode()


def name_in_directory(source: bytes) -> bytes:
    """Return a source's name in a directory that it is copied to, as `cp` chooses it."""
    name = os.path.basename(source.rstrip(b"/"))
    return b"" if name in (b".", b"..") else name


def write(stream: BinaryIO, writer: Writer) -> List[Problem]:
    """Write a whole stream; return the problems."""
    try:
        for kind, payload in read_records(stream):
            writer.take(kind, payload)
    finally:
        writer.close()
    return writer.problems


def open_port() -> int:
    """Open the port, which root alone may do; the rest of the program stays the user's."""
    try:
        return os.open(PORT, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        pass
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    child = os.fork()
    if child == 0:
        try:
            os.dup2(theirs.fileno(), 0)
            python = [sys.executable, "-IS", "-c", OPEN_PORT, PORT]
            os.execvp("sudo", ["sudo", "-n", *python])
        finally:
            os._exit(NO_PORT)
    theirs.close()
    _, messages, _, _ = ours.recvmsg(1, _socket.CMSG_LEN(MODE.size))
    os.waitpid(child, 0)
    if not messages:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), PORT)
    return int(struct.unpack("i", messages[0][2])[0])


def end_with_host(port: int) -> None:
    """End this program soon after the host has hung up, from when on it would wait for ever."""
    poller = select.poll()
    poller.register(port, 0)

    def look(*_: Any) -> None:
        if poller.poll(0):
            os._exit(1)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    look()


def use_port(token: str, descriptors: List[str]) -> Tuple[BinaryIO, BinaryIO]:
    """Return the streams from and to the host, which has been told that this program is there."""
    try:
        port = int(descriptors[0]) if descriptors else open_port()
    except OSError as error:
        sys.stderr.write("{}\n".format(error))
        raise SystemExit(NO_PORT) from None
    end_with_host(port)
    output = os.fdopen(port, "wb", CHUNK, closefd=False)
    output.write(token.encode() + b"\n")
    output.flush()
    return os.fdopen(port, "rb", CHUNK, closefd=False), output


def main() -> None:
    """Run the half in the guest."""
    role, path, name = sys.argv[1], os.fsencode(sys.argv[2]), os.fsencode(sys.argv[3])
    by_port = sys.argv[4:]
    stream, output = sys.stdin.buffer, sys.stdout.buffer  # type: Tuple[BinaryIO, BinaryIO]
    if by_port:
        stream, output = use_port(by_port[0], by_port[1:])
    send = sender(output)
    if role == "read":
        Reader(send).read(path)
    else:
        # At the end, since the other half reads nothing until then.
        writer = Writer(path, name, trusting=True, regular=role == "write-regular")
        for problem in write(stream, writer):
            send(PROBLEM, problem.pack())
    send(END, b"")
    output.flush()
    if by_port:
        # What QEMU has not read yet would be lost with the port.
        read_exactly(stream, HEAD.size)


if __name__ == "__main__":
    main()
