"""NoCloud data for cloud-init, and the ISO 9660 volume that carries it.

https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html
"""

from __future__ import annotations

import email.encoders
import email.message
import email.mime.multipart
import email.mime.nonmultipart
import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pycloudlib._base.documents import safe_repr
from pycloudlib._base.files import private_opener
from pycloudlib.guest.access.hostkeys import HostKey
from pycloudlib.guest.data import userdata

VOLUME_UNIT = 4 << 20
"""Bytes. A copy of a saved machine gets another seed on a disk whose size its guest knows already:
so every volume has spare space."""

ROOT_DIRECTORY_SECTOR = 28 * 4
"""Where the root directory is in every volume, in sectors of 512 bytes: it is read first when a
volume is mounted, after the descriptors."""

_BLOCK = 2048  # ISO 9660: bytes of a logical block
# Bytes for descriptors and directories, and for another name and host keys at most.
_SPARE = 128 << 10
_DESCRIPTORS = (16, 17)  # blocks of the primary and of the supplementary descriptor
# Offsets in a descriptor at which volumes differ (ECMA-119, 8.4).
_SPACE_SIZE = 80
_RECORDING_TIME = 156 + 18  # in the root directory's record
_TIMES = 813  # four of them, each of 17 bytes
_NO_TIME = b"2000010100000000\0"

# With `ssh_keys`, cloud-init (cc_ssh) ignores any other configuration of host keys. User-data and
# vendor-data are known here; the image's own configuration is known in the guest, whose cloud-init
# renders this template: it is `merged_system_cfg`, before 23.3 `merged_cfg`. Where neither is
# defined, the guest makes its keys itself.
_HOST_KEYS_BEGIN = b"""\
## template: jinja
#cloud-config
{% set image = merged_system_cfg | default(merged_cfg | default({"ssh_keys": none})) %}
{% if "ssh_keys" in image or "ssh_genkeytypes" in image or "ssh_deletekeys" in image %}
{}
{% else %}
"""
# Before 23.1, cloud-init makes a supplied public key readable for root only. Without one, it
# derives it from the private key, readable for all.
_PUBLIC_BEGIN = b"{% if merged_system_cfg is defined %}\n"
_HOST_KEYS_END = b"{% endif %}\n{% endif %}\n"

Document = str | bytes | Mapping[str, Any] | None
"""A document for cloud-init as callers give it; a mapping is written as YAML."""


