from __future__ import annotations

import gzip
from email.message import Message
from email.mime.application import MIMEApplication
from email.mime.message import MIMEMessage
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText

import pytest

from pycloudlib.guest.data import userdata
from pycloudlib.guest.data.userdata import LIMITS, Limits

SCRIPT = b"#!/bin/sh\necho hello\n"
CONFIG = b"#cloud-config\na: 1\n"
DAMAGED = gzip.compress(SCRIPT, mtime=0)[:-6]


def mime(*parts: Message) -> bytes:
    document = MIMEMultipart()
    for part in parts:
        document.attach(part)
    return document.as_bytes()


def text(content: bytes, kind: str = "cloud-config") -> MIMEText:
    return MIMEText(content.decode(), kind)


def split(document: bytes, limits: Limits = LIMITS) -> list[bytes]:
    return list(userdata.split(document, "user_data", limits))


@pytest.mark.parametrize("document", [SCRIPT, CONFIG, b"", bytes(range(256))])
def test_one_document_is_given_as_it_is(document: bytes) -> None:
    assert split(document) == [document]


def test_compressed_document_is_decompressed() -> None:
    assert split(gzip.compress(SCRIPT, mtime=0)) == [SCRIPT]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_each_part_is_a_document(pack: type[bytes]) -> None:
    assert split(pack(mime(text(SCRIPT, "x-shellscript"), text(CONFIG)))) == [SCRIPT, CONFIG]


def test_parts_of_parts_are_documents_too() -> None:
    inner = MIMEMultipart()
    inner.attach(text(SCRIPT, "x-shellscript"))
    mail = MIMEMessage(text(b"carried"))
    assert split(mime(inner, mail, text(CONFIG))) == [SCRIPT, b"carried", CONFIG]


def test_compressed_part_is_decompressed() -> None:
    part = MIMEApplication(gzip.compress(CONFIG, mtime=0), "gzip")
    assert split(mime(part)) == [CONFIG]


@pytest.mark.parametrize("header", ["MIME-Version: 1.0", "mime-version: 1.0"])
def test_headers_are_known_in_any_case(header: str) -> None:
    document = f"Content-Type: text/cloud-config\n{header}\n\n#cloud-config\n".encode()
    assert split(document) == [b"#cloud-config\n"]


def test_text_that_tells_of_mime_far_from_its_beginning_is_one_document() -> None:
    document = SCRIPT + b"#" * 4096 + b"\nMIME-Version: 1.0\n"
    assert split(document) == [document]


@pytest.mark.parametrize("document", [DAMAGED, mime(MIMEApplication(DAMAGED, "gzip"))])
def test_damaged_document_is_named(document: bytes) -> None:
    with pytest.raises(ValueError, match="user_data is damaged gzip data"):
        split(document)


def test_other_documents_are_given_before_a_damaged_one() -> None:
    documents = userdata.split(mime(text(CONFIG), MIMEApplication(DAMAGED, "gzip")), "user_data")
    assert next(documents) == CONFIG


@pytest.mark.parametrize("damaged", [DAMAGED, b"\x1f\x8b", b"\x1f\x8bjust a beginning of it"])
def test_what_only_begins_as_gzip_does_is_damaged(damaged: bytes) -> None:
    with pytest.raises(ValueError, match="that name"):
        userdata.decompress(damaged, "that name")


@pytest.mark.parametrize("document", [b"", b"\x1f", SCRIPT])
def test_what_is_not_compressed_stays_as_it_is(document: bytes) -> None:
    assert userdata.decompress(document, "user_data") == document


ARCHIVE = b"""#cloud-config-archive
- type: text/x-shellscript
  content: "#!/bin/sh\\necho hello\\n"
- "#cloud-config\\na: 1\\n"
- content: !!binary I2Nsb3VkLWNvbmZpZwphOiAxCg==
- type: text/plain
"""


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_each_entry_of_an_archive_is_a_document(pack: type[bytes]) -> None:
    assert split(pack(ARCHIVE)) == [SCRIPT, CONFIG, CONFIG, b""]


def test_archive_in_a_part_is_taken_apart() -> None:
    assert split(mime(text(ARCHIVE, "cloud-config-archive"), text(CONFIG)))[0] == SCRIPT


@pytest.mark.parametrize(
    "archive", [b"- [", b"a: 1", b"just text", b"\xff\xfe", b"[" * 100_000, b"- 2001-99-99"]
)
def test_what_is_no_archive_is_told(archive: bytes) -> None:
    with pytest.raises(ValueError, match="that name"):
        list(userdata.split(b"#cloud-config-archive\n" + archive, "that name"))


BOMB = gzip.compress(bytes(20 * 1024**2), mtime=0)


def archive(*contents: bytes) -> bytes:
    return b"#cloud-config-archive\n- " + b"\n- ".join(contents) + b"\n"


@pytest.mark.parametrize(
    "document",
    [
        BOMB,
        mime(MIMEApplication(BOMB, "gzip")),
        gzip.compress(BOMB[:20] + BOMB[20:], mtime=0) + BOMB,
    ],
    ids=["alone", "part", "second member"],
)
def test_what_compressed_data_stands_for_is_bounded(document: bytes) -> None:
    for take_apart in (split, lambda data: userdata.parts(data, "user_data")):
        with pytest.raises(ValueError, match=r"^user_data stands for more than the .* bytes"):
            take_apart(document)


def test_parts_are_bounded_all_together() -> None:
    limits = Limits(size=2500)
    one = MIMEApplication(gzip.compress(b"#" * 1000, mtime=0), "gzip")
    assert len(split(mime(one, one), limits)) == 2
    for take_apart in (split, lambda data, most: userdata.parts(data, "user_data", most)):
        with pytest.raises(ValueError, match="stands for more than"):
            take_apart(mime(one, one, one), limits)


