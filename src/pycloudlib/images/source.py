"""Where images come from, and whom to trust: keyrings, and signatures checked by gpgv."""

from __future__ import annotations

import base64
import contextlib
import datetime
import enum
import hashlib
import importlib.resources
import itertools
import logging
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pycloudlib._base.tools import run_tool
from pycloudlib.errors import ImageVerificationError, ToolError
from pycloudlib.images.download import (
    LIMITS,
    Client,
    Limits,
    Login,
    fetch_bytes,
    shown_url,
    split_login,
)

_log = logging.getLogger(__name__)

UNVERIFIED = "nobody"
"""Who vouches for what a server sent while signatures were not checked."""

DEFAULT_MIRROR = "https://cloud-images.ubuntu.com"


def is_http_url(text: str) -> bool:
    """Whether a text is an HTTP URL, by its form."""
    try:
        parts = urlsplit(text)
        # Reading the port is what looks at it.
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


class Stream(enum.Enum):
    """The two lines of builds."""

    RELEASED = "released"
    DAILY = "daily"

    @property
    def directory(self) -> str:
        """Its directory on the server."""
        return "releases" if self is Stream.RELEASED else "daily"

    @property
    def content_id(self) -> str:
        """The name of its catalog."""
        return f"com.ubuntu.cloud:{self.value}:download"


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where images come from and whom to trust.

    Attributes:
        mirror: Base URL of a server laid out like cloud-images.ubuntu.com. Name and password are
            removed from it: no URL that is made of it contains them.
        keyring: File of the public keys to trust, armored or binary; None for Ubuntu's own.
        verified: Whether the server's data counts only if it is signed.
        cache_dir: Where catalogs are kept, to be fetched when they have changed; None to keep none.
        login: The name and the password that the mirror asks for.
        limits: What is expected of the server.

    Raises:
        ValueError: The mirror is not an HTTP URL.
    """

    mirror: str = DEFAULT_MIRROR
    keyring: Path | None = None
    verified: bool = True
    cache_dir: Path | None = None
    login: Login | None = field(default=None, repr=False)
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        if not is_http_url(self.mirror):
            raise ValueError(
                f"Invalid image mirror {shown_url(self.mirror)!r}: expected a URL such as "
                f"{DEFAULT_MIRROR!r}"
            )
        mirror, login = split_login(self.mirror)
        object.__setattr__(self, "mirror", mirror)
        object.__setattr__(self, "login", login or self.login)

    @property
    def voucher(self) -> str:
        """Who vouches for what comes from here, as records of images name it.

        Raises:
            FileNotFoundError: There is no such keyring.
            ValueError: It holds no key.
        """
        return load_trusted_keys(self.keyring).name if self.verified else UNVERIFIED

    def trusts(self, vouchers: Collection[str]) -> bool:
        """Whether an image with these vouchers is trusted."""
        return self.voucher in vouchers if self.verified else bool(vouchers)

    def has_build_at(self, url: str, serial: str) -> bool:
        """Whether a URL is a place on the mirror where the build of a serial would be."""
        base, path = f"{self.mirror.rstrip('/')}/", url.rpartition("/")[0]
        is_there = url.startswith(base) and ".." not in url and "%" not in url
        return is_there and path.rpartition("/")[2] in (serial, f"release-{serial}")

    def base_url(self, stream: Stream, *, minimal: bool) -> str:
        """Return the URL to which the paths in a catalog are relative."""
        variant = "minimal/" if minimal else ""
        return f"{self.mirror.rstrip('/')}/{variant}{stream.directory}/"

    def catalog_url(self, stream: Stream, *, minimal: bool) -> str:
        """Return the URL of a stream's catalog, the signed one if it is to be verified."""
        suffix = "sjson" if self.verified else "json"
        return f"{self.base_url(stream, minimal=minimal)}streams/v1/{stream.content_id}.{suffix}"

    def warn_if_unverified(self) -> None:
        """Log a warning if nothing is verified."""
        if not self.verified:
            _log.warning(
                "NOTHING THAT %s SENDS IS VERIFIED (image_verification = 'disabled' in [qemu]): "
                "whoever is on the way to it decides what the images are",
                self.mirror,
            )


