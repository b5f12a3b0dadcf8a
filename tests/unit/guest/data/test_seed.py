from __future__ import annotations

import email
import email.message
import gzip
import io
import json
import stat
from collections.abc import Iterator, Mapping
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path
from typing import Any

import jinja2
import pycdlib
import pytest
import yaml

from pycloudlib.guest.access.hostkeys import HostKey
from pycloudlib.guest.data.seed import Seed, build_seed, supplies_host_keys, write_iso

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA user@host"
HOST_KEYS = tuple(
    HostKey(kind, f"-----BEGIN {kind}-----\nabc\n-----END\n", f"ssh-{kind} BBBB root@vm")
    for kind in ("ed25519", "ecdsa", "rsa")
)


def make_seed(**given: Any) -> Seed:
    fixed: dict[str, Any] = {
        "instance_id": "iid-1",
        "hostname": "vm-1",
        "public_key": KEY,
        "host_keys": HOST_KEYS,
    }
    return build_seed(**{**fixed, **given})


def meta_data_of(seed: Seed) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(seed.meta_data)
    return parsed


def make_multipart() -> bytes:
    message = MIMEMultipart()
    message.attach(MIMEText("#!/bin/sh\necho part\n", "x-shellscript"))
    message.attach(MIMEText("#cloud-config\nfrom_multipart: true\n", "cloud-config"))
    return message.as_bytes()


# cloud-init's own way of reading user-data and vendor-data (cloudinit/user_data.py): parts of
# these types are looked into; whatever else has the type that its header says.
EXAMINED_TYPES = ("text/plain", "text/x-not-multipart", "text/x-shellscript")
GZIP_TYPES = ("application/gzip", "application/x-gzip")
BEGINNINGS = {
    b"#cloud-config-archive": "text/cloud-config-archive",
    b"#cloud-boothook": "text/cloud-boothook",
    b"#cloud-config": "text/cloud-config",
    b"## template: jinja": "text/jinja2",
    b"#include": "text/x-include-url",
    b"#!": "text/x-shellscript",
}


def read_as_cloud_init(blob: bytes) -> Iterator[tuple[str, bytes]]:
    """Give the type and content of each part, as cloud-init would take it."""
    data = gzip.decompress(blob) if blob.startswith(b"\x1f\x8b") else blob
    if b"mime-version:" not in data[:4096].lower():
        yield find_kind("text/x-not-multipart", data), data
        return
    for part in email.message_from_bytes(data).walk():
        if part.get_content_maintype() == "multipart":
            continue
        payload = part.get_payload(decode=True)
        assert isinstance(payload, bytes)
        kind = part.get_content_type()
        if kind in GZIP_TYPES:
            payload, kind = gzip.decompress(payload), "text/plain"
        yield find_kind(kind, payload), payload


def find_kind(kind: str, payload: bytes) -> str:
    if kind not in EXAMINED_TYPES:
        return kind
    return next((k for start, k in BEGINNINGS.items() if payload.startswith(start)), kind)


def render_as_cloud_init(template: bytes, **facts: Any) -> bytes:
    """Render a template (cloudinit/templater.py) of the guest's facts."""
    first, _, text = template.decode().partition("\n")
    assert first == "## template: jinja"
    environment = jinja2.Environment(
        undefined=jinja2.DebugUndefined, trim_blocks=True, autoescape=False
    )
    return environment.from_string(text).render(**facts).encode()


IMAGE: dict[str, Any] = {"merged_system_cfg": {"datasource_list": ["NoCloud"]}}
FACTS = IMAGE | {"v1": {"region": "here"}}


def merge_as_cloud_init(blob: bytes, facts: Mapping[str, Any] = IMAGE) -> dict[str, Any]:
    """Merge the cloud-configs: by default a later part's key replaces an earlier one's."""
    merged: dict[str, Any] = {}
    for kind, payload in read_as_cloud_init(blob):
        is_template = kind == "text/jinja2"
        content = render_as_cloud_init(payload, **facts) if is_template else payload
        if content.startswith(b"#cloud-config") and kind in ("text/jinja2", "text/cloud-config"):
            merged.update(yaml.safe_load(content))
    return merged