@dataclass(frozen=True, slots=True)
class Seed:
    """The files of a NoCloud volume, byte for byte; None for one that is left out."""

    user_data: bytes
    meta_data: bytes
    vendor_data: bytes | None = None
    network_config: bytes | None = None

    @property
    def files(self) -> dict[str, bytes]:
        """The volume's files by name."""
        named = {
            "user-data": self.user_data,
            "meta-data": self.meta_data,
            "vendor-data": self.vendor_data,
            "network-config": self.network_config,
        }
        return {name: data for name, data in named.items() if data is not None}

    @property
    def volume_length(self) -> int:
        """Bytes of a volume for it, with spare space, in whole `VOLUME_UNIT`s."""
        taken = sum(-(-len(data) // _BLOCK) * _BLOCK for data in self.files.values())
        return -(-(taken + _SPARE) // VOLUME_UNIT) * VOLUME_UNIT


def build_seed(
    *,
    instance_id: str,
    hostname: str,
    public_key: str,
    host_keys: Sequence[HostKey] = (),
    user_data: str | bytes | None = None,
    meta_data: Document = None,
    vendor_data: Document = None,
    network_config: Document = None,
    boothook: bytes | None = None,
) -> Seed:
    """Build a machine's seed.

    The user-data is not changed, whatever its kind: the SSH key is in the meta-data, and host keys
    are in the vendor-data, unless the image's own configuration is about them.

    Args:
        instance_id: For cloud-init; the caller's meta-data may name another.
        hostname: The same.
        public_key: The line that the default user's `authorized_keys` gets.
        host_keys: The machine's; none if it makes them itself.
        user_data: The caller's, if any.
        meta_data: The caller's, if any; a YAML or JSON mapping.
        vendor_data: The caller's, if any, of any kind; takes effect beside ours.
        network_config: The caller's, if any.
        boothook: A `#cloud-boothook` of ours, which cloud-init runs before its modules.

    Raises:
        TypeError: One of the documents is of a wrong type; names it.
        ValueError: The meta-data is not a mapping.
    """
    if user_data is not None and not isinstance(user_data, (str, bytes)):
        raise TypeError(f"user_data must be str or bytes, not {type(user_data).__name__}")
    defaults = {"instance-id": instance_id, "local-hostname": hostname}
    network = encode_document("network_config", network_config)
    return Seed(
        user_data=encode_document("user_data", user_data) or b"",
        meta_data=_merge_meta_data(defaults, public_key, meta_data),
        vendor_data=_merge_vendor_data(_host_key_config(host_keys), vendor_data, boothook),
        network_config=network,
    )


def write_iso(seed: Seed, path: Path, length: int = 0) -> None:
    """Write a seed as an ISO 9660 volume labelled `cidata`, which is how cloud-init finds it.

    All volumes of one length have the same descriptors: a guest that has read one's may read the
    rest of another.

    Args:
        seed: The seed.
        path: The new file.
        length: Its length in bytes, if that is enough, as for a copy whose guest knows its disks
            already; by default `Seed.volume_length`.
    """
    import pycdlib  # noqa: PLC0415 - heavy

    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    for number, (name, data) in enumerate(seed.files.items()):
        iso.add_fp(
            io.BytesIO(data),
            len(data),
            f"/FILE{number}.;1",
            rr_name=name,
            joliet_path=f"/{name}",
        )
    with open(path, "xb", opener=private_opener) as file:
        iso.write_fp(file)
        written = file.seek(0, io.SEEK_END)
        blocks = (length if length >= written else seed.volume_length) // _BLOCK
        file.truncate(blocks * _BLOCK)
        for block in _DESCRIPTORS:
            _make_alike(file, block * _BLOCK, blocks)
    iso.close()


def _make_alike(file: BinaryIO, descriptor: int, blocks: int) -> None:
    """Overwrite what differs between the descriptors of two volumes."""
    for offset, content in (
        (_SPACE_SIZE, struct.pack("<I", blocks) + struct.pack(">I", blocks)),
        (_RECORDING_TIME, bytes([100, 1, 1, 0, 0, 0, 0])),
        (_TIMES, 4 * _NO_TIME),
    ):
        file.seek(descriptor + offset)
        file.write(content)


def read_iso(path: Path) -> Seed:
    """Read a seed that `write_iso` wrote.

    Raises:
        ValueError: It is not such a volume.
    """
    import pycdlib  # noqa: PLC0415 - heavy

    iso = pycdlib.PyCdlib()
    try:
        iso.open(str(path))
        files: dict[str, bytes] = {}
        for child in iso.list_children(joliet_path="/"):
            if child.is_file():
                content = io.BytesIO()
                name = child.file_identifier().decode("utf-16_be")
                iso.get_file_from_iso_fp(content, joliet_path=f"/{name}")
                files[name] = content.getvalue()
        iso.close()
        return Seed(
            files["user-data"],
            files["meta-data"],
            files.get("vendor-data"),
            files.get("network-config"),
        )
    except (
        pycdlib.pycdlibexception.PyCdlibException,
        LookupError,
        OSError,
        struct.error,  # of a directory that is cut off
        UnicodeDecodeError,
    ) as error:
        raise ValueError(f"{path} is not a NoCloud volume that was made here: {error}") from error


def rename(seed: Seed, *, instance_id: str, hostname: str, host_keys: Sequence[HostKey]) -> Seed:
    """Return the seed of a copy of a machine: the same except for its identity.

    The host keys replace those that were supplied to the machine; without those, a copy makes its
    own, too.
    """
    meta_data = parse_mapping("meta_data", seed.meta_data)
    meta_data.update({"instance-id": instance_id, "local-hostname": hostname})
    config = _host_key_config(host_keys) if supplies_host_keys(seed) else None
    return Seed(
        seed.user_data,
        _yaml(meta_data, "meta_data"),
        _merge_vendor_data(seed.vendor_data, config),
        seed.network_config,
    )


def supplies_host_keys(seed: Seed) -> bool:
    """Whether a seed that was made here supplies host keys."""
    parts = userdata.split(seed.vendor_data or b"", "vendor-data")
    return any(part.startswith(_HOST_KEYS_BEGIN) for part in parts)


def encode_document(name: str, document: Document) -> bytes | None:
    """Return a document as cloud-init gets it.

    Raises:
        TypeError: It is of a wrong type.
        ValueError: It cannot be written as UTF-8.
    """
    check_type(name, document)
    if document is None or isinstance(document, bytes):
        return document
    if isinstance(document, str):
        try:
            return document.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} cannot be written as UTF-8: {error}") from error
    return _yaml(document, name)


def check_type(name: str, document: object) -> None:
    """Raise TypeError unless a document is of a type that can be given to cloud-init."""
    if document is not None and not isinstance(document, (str, bytes, Mapping)):
        raise TypeError(f"{name} must be str, bytes or a mapping, not {type(document).__name__}")


def _yaml(document: Mapping[str, Any], name: str) -> bytes:
    import yaml  # noqa: PLC0415 - heavy

    try:
        text: str = yaml.safe_dump(dict(document), sort_keys=False)
    except yaml.representer.RepresenterError as error:
        raise TypeError(f"{name} holds a value that YAML cannot express: {error}") from error
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    return text.encode()


def _merge_meta_data(defaults: Mapping[str, str], public_key: str, given: Document) -> bytes:
    own = parse_mapping("meta_data", given)
    keys = [*_public_keys(own.pop("public-keys", None)), public_key]
    return _yaml({**defaults, **own, "public-keys": keys}, "meta_data")


def parse_mapping(name: str, given: Document) -> dict[str, Any]:
    """Read a document that has to be a mapping, in YAML or JSON or as it is.

    Raises:
        TypeError: It is of a wrong type.
        ValueError: It is none; names it.
    """
    if isinstance(given, Mapping):
        return dict(given)
    parsed = userdata.load_yaml(encode_document(name, given) or b"", name) or {}
    if not isinstance(parsed, dict):
        raise ValueError(f"{name} must be a YAML mapping, not {type(parsed).__name__}")
    return parsed


def _public_keys(given: object) -> list[str]:
    """Flatten the shapes that cloud-init takes for `public-keys`: text, list, or mapping."""
    keys: list[str] = []
    # Each once: YAML's aliases can make an endless mapping of a few lines.
    seen: set[int] = set()
    left = [given]
    while left:
        value = left.pop()
        if isinstance(value, str):
            keys += value.splitlines()
        elif isinstance(value, (Mapping, list, tuple)):
            if id(value) not in seen:
                seen.add(id(value))
                left += reversed([*(value.values() if isinstance(value, Mapping) else value)])
        elif value is not None:
            raise TypeError(
                f"public-keys in meta_data holds {safe_repr(value)}, expected a text, a list or a "
                "mapping of texts"
            )
    return keys


def _host_key_config(host_keys: Sequence[HostKey]) -> bytes | None:
    """Write the part of the vendor-data that supplies host keys; None for none."""
    if not host_keys:
        return None
    private = {f"{key.type}_private": key.private for key in host_keys}
    public = {f"{key.type}_public": key.public for key in host_keys}
    return b"".join(
        (
            _HOST_KEYS_BEGIN,
            _yaml({"ssh_keys": private}, "the host keys"),
            _PUBLIC_BEGIN,
            _yaml({"ssh_keys": public}, "the host keys").partition(b"\n")[2],
            _HOST_KEYS_END,
        )
    )


def _merge_vendor_data(*documents: Document) -> bytes | None:
    """Merge documents into one: as the parts of a MIME document, or the only one as it is.

    Where two set the same key, the later part's value replaces the earlier one's: the caller's
    (cloudinit/handlers/cloud_config.py, `dict(replace)+list()+str()`).
    """
    given = [document for document in map(_vendor_document, documents) if document]
    if len(given) == 1:
        return given[0]
    if not given:
        return None
    parts = email.mime.multipart.MIMEMultipart()
    for part in given:
        parts.attach(_mime_part(part))
    return parts.as_bytes()


def _vendor_document(document: Document) -> bytes | None:
    if isinstance(document, Mapping):
        return b"#cloud-config\n" + _yaml(document, "vendor_data")
    return encode_document("vendor_data", document)


def _mime_part(document: bytes) -> email.message.Message:
    """Wrap a document of any kind so that cloud-init finds out its kind as it would alone.

    cloud-init looks at the content of `text/plain` parts only (cloudinit/user_data.py), walks into
    multipart ones, and takes a document for MIME when its first 4096 bytes say so.
    """
    document = userdata.decompress(document, "vendor_data")
    if userdata.is_mime(document):
        return email.message_from_bytes(document)
    part = email.mime.nonmultipart.MIMENonMultipart("text", "plain")
    part.set_payload(document)
    email.encoders.encode_base64(part)
    return part