# Published by Ubuntu with these fingerprints:
# 4A3C E3CD 565D 7EB5 C810  E2B9 7FF3 F408 476C F100 signs the catalogs,
# D2EB 4462 6FDD C30B 513D  5BB7 1A5D 6C4C 7DB8 7C81 signs the lists of checksums.
_UBUNTU_KEYS = ("ubuntu-cloud-image-builder.asc", "uec-image-automatic-signing-key.asc")

# RFC 9580, section 6.2: header lines, an empty line, base64, and a checksum line that begins
# with "=". The checksum is optional, and superfluous beside a signature.
_BEGIN = b"-----BEGIN PGP PUBLIC KEY BLOCK-----"
_END = b"-----END PGP PUBLIC KEY BLOCK-----"

# gpgv(1) succeeds also for a key that has expired or was revoked. Its status tells them apart:
# GOODSIG is written only when neither is the case (EXPKEYSIG and REVKEYSIG are written instead).
_GOOD_SIGNATURE = b"[GNUPG:] GOODSIG "
# Follows it, and those of keys that have expired, too; its third word is the time of the signature
# in seconds since the epoch (doc/DETAILS in GnuPG).
_VALID_SIGNATURE = b"[GNUPG:] VALIDSIG "
_UBUNTU = "Ubuntu's cloud image keys"

_KEYRING = "keyring"

# As sha256sum(1) writes it; "*" marks that the file was read as binary.
_SUM_LINE = re.compile(r"(?P<sha256>[0-9a-f]{64}) [ *](?P<name>[^/\s]+)")


@dataclass(frozen=True, slots=True)
class TrustedKeys:
    """The public keys whose signatures are trusted.

    Attributes:
        origin: Where they come from, for messages.
        packets: The keys as `gpgv` reads them: binary OpenPGP, or a GnuPG keybox.
    """

    origin: str
    packets: bytes

    @property
    def name(self) -> str:
        """The name by which a record says that these keys vouch for an image.

        Ubuntu's keys, which come with this package, keep theirs when one of them is replaced;
        a keyring that is configured is another one as soon as it has other keys.
        """
        return "ubuntu" if self.origin == _UBUNTU else hashlib.sha256(self.packets).hexdigest()


def load_trusted_keys(keyring: Path | None = None) -> TrustedKeys:
    """Read the keys to trust.

    Args:
        keyring: A file of public keys, armored or binary; None for the two keys that sign
            Ubuntu's cloud images, which come with this package.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no OpenPGP public key.
    """
    if keyring is not None:
        return TrustedKeys(str(keyring), _read_keys(keyring.read_bytes(), str(keyring)))
    directory = importlib.resources.files("pycloudlib.images") / "keys"
    packets = b"".join(_read_keys((directory / name).read_bytes(), name) for name in _UBUNTU_KEYS)
    return TrustedKeys(_UBUNTU, packets)


def dearmor_keys(armored: bytes) -> bytes:
    """Decode every ASCII-armored public key block in a text.

    `gpgv` reads binary keys only. The result is empty when there is no such block.

    Raises:
        ValueError: A block is not base64.
    """
    return b"".join(map(_decode_block, _find_blocks(armored)))


def _find_blocks(armored: bytes) -> Iterator[list[bytes]]:
    """Yield the lines of each block, without its headers.

    Line by line, since an expression for all of it tries each beginning against the whole rest.
    """
    block: list[bytes] | None = None
    in_headers = False
    for line in map(bytes.rstrip, armored.split(b"\n")):
        if line == _BEGIN:
            block, in_headers = [], True
        elif line == _END:
            if block is not None and not in_headers:
                yield block
            block = None
        elif in_headers:
            in_headers = line != b""
        elif block is not None:
            block.append(line.lstrip())


def _read_keys(content: bytes, origin: str) -> bytes:
    try:
        armored = dearmor_keys(content)
    except ValueError as error:
        raise ValueError(f"The keyring {origin} is damaged: {error}") from error
    if armored:
        return armored
    # RFC 9580, section 4.2: every packet begins with a byte that has its highest bit set.
    # A keybox names itself instead.
    if content[:1] >= b"\x80" or content[8:12] == b"KBXf":
        return content
    raise ValueError(f"The keyring {origin} holds no OpenPGP public key")


def _decode_block(block: list[bytes]) -> bytes:
    data = b"".join(line for line in block if not line.startswith(b"="))
    return base64.b64decode(data, validate=True)