USER_DATA = {
    "cloud-config": b"#cloud-config\nruncmd: [echo]\n",
    "script": b"#!/bin/sh\necho hello\r\n",
    "MIME": make_multipart(),
    "archive": b"#cloud-config-archive\n- type: text/cloud-config\n  content: 'a: 1'\n",
    "jinja": b"## template: jinja\n#cloud-config\nruncmd: ['echo {{ v1.region }}']\n",
    "gzip": gzip.compress(b"#cloud-config\nruncmd: [echo]\n", mtime=0),
    "no line end": b"#cloud-config\na: 1",
    "rubbish": bytes(range(256)),
    "empty": b"",
}


@pytest.mark.parametrize("kind", USER_DATA)
def test_user_data_stays_byte_for_byte(kind: str) -> None:
    assert make_seed(user_data=USER_DATA[kind]).user_data == USER_DATA[kind]


@pytest.mark.parametrize("kind", ["cloud-config", "script", "MIME", "archive", "jinja", "empty"])
def test_user_data_given_as_text_stays_as_it_is(kind: str) -> None:
    text = USER_DATA[kind].decode()

    assert make_seed(user_data=text).user_data == USER_DATA[kind]


def test_user_data_beyond_ascii_is_utf_8() -> None:
    assert make_seed(user_data="# grüß ☃\n").user_data == "# grüß ☃\n".encode()


def test_without_user_data_there_is_an_empty_file() -> None:
    # Without the file cloud-init does not take the volume for its own.
    assert make_seed().files["user-data"] == b""


@pytest.mark.parametrize("user_data", [None, *USER_DATA.values()], ids=["none", *USER_DATA])
def test_key_comes_by_meta_data_whatever_the_user_data(user_data: bytes | None) -> None:
    assert meta_data_of(make_seed(user_data=user_data))["public-keys"] == [KEY]


def test_meta_data_names_the_instance() -> None:
    meta_data = meta_data_of(make_seed())

    assert meta_data["instance-id"] == "iid-1"
    assert meta_data["local-hostname"] == "vm-1"


@pytest.mark.parametrize("write", [yaml.safe_dump, json.dumps, dict])
def test_callers_meta_data_is_honoured(write: Any) -> None:
    given = {"instance-id": "mine", "local-hostname": "box", "region": {"name": "here"}}

    meta_data = meta_data_of(make_seed(meta_data=write(given)))

    assert meta_data == {**given, "public-keys": [KEY]}


def test_callers_meta_data_may_be_bytes() -> None:
    assert meta_data_of(make_seed(meta_data=b"instance-id: mine\n"))["instance-id"] == "mine"


def test_callers_meta_data_mapping_is_not_changed() -> None:
    given = {"public-keys": ["theirs"]}

    make_seed(meta_data=given)

    assert given == {"public-keys": ["theirs"]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("one", ["one"]),
        ("one\ntwo\n", ["one", "two"]),
        (["one", "two"], ["one", "two"]),
        (("one", "two"), ["one", "two"]),
        ({"name": "one", "other": "two"}, ["one", "two"]),
        ({"name": ["one", "two"]}, ["one", "two"]),
        ({0: {"openssh-key": "one"}}, ["one"]),
        ([], []),
        (None, []),
    ],
)
def test_callers_keys_of_any_shape_stay_beside_ours(given: object, expected: list[str]) -> None:
    keys = meta_data_of(make_seed(meta_data={"public-keys": given}))["public-keys"]

    assert sorted(keys) == sorted([*expected, KEY])


@pytest.mark.parametrize("given", [5, [5], {"name": 5}, True])
def test_callers_keys_of_no_known_shape_are_not_dropped_in_silence(given: object) -> None:
    with pytest.raises((TypeError, ValueError), match="public-keys"):
        make_seed(meta_data={"public-keys": given})


SUPPLIED = {f"{key.type}_private": key.private for key in HOST_KEYS} | {
    f"{key.type}_public": key.public for key in HOST_KEYS
}


def test_host_keys_come_by_vendor_data() -> None:
    vendor_data = make_seed().vendor_data

    assert vendor_data is not None
    assert merge_as_cloud_init(vendor_data) == {"ssh_keys": SUPPLIED}