@pytest.mark.parametrize(
    "document",
    [archive(*[b"x"] * 10_001), mime(*[text(b"x")] * 10_001)],
    ids=["archive", "MIME"],
)
def test_number_of_parts_is_bounded(document: bytes) -> None:
    for take_apart in (split, lambda data: userdata.parts(data, "user_data")):
        with pytest.raises(ValueError, match="user_data has more than 10000 parts"):
            take_apart(document)


def laughs(first: str, line: str) -> bytes:
    """Write a few lines whose aliases stand for 9**12 values."""
    lines = [f"- &l0 {first}"]
    for number in range(12):
        lines.append(f"- &l{number + 1} " + line.format(", ".join([f"*l{number}"] * 9)))
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    "entries",
    [
        laughs("x", "[{}]"),
        laughs("{content: x}", "{{content: [{}]}}"),
        laughs("{a: b}", "{{<<: [{}]}}"),
    ],
    ids=["lists", "contents", "merged"],
)
def test_aliases_do_not_stand_for_billions_of_values(entries: bytes) -> None:
    document = b"#cloud-config-archive\n" + entries
    for take_apart in (split, lambda data: userdata.parts(data, "user_data")):
        with pytest.raises(ValueError, match="with its aliases it stands for more than 1000000"):
            take_apart(document)


@pytest.mark.parametrize("entry", [b"*a", b"{content: *a}", b"[*a, *a]"])
def test_aliases_of_a_long_text_do_not_stand_for_gigabytes(entry: bytes) -> None:
    text = b"- &a " + b"x" * 1_000_000 + b"\n"
    document = b"#cloud-config-archive\n" + text + (b"- " + entry + b"\n") * 9000
    for take_apart in (split, lambda data: userdata.parts(data, "user_data")):
        with pytest.raises(ValueError, match="with its aliases it stands for more than 1000000"):
            take_apart(document)


def test_archives_of_one_document_share_the_bounds() -> None:
    archive = b"#cloud-config-archive\n- &a " + b"x" * 100_000 + b"\n" + b"- *a\n" * 99
    assert sum(map(len, split(archive))) == 10_000_000
    part = b"--B\nContent-Type: text/cloud-config-archive\n\n" + archive
    document = b"MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=B\n\n" + part * 2
    for take_apart in (split, lambda data: userdata.parts(data, "user_data")):
        with pytest.raises(ValueError, match="archives whose parts have more than 16777216 bytes"):
            take_apart(document + b"--B--\n")


@pytest.mark.parametrize("number", [b"1" + b":1" * 5000, b"0x" + b"f" * 5000, b"1" * 5000 + b".5"])
def test_numbers_have_a_length_that_can_be_read(number: bytes) -> None:
    with pytest.raises(ValueError, match=r"a number of [0-9]+ characters, expected 4300"):
        userdata.load_yaml(b"a: " + number, "user_data")
    assert userdata.load_yaml(b"[1:30, 0x1f, 1.5, 1:30.5]", "x") == [90, 31, 1.5, 90.5]


def test_value_that_is_a_part_of_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="a value is a part of itself"):
        split(b"#cloud-config-archive\n- &a [*a]\n")


def test_aliases_of_an_ordinary_document_are_read() -> None:
    document = b"a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: *a}\n"
    both = {"x": [1, 2]}
    assert userdata.load_yaml(document, "x") == {"a": both, "b": both, "c": {**both, "y": both}}


MANY = 1_000_001


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"MIME-Version: 1.0\n\n" + b"\n" * (10 * MANY), "more than can be read"),
        (
            b"MIME-Version: 1.0\n"
            + b"".join(
                b'Content-Type: multipart/mixed; boundary="%d"\n\n--%d\n' % (depth, depth)
                for depth in range(50)
            )
            + b"\n" * MANY,
            "more than can be read",
        ),
        (
            b'MIME-Version: 1.0\nContent-Type: multipart/mixed; x="' + b";" * 50_000 + b"\n\nx",
            "a header of 50",
        ),
        (
            b"MIME-Version: 1.0\nContent-Type: multipart/mixed" + b";\n x" * 50_000 + b"\n\nx",
            "a header of 200",
        ),
    ],
    ids=["lines", "boundaries", "header", "folded header"],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_what_is_written_out_is_bounded(document: bytes, reason: str, pack: type[bytes]) -> None:
    for take_apart in (split, lambda data: userdata.parts(data, "user_data")):
        with pytest.raises(ValueError, match=reason):
            take_apart(pack(document))


@pytest.mark.parametrize("entries", [b"[" + b"x," * 6000 + b"]", b"-\n" * 6000, b"- {x}\n" * 3000])
def test_values_that_are_written_out_are_bounded(entries: bytes) -> None:
    for take_apart in (split, lambda data, most: userdata.parts(data, "user_data", most)):
        with pytest.raises(ValueError, match="it has more than 5000 values"):
            take_apart(b"#cloud-config-archive\n" + entries, Limits(values=5000))


def test_large_ordinary_document_is_read() -> None:
    lines = b"aGVsbG8gd29ybGQsIGhlbGxvIHdvcmxkLCBoZWxsbyB3b3JsZA==\n" * 60_000
    config = b"#cloud-config\nwrite_files:\n- content: |\n" + lines.replace(b"aG", b"   aG")
    assert split(gzip.compress(mime(text(config)), mtime=0)) == [config]
    files = userdata.load_yaml(config, "x")
    assert isinstance(files, dict)
    assert files["write_files"][0]["content"].encode() == lines