def verify_clearsigned(message: bytes, keys: TrustedKeys, origin: str) -> bytes:
    """Check a clear-signed message and return the text that was signed.

    The text is what `gpgv` itself extracts: anything around it in the message, which is not signed,
    is never read.

    Args:
        message: The whole message, signature included.
        keys: The keys to trust.
        origin: Where the message comes from, for the error.

    Raises:
        ImageVerificationError: It is not signed by a trusted key, or was changed.
        MissingPrerequisiteError: `gpgv` is not installed.
    """
    with _open_gpgv_directory(keys, origin, message=message) as directory:
        _run_gpgv(directory, "--output", directory / "text", directory / "message")
        return (directory / "text").read_bytes()


def verify_detached(
    content: bytes, signature: bytes, keys: TrustedKeys, origin: str
) -> datetime.datetime:
    """Check content against its detached signature, and return when that was made.

    Arguments and errors are those of `verify_clearsigned`; the signature is armored or binary.
    """
    with _open_gpgv_directory(keys, origin, content=content, signature=signature) as directory:
        status = _run_gpgv(directory, directory / "signature", directory / "content")
        return _find_signing_time(status)


@contextlib.contextmanager
def _open_gpgv_directory(keys: TrustedKeys, origin: str, **files: bytes) -> Iterator[Path]:
    """Make a directory with keys and files for one check; name the origin in its failure."""
    with tempfile.TemporaryDirectory(prefix="pycloudlib-gpgv-") as name:
        directory = Path(name)
        for file, data in {**files, _KEYRING: keys.packets}.items():
            (directory / file).write_bytes(data)
        try:
            yield directory
        except ToolError as error:
            raise ImageVerificationError(
                f"{origin} has no good signature by a trusted key ({keys.origin}): {error}"
            ) from error


def _run_gpgv(directory: Path, *arguments: str | Path) -> list[bytes]:
    """Run gpgv; return the lines of its status."""
    command: list[str | Path] = [
        "gpgv",
        *("--homedir", directory),
        *("--keyring", directory / _KEYRING),
        *("--status-fd", "1"),
        *arguments,
    ]
    step = "checking it"
    finished = run_tool(step, command)
    status = finished.stdout.splitlines()
    if not any(line.startswith(_GOOD_SIGNATURE) for line in status):
        output = (finished.stderr + finished.stdout).decode(errors="replace")
        raise ToolError(step, ["gpgv"], finished.returncode, output)
    return status


def _find_signing_time(status: Sequence[bytes]) -> datetime.datetime:
    """Find when the newest good signature was made."""
    # A signature by an expired key is valid, too: the line before its VALIDSIG decides.
    verdicts = [line for line in status if line.partition(b" ")[2].split(b" ")[0].endswith(b"SIG")]
    times = [
        int(valid.split()[4])
        for verdict, valid in itertools.pairwise(verdicts)
        if verdict.startswith(_GOOD_SIGNATURE) and valid.startswith(_VALID_SIGNATURE)
    ]
    return datetime.datetime.fromtimestamp(max(times), datetime.timezone.utc)


def fetch_sums(client: Client, url: str, serial: str, source: ImageSource) -> dict[str, str]:
    """Fetch a list of checksums with its detached signature; return them by file name.

    It does not name its build. But an older build's signature was made before the day of `serial`.
    """
    content = fetch_bytes(client, url)
    if source.verified:
        keys = load_trusted_keys(source.keyring)
        signature = fetch_bytes(client, f"{url}.gpg")
        signed = verify_detached(content, signature, keys, shown_url(url))
        # Ubuntu names builds by the day in UTC; other publishers' day may be 14 hours ahead.
        day = signed if source.keyring is None else signed + datetime.timedelta(hours=14)
        if f"{day:%Y%m%d}" < serial[:8]:
            raise ImageVerificationError(
                f"{shown_url(url)} was signed on {signed:%Y-%m-%d}, before the build "
                f"{serial} beside it was made: its kernel is an older build's"
            )
    else:
        source.warn_if_unverified()
    return parse_sums(content)


def parse_sums(content: bytes) -> dict[str, str]:
    """Return the checksums of a list by file name; other lines are ignored."""
    lines = map(_SUM_LINE.fullmatch, content.decode(errors="replace").splitlines())
    return {line["name"]: line["sha256"] for line in lines if line}
