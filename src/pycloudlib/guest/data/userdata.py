"""The parts of user-data: compressed or not, one document or several, by MIME or as an archive.

https://docs.cloud-init.io/en/latest/explanation/format.html
"""

from __future__ import annotations

import email
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pycloudlib._base.documents import MOST_VALUES, gunzip, parse_yaml, safe_repr

_GZIP_MAGIC = b"\x1f\x8b"
_ARCHIVE = b"#cloud-config-archive"

# The kind of a document by its beginning, in any case (cloudinit/handlers/__init__.py); the longest
# match counts.
_BEGINNINGS = {
    "#include-once": "text/x-include-once-url",
    "#include": "text/x-include-url",
    "#!": "text/x-shellscript",
    "#cloud-config-archive": "text/cloud-config-archive",
    "#cloud-config-jsonp": "text/cloud-config-jsonp",
    "#cloud-config": "text/cloud-config",
    "#part-handler": "text/part-handler",
    "#cloud-boothook": "text/cloud-boothook",
    "## template: jinja": "text/jinja2",
    "text/x-shellscript-per-boot": "text/x-shellscript-per-boot",
    "text/x-shellscript-per-instance": "text/x-shellscript-per-instance",
    "text/x-shellscript-per-once": "text/x-shellscript-per-once",
}
UNKNOWN = "text/x-not-multipart"
"""The kind of a document with an unknown beginning."""
# For parts of these types, the beginning counts.
_LOOKED_INTO = ("text/plain", UNKNOWN, "text/x-shellscript")
_COMPRESSED = tuple(
    f"application/{name}"
    for name in (
        "gzip",
        "gzip-compressed",
        "gzipped",
        "x-compress",
        "x-compressed",
        "x-gunzip",
        "x-gzip",
        "x-gzip-compressed",
    )
)
_KIND_OF_ARCHIVES = "text/cloud-config-archive"

# Of MIME documents: the length of a header, which the library reads again for each ";" in it; and
# how often a line may be compared, once for each open boundary.
_LONGEST_HEADER = 4096
_HEADER = re.compile(
    rb"^content-[^:\s]*[ \t]*:[^\r\n]*(?:[\r\n]+[ \t][^\r\n]*)*", re.IGNORECASE | re.MULTILINE
)
_MOST_LOOKS = 10_000_000