def test_cloud_init_before_23_3_derives_the_public_keys() -> None:
    """Some of these would let nobody read one that is supplied."""
    vendor_data = make_seed().vendor_data

    assert vendor_data is not None
    config = merge_as_cloud_init(vendor_data, {"merged_cfg": IMAGE["merged_system_cfg"]})
    private = {name: key for name, key in SUPPLIED.items() if name.endswith("_private")}
    assert config == {"ssh_keys": private}


@pytest.mark.parametrize(
    "facts",
    [
        {"merged_system_cfg": {"ssh_genkeytypes": ["ed25519"]}},
        {"merged_system_cfg": {"ssh_deletekeys": False}},
        {"merged_system_cfg": {"ssh_keys": {"rsa_private": "theirs"}}},
        {"merged_cfg": {"ssh_deletekeys": True}},
        {},
    ],
    ids=["types", "kept keys", "keys", "before 23.3", "nothing known of the image"],
)
def test_image_that_says_anything_of_host_keys_has_them_made_by_the_guest(
    facts: Mapping[str, Any],
) -> None:
    vendor_data = make_seed().vendor_data

    assert vendor_data is not None
    assert merge_as_cloud_init(vendor_data, facts) == {}


def test_without_host_keys_there_is_no_vendor_data() -> None:
    assert make_seed(host_keys=()).vendor_data is None
    assert make_seed(host_keys=(), vendor_data="#!/bin/sh\n").vendor_data == b"#!/bin/sh\n"


def test_seed_says_whether_it_supplies_host_keys() -> None:
    script = b"#!/bin/sh\n"
    for given in (None, script):
        assert supplies_host_keys(make_seed(vendor_data=given))
        assert not supplies_host_keys(make_seed(host_keys=(), vendor_data=given))


VENDOR_DATA: Mapping[str, tuple[Any, list[tuple[str, bytes]]]] = {
    "text": (
        "#cloud-config\na: 1\n",
        [("text/cloud-config", b"#cloud-config\na: 1\n")],
    ),
    "bytes": (
        b"#cloud-config\na: 1\n",
        [("text/cloud-config", b"#cloud-config\na: 1\n")],
    ),
    "script": (
        "#!/bin/sh\necho grüß\n",
        [("text/x-shellscript", "#!/bin/sh\necho grüß\n".encode())],
    ),
    "boothook": (
        "#cloud-boothook\n#!/bin/sh\n",
        [("text/cloud-boothook", b"#cloud-boothook\n#!/bin/sh\n")],
    ),
    "archive": (
        USER_DATA["archive"],
        [("text/cloud-config-archive", USER_DATA["archive"])],
    ),
    "jinja": (
        USER_DATA["jinja"],
        [("text/jinja2", USER_DATA["jinja"])],
    ),
    "gzip": (
        gzip.compress(b"#!/bin/sh\necho zipped\n", mtime=0),
        [("text/x-shellscript", b"#!/bin/sh\necho zipped\n")],
    ),
    "MIME": (make_multipart(), list(read_as_cloud_init(make_multipart()))),
    "MIME as text": (make_multipart().decode(), list(read_as_cloud_init(make_multipart()))),
    "zipped MIME": (
        gzip.compress(make_multipart(), mtime=0),
        list(read_as_cloud_init(make_multipart())),
    ),
}


@pytest.mark.parametrize("kind", VENDOR_DATA)
def test_callers_vendor_data_takes_effect_beside_the_host_key(kind: str) -> None:
    given, expected = VENDOR_DATA[kind]

    vendor_data = make_seed(vendor_data=given).vendor_data

    assert vendor_data is not None
    parts = list(read_as_cloud_init(vendor_data))
    missing = [part for part in expected if part not in parts]
    assert not missing, f"cloud-init would see only {parts}"
    assert merge_as_cloud_init(vendor_data, FACTS).get("ssh_keys"), "the host keys are lost"


def test_callers_vendor_data_may_be_a_mapping() -> None:
    vendor_data = make_seed(vendor_data={"runcmd": ["echo"]}).vendor_data

    assert vendor_data is not None
    merged = merge_as_cloud_init(vendor_data)
    assert merged["runcmd"] == ["echo"]
    assert merged["ssh_keys"]