# cloud-init's ssh_authkey_fingerprints module.
_WITH_KEYS = re.compile(r"ci-info: \++Authorized keys from \S+ for user (\S+?)\++$")
_WITHOUT_KEYS = re.compile(r"ci-info: no authorized SSH keys fingerprints found for user (\S+?)\.")
_DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may come out of a piece of user-data: a few kilobytes can stand for gigabytes.

    Attributes:
        size: Bytes, of all of its parts together: cloud-init holds all of it in the guest's memory,
            several times over.
        parts: Documents.
        values: Values of one archive of documents.
    """

    size: int = 16 * 1024**2
    parts: int = 10_000
    values: int = MOST_VALUES


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Part:
    """A document of user-data, as cloud-init sees it.

    Attributes:
        kind: Its MIME type, which decides how it is used.
        name: The file name under which it is kept, as given, or `part-001` and so on.
        content: The document.
        merging: The header that tells how to merge it with those before, if it has one.
    """

    kind: str
    name: str
    content: bytes
    merging: str = ""


class _Bounds:
    """How much may still come out of a piece of user-data.

    Args:
        name: What it is called in an error.
        limits: How much may come out of all of it.
    """

    def __init__(self, name: str, limits: Limits) -> None:
        self.limits = limits
        self._name = name
        self._bytes = limits.size
        self._parts = limits.parts

    def decompress(self, document: bytes) -> bytes:
        """Decompress gzip data; anything else is returned as it is.

        Raises:
            ValueError: It is damaged, or too large.
        """
        if not document.startswith(_GZIP_MAGIC):
            return document
        try:
            content = gunzip(document, self._bytes)
        except ValueError as error:
            raise ValueError(f"{self._name} {error}") from error
        self._bytes -= len(content)
        return content

    def count_part(self, content: bytes = b"") -> None:
        """Count a part.

        Args:
            content: Its content, if that is not in the document as it is: an archive may have it
                once, and repeat it by aliases.

        Raises:
            ValueError: There are too many, or they are too large.
        """
        self._parts -= 1
        self._bytes -= len(content)
        if self._parts < 0:
            raise ValueError(f"{self._name} has more than {self.limits.parts} parts")
        if self._bytes < 0:
            raise ValueError(
                f"{self._name} has archives whose parts have more than {self.limits.size} bytes"
            )


def decompress(document: bytes, name: str) -> bytes:
    """Decompress gzip data; anything else is returned as it is.

    Args:
        document: The document.
        name: Its name in an error.

    Raises:
        ValueError: It is damaged, or too large.
    """
    return _Bounds(name, LIMITS).decompress(document)


def is_mime(document: bytes) -> bool:
    """Whether a document is MIME, as cloud-init decides it (cloudinit/user_data.py)."""
    return b"mime-version:" in document[:4096].lower()


def parts(document: bytes, name: str, limits: Limits = LIMITS) -> list[Part]:
    """Split user-data into its parts as cloud-init does (cloudinit/user_data.py).

    Args:
        document: The user-data.
        name: What it is called in an error.
        limits: How much may come out of it.

    Raises:
        ValueError: It is damaged, so that cloud-init would make nothing of it; or too large.
    """
    bounds = _Bounds(name, limits)
    document = bounds.decompress(document)
    found: list[Part] = []
    if not is_mime(document):
        _add(found, Part(UNKNOWN, "", document), name, bounds)
        return found
    try:
        message = email.message_from_string(_within_bounds(document, name).decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is a MIME document that is not UTF-8: {error}") from error
    for part in _walk(message, name):
        _add(found, part, name, bounds)
    return found


def _within_bounds(document: bytes, name: str) -> bytes:
    """Return a MIME document, if reading it takes no longer than its length justifies.

    Raises:
        ValueError: It would.
    """
    lines = document.count(b"\n") + document.count(b"\r")
    boundaries = document.lower().count(b"boundary")
    if lines * (1 + boundaries) > _MOST_LOOKS:
        raise ValueError(
            f"{name} is a MIME document of {lines} lines with {boundaries} boundaries, which are "
            "more than can be read"
        )
    for header in _HEADER.finditer(document):
        if len(header[0]) > _LONGEST_HEADER:
            raise ValueError(
                f"{name} is a MIME document with a header of {len(header[0])} bytes, expected "
                f"{_LONGEST_HEADER} at most"
            )
    return document


def _walk(message: email.message.Message, name: str) -> Iterator[Part]:
    """Yield the parts of a MIME document, and the parts of parts; names may be missing."""
    try:
        for part in message.walk():
            if part.get_content_maintype() == "multipart":
                continue
            content = part.get_payload(decode=True)
            if not isinstance(content, bytes):
                raise ValueError(f"{name} has a part that is a message of its own")
            merging = part.get("Merge-Type") or part.get("X-Merge-Type") or ""
            filename = part.get_filename() or ""
            yield Part(part.get_content_type(), filename, content, str(merging))
    except RecursionError:
        raise ValueError(f"{name} is a MIME document of parts that are nested too deeply") from None
    except (LookupError, TypeError, UnicodeError) as error:
        raise ValueError(f"{name} is a MIME document that cannot be read: {error}") from error


def _add(found: list[Part], part: Part, name: str, bounds: _Bounds) -> None:
    """Add a part with its kind, or the entries of an archive."""
    bounds.count_part()
    kind, content = part.kind, part.content
    if kind in _COMPRESSED:
        if not content.startswith(_GZIP_MAGIC):
            raise ValueError(f"{name} has a part of type {kind} that is not compressed by gzip")
        kind, content = "text/plain", bounds.decompress(content)
    if kind in _LOOKED_INTO:
        kind = _find_kind(content) or kind
    if kind == _KIND_OF_ARCHIVES:
        for entry in _entries(content, name, bounds.limits):
            bounds.count_part(entry.content)
            found.append(_named(entry, found))
    else:
        found.append(_named(Part(kind, part.name, content, part.merging), found))


def _named(part: Part, before: list[Part]) -> Part:
    name = part.name or f"part-{len(before) + 1:03d}"
    return Part(part.kind, name, part.content, part.merging)


def _find_kind(content: bytes) -> str | None:
    text = content.decode(errors="surrogateescape").lower().lstrip()
    fitting = [beginning for beginning in _BEGINNINGS if text.startswith(beginning)]
    return _BEGINNINGS[max(fitting, key=len)] if fitting else None


def _entries(archive: bytes, name: str, limits: Limits) -> Iterator[Part]:
    entries = load_yaml(archive, name, limits.values)
    if not isinstance(entries, list):
        raise ValueError(f"{name} is an archive of {type(entries).__name__}, expected a list")
    for entry in entries:
        fields = {"content": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, dict):
            continue  # as cloud-init does
        content = fields.get("content", "")
        if not isinstance(content, (str, bytes)):
            raise ValueError(
                f"{name} is an archive with content {safe_repr(content)}, expected a text"
            )
        data = content.encode() if isinstance(content, str) else content
        otherwise = "text/cloud-config" if isinstance(content, str) else "application/octet-stream"
        kind = fields.get("type") or _find_kind(data) or otherwise
        if not isinstance(kind, str) or kind.count("/") == 0:
            raise ValueError(
                f"{name} is an archive with type {safe_repr(kind)}, expected a MIME type"
            )
        merging = fields.get("Merge-Type") or fields.get("X-Merge-Type") or ""
        yield Part(kind.lower(), str(fields.get("filename") or ""), data, str(merging))


def split(document: bytes, name: str, limits: Limits = LIMITS) -> Iterator[bytes]:
    """Yield the documents that user-data consists of, decompressed.

    Raises:
        ValueError: One of them is damaged, or they are too large.
    """
    bounds = _Bounds(name, limits)
    document = bounds.decompress(document)
    if is_mime(document):
        for content in _parts(document, name):
            bounds.count_part()
            yield from _split_archive(bounds.decompress(content), name, bounds)
    else:
        yield from _split_archive(document, name, bounds)


def _split_archive(document: bytes, name: str, bounds: _Bounds) -> Iterator[bytes]:
    """Yield the entries of a `#cloud-config-archive`; any other document as it is."""
    if not document.lstrip().startswith(_ARCHIVE):
        yield document
        return
    entries = load_yaml(document, name, bounds.limits.values)
    if not isinstance(entries, list):
        raise ValueError(f"{name} is an archive of {type(entries).__name__}, expected a list")
    for entry in entries:
        content = entry.get("content", "") if isinstance(entry, dict) else entry
        part = content if isinstance(content, bytes) else str(content).encode()
        bounds.count_part(part)
        yield part


def load_yaml(document: bytes, name: str, most_values: int = MOST_VALUES) -> object:
    """Parse a YAML or JSON document.

    Args:
        document: The document.
        name: What it is called in an error.
        most_values: As many values as it may have.

    Raises:
        ValueError: It is neither.
    """
    try:
        return parse_yaml(document, most_values)
    except ValueError as error:
        raise ValueError(f"{name} is not valid YAML: {error}") from error


def _parts(document: bytes, name: str) -> list[bytes]:
    """Return the contents of the parts of a MIME document, and of the parts of parts."""
    try:
        payloads = [
            part.get_payload(decode=True)
            for part in email.message_from_bytes(_within_bounds(document, name)).walk()
        ]
    except RecursionError:
        raise ValueError(f"{name} is a MIME document of parts that are nested too deeply") from None
    except (LookupError, TypeError, UnicodeError, ValueError) as error:
        raise ValueError(f"{name} is a MIME document that cannot be read: {error}") from error
    return [payload for payload in payloads if isinstance(payload, bytes)]


def explain_logins(user_data: bytes, console: Iterable[str], username: str) -> str:
    """Explain who can log in, and what to do so that a user can.

    Args:
        user_data: The user-data.
        console: The console's lines, without control sequences.
        username: The user that was refused.
    """
    reasons = []
    users = find_users(user_data)
    if users is not None and _DEFAULT not in users:
        reasons.append(
            f"the user-data's users are {', '.join(users) or 'none'}, without 'default', so that "
            "the default user, who gets the key, is not there: add 'default' to them, or log in "
            "(username=) as one of them whose ssh_authorized_keys have the key"
        )
    listed = [
        f"{kind} of {', '.join(names)}"
        for kind, names in zip(("keys", "no keys"), _find_keys(console), strict=True)
        if names
    ]
    if listed:
        reasons.append(f"on the console, cloud-init lists {' and '.join(listed)}")
    if not reasons:
        reasons.append(
            f"is {username} the user who gets the key (username=), and was the key left to them?"
        )
    return "; ".join(reasons)


def find_users(user_data: bytes) -> tuple[str, ...] | None:
    """Return the users that user-data has created, by `users`; None if it has no such key.

    https://docs.cloud-init.io/en/latest/reference/modules.html (`users`)
    """
    found: list[str] | None = None
    try:
        for part in split(user_data, "user-data"):
            config = None if part.startswith(b"#!") else _load(part)
            users = config.get("users") if isinstance(config, dict) else None
            if users is not None:
                found = [*(found or ()), *_names(users)]
    except ValueError:
        pass  # unknown
    return None if found is None else tuple(dict.fromkeys(found))


def _load(part: bytes) -> object:
    try:
        return load_yaml(part, "user-data")
    except ValueError:
        return None  # a template, maybe, or no cloud-config at all


def _names(users: object) -> Sequence[str]:
    """Read a list of names and of mappings, a mapping by name, or names in a text."""
    if isinstance(users, str):
        return [name.strip() for name in users.split(",")]
    if isinstance(users, dict):
        return [str(name) for name, wanted in users.items() if wanted]
    if not isinstance(users, list):
        return []
    return [str(user.get("name", "?")) if isinstance(user, dict) else str(user) for user in users]


def _find_keys(console: Iterable[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Find the users whose keys cloud-init has listed, and those who have none."""
    with_keys: dict[str, None] = {}
    without: dict[str, None] = {}
    for line in console:
        for pattern, names in ((_WITH_KEYS, with_keys), (_WITHOUT_KEYS, without)):
            if found := pattern.search(line):
                names.setdefault(found[1])
    return tuple(with_keys), tuple(without)