@pytest.mark.parametrize("empty", [None, "", b""])
def test_empty_vendor_data_is_none(empty: str | bytes | None) -> None:
    assert make_seed(vendor_data=empty).vendor_data == make_seed().vendor_data


def test_network_config_is_honoured() -> None:
    config = {"version": 2, "ethernets": {"nic": {"match": {"name": "en*"}, "dhcp4": True}}}

    as_mapping = make_seed(network_config=config).network_config
    as_text = make_seed(network_config="version: 2\n").network_config

    assert as_mapping is not None
    assert yaml.safe_load(as_mapping) == config
    assert as_text == b"version: 2\n"


def test_without_network_config_there_is_no_file() -> None:
    assert "network-config" not in make_seed().files


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("user_data", {"runcmd": []}),
        ("user_data", 5),
        ("user_data", ["#cloud-config"]),
        ("meta_data", 5),
        ("meta_data", ["instance-id"]),
        ("vendor_data", 5),
        ("vendor_data", ["#cloud-config"]),
        ("vendor_data", []),
        ("network_config", 5),
        ("network_config", []),
    ],
)
def test_document_of_a_wrong_type_is_named(argument: str, value: object) -> None:
    with pytest.raises(TypeError, match=argument):
        make_seed(**{argument: value})


@pytest.mark.parametrize("argument", ["meta_data", "vendor_data", "network_config"])
def test_mapping_that_yaml_cannot_tell_is_named(argument: str) -> None:
    with pytest.raises((TypeError, ValueError), match=argument):
        make_seed(**{argument: {"key": object()}})


@pytest.mark.parametrize(
    "text", ["- a\n- list\n", "just text", "a: [unclosed\n", b"\xff\xfe\xfd", "a: 1\na b: : c"]
)
def test_meta_data_that_is_no_mapping_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="meta_data"):
        make_seed(meta_data=text)


@pytest.fixture
def seed() -> Seed:
    return Seed(
        user_data=bytes(range(256)) * 40,
        meta_data=b"instance-id: one\n",
        vendor_data=b"#cloud-config\n{}\n",
        network_config=b"version: 2\n",
    )


@pytest.mark.parametrize("tree", ["joliet_path", "rr_path"])
def test_volume_holds_the_files_exactly(tree: str, seed: Seed, tmp_path: Path) -> None:
    path = tmp_path / "seed.iso"
    write_iso(seed, path)
    iso = pycdlib.PyCdlib()
    iso.open(str(path))
    found = {}
    for entry in iso.list_children(**{tree: "/"}):
        if entry.is_dir():
            continue
        name = (
            entry.file_identifier().decode("utf-16-be")
            if tree == "joliet_path"
            else entry.rock_ridge.name().decode()
        )
        content = io.BytesIO()
        iso.get_file_from_iso_fp(content, **{tree: f"/{name}"})
        found[name] = content.getvalue()
    iso.close()

    assert found == {
        "user-data": seed.user_data,
        "meta-data": seed.meta_data,
        "vendor-data": seed.vendor_data,
        "network-config": seed.network_config,
    }


def test_volume_is_labelled_cidata(seed: Seed, tmp_path: Path) -> None:
    path = tmp_path / "seed.iso"
    write_iso(seed, path)
    iso = pycdlib.PyCdlib()
    iso.open(str(path))

    assert iso.joliet_vd is not None
    assert iso.pvd.volume_identifier.rstrip() == b"cidata"
    assert iso.joliet_vd.volume_identifier.decode("utf-16-be").rstrip(" \0") == "cidata"
    iso.close()


def test_documents_that_are_left_out_are_no_files(tmp_path: Path) -> None:
    path = tmp_path / "seed.iso"
    write_iso(Seed(user_data=b"", meta_data=b"instance-id: one\n"), path)
    iso = pycdlib.PyCdlib()
    iso.open(str(path))
    names = [
        entry.rock_ridge.name() for entry in iso.list_children(rr_path="/") if not entry.is_dir()
    ]
    iso.close()

    assert sorted(names) == [b"meta-data", b"user-data"]


def test_volume_is_readable_by_its_owner_alone(seed: Seed, tmp_path: Path) -> None:
    path = tmp_path / "seed.iso"
    write_iso(seed, path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
