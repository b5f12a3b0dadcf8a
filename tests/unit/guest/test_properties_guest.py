"""Whatever a guest says, and whatever it is to be told, is taken or refused with its name."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
from email.mime.application import MIMEApplication
from email.mime.multipart import MIMEMultipart
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pycloudlib._base.deadline import Deadline
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest.access.hostkeys import HostKey
from pycloudlib.guest.boot.bootlines import Phase, clean_line, find_phase
from pycloudlib.guest.boot.cloudinit import parse_status
from pycloudlib.guest.boot.console import Console
from pycloudlib.guest.boot.readiness import BootWatch
from pycloudlib.guest.data import userdata
from pycloudlib.guest.data.runconfig import build_script, parse_address
from pycloudlib.guest.data.seed import Seed, build_seed, read_iso, rename, write_iso
from pycloudlib.guest.helper import HelperConnection, HelperError
from pycloudlib.qemu.vm.qmp import parse_event
from pycloudlib.result import Result
from pycloudlib.util import add_key_to_cloud_config
from tests.unit.hostile import PLAIN, STRANGE, TOO_DEEP, damaged, damaged_json, put

ANY = st.text(st.characters(exclude_categories=()), max_size=60)
DEEP_YAML = "[" * 1000
HOST_KEYS = [HostKey("ed25519", "private", "ssh-ed25519 AAAA")]

MIME = MIMEMultipart()
for _content in (b"#!/bin/sh\n", gzip.compress(b"#cloud-config\n", mtime=0)):
    MIME.attach(MIMEApplication(_content))
MIME_TEXT = MIME.as_bytes()
DOCUMENTS = (
    damaged(MIME_TEXT)
    | damaged(gzip.compress(MIME_TEXT, mtime=0))
    | damaged(b"#cloud-config\nruncmd: [[ls]]\n")
    | st.binary(max_size=60).map(lambda content: b"\x1f\x8b\x08" + content)
    | st.binary(max_size=200).map(lambda content: b"MIME-Version: 1.0\n" + content)
)


def nested_mime(depth: int) -> bytes:
    """Give a message in a message in a message."""
    return b"MIME-Version: 1.0\n" + b"Content-Type: message/rfc822\n\n" * depth


@given(DOCUMENTS)
@example(nested_mime(5000))
@example(b"MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary*=\0''x\n\nx")
@example(b"MIME-Version: 1.0\nContent-Transfer-Encoding: x-uuencode\n\nbegin 6\n\xff")
@example(b"MIME-Version: 1.0\nContent-Type: text/plain; charset*=no-such'x'y\n\nx")
def test_user_data_is_split_or_told_to_be_damaged(document: bytes) -> None:
    try:
        assert all(isinstance(part, bytes) for part in userdata.split(document, "that name"))
    except ValueError as error:
        assert "that name" in str(error)


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=3), st.booleans())
def test_parts_are_given_as_they_were_put_in(parts: list[bytes], compressed: bool) -> None:
    document = MIMEMultipart()
    for part in parts:
        document.attach(MIMEApplication(gzip.compress(part, mtime=0)))
    text = document.as_bytes()
    assert list(userdata.split(gzip.compress(text, mtime=0) if compressed else text, "x")) == parts


@given(st.binary(max_size=200))
def test_what_is_compressed_is_given_as_it_was(content: bytes) -> None:
    assert userdata.decompress(gzip.compress(content, mtime=0), "x") == content


@given(ANY | DOCUMENTS | ANY.map(lambda text: "#cloud-config\n" + text))
@example("#!\ud800")
@example("#cloud-config\n" + DEEP_YAML)
@example('#cloud-config\na: !!int ""')
@example("#cloud-config\n? [a]\n: b")
def test_user_data_for_a_running_machine_is_a_script_or_refused(user_data: str | bytes) -> None:
    try:
        script = build_script(user_data)
    except ValueError as error:
        assert "user_data" in str(error)
    else:
        subprocess.run(["sh", "-n"], input=script.encode(), check=True)


YAML = (
    PLAIN.map(json.dumps)
    | ANY
    | st.binary(max_size=40)
    | st.sampled_from([DEEP_YAML, "a: 2001-99-99", '!!int ""', "a: !!bool x", "=", "a: &a [*a]"])
    | st.dictionaries(st.sampled_from(["public-keys", "instance-id", "x"]), PLAIN, max_size=3)
)


@given(YAML, YAML)
@example("public-keys: &a [*a, key]", None)
@example("public-keys:\n" + "".join(f"- &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)), "")
@example("a: [" * 400, None)
@example({"a": "\ud800"}, "\ud800")
def test_meta_data_is_a_mapping_or_refused(meta_data: Any, vendor_data: Any) -> None:
    try:
        seed = build_seed(
            instance_id="iid",
            hostname="vm",
            public_key="ssh-ed25519 AAAA",
            host_keys=HOST_KEYS,
            meta_data=meta_data,
            vendor_data=vendor_data,
        )
    except (TypeError, ValueError) as error:
        assert "meta_data" in str(error) or "vendor_data" in str(error)
    else:
        written = yaml.safe_load(seed.meta_data)
        assert written["public-keys"][-1] == "ssh-ed25519 AAAA"
        assert {"instance-id", "local-hostname"} <= written.keys()


@given(
    ANY.map(lambda text: "#cloud-config\n" + text) | YAML.filter(lambda text: isinstance(text, str))
)
def test_cloud_config_gets_a_key_or_is_refused(user_data: str) -> None:
    try:
        config = yaml.safe_load(add_key_to_cloud_config("ssh-ed25519 AAAA", user_data))
    except ValueError as error:
        assert "user_data" in str(error)
    else:
        assert "ssh-ed25519 AAAA" in config["ssh_authorized_keys"]


SEEDS = st.builds(
    Seed,
    st.binary(max_size=3000),
    st.just(b"instance-id: a\n"),
    st.none() | st.binary(max_size=30),
    st.none() | st.binary(max_size=30),
)


@settings(max_examples=15)
@given(SEEDS)
def test_seed_is_read_back_as_it_was_written(tmp_path: Path, seed: Seed) -> None:
    path = tmp_path / "seed.iso"
    path.unlink(missing_ok=True)
    write_iso(seed, path)
    assert read_iso(path) == seed


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("volume") / "seed.iso"
    write_iso(Seed(b"#!/bin/sh\n" * 300, b"a: b\n", b"x", b"y"), path)
    return path


# Where descriptors, path tables and directories are; behind them there is content.
STRUCTURES = st.integers(0, 0x200) | st.integers(0x8000, 0x9000) | st.integers(0xA000, 0x12000)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(STRUCTURES, st.binary(min_size=1, max_size=8)), max_size=4),
    st.none() | STRUCTURES,
)
def test_damaged_seed_is_read_or_told_of(
    volume: Path, tmp_path: Path, changes: list[tuple[int, bytes]], end: int | None
) -> None:
    path = tmp_path / "seed.iso"
    shutil.copy(volume, path)
    with path.open("r+b") as file:
        for offset, content in changes:
            file.seek(offset)
            file.write(content)
        if end is not None:
            file.truncate(end)
    try:
        read_iso(path)
    except ValueError as error:
        assert f"{path} is not a NoCloud volume" in str(error)


@pytest.mark.parametrize("content", [*STRANGE, None])
def test_what_is_no_seed_is_told_of(content: bytes | None, tmp_path: Path) -> None:
    put(tmp_path / "seed.iso", content)
    with pytest.raises(ValueError, match=r"seed\.iso is not a NoCloud volume"):
        read_iso(tmp_path / "seed.iso")


@given(st.binary(max_size=40))
@example(DEEP_YAML.encode())
@example(b"5")
def test_copy_of_a_damaged_seed_is_told_of(meta_data: bytes) -> None:
    try:
        rename(Seed(b"", meta_data), instance_id="i", hostname="h", host_keys=HOST_KEYS)
    except ValueError as error:
        assert "meta_data" in str(error)


STATUS = {
    "v1": {
        "datasource": "DataSourceNoCloud",
        "init-local": {"errors": [], "start": 1.5, "finished": 2.5},
        "init": {"errors": ["a"], "start": 3, "finished": None},
        "modules-final": {"errors": [], "recoverable_errors": {"WARNING": ["b"]}},
    }
}
OUTPUTS = (
    damaged_json(json.dumps(STATUS).encode()).map(
        lambda document: "finished\n" + document.decode(errors="replace")
    )
    | damaged(b"crashed\n{}").map(lambda output: output.decode(errors="replace"))
    | ANY
)


@given(OUTPUTS)
@example("finished\n" + "[" * TOO_DEEP)
@example("finished\n{")
@example('finished\n{"v1": {"init": {"start": "x"}}}')
@example('finished\n{"v1": {"init": {"start": 1' + "0" * 400 + "}}}")
@example('finished\n{"v1": {"init": {"errors": "text"}}}')
def test_status_of_cloudinit_is_read_or_told_to_be_none(output: str) -> None:
    try:
        status = parse_status(output)
    except ValueError as error:
        assert "not a status of cloud-init" in str(error)
    else:
        assert all(isinstance(error, str) for error in status.errors)
        for stage in status.stages:
            assert isinstance(stage.started, (float, type(None)))


@given(ANY, ANY)
@example("[" * TOO_DEEP, "")
@example('[{"addr_info": 5}]', "")
@example('{"a": 1}', "")
def test_address_is_read_or_told_to_be_none(output: str, stderr: str) -> None:
    try:
        parse_address(Result(output, stderr))
    except ValueError as error:
        assert "no address in" in str(error)


CONSOLE = st.binary(max_size=80) | st.sampled_from(
    [b"Cloud-init v. 24.1 running 'init'", b"SeaBIOS", b"\x1b[31m", b"\x1b[0;"]
)


@given(CONSOLE)
def test_line_of_the_console_is_a_text_without_controls(line: bytes) -> None:
    text = clean_line(line)
    assert "\x1b" not in text
    assert clean_line(text.encode()) == text
    assert find_phase(line) is None or isinstance(find_phase(line), Phase)


@settings(max_examples=20)
@given(st.lists(CONSOLE, max_size=8), st.integers(5, 60))
def test_boot_is_followed_alike_in_any_pieces(
    tmp_path: Path, pieces: list[bytes], size: int
) -> None:
    content = b"\n".join(pieces)
    whole, split = tmp_path / "whole", tmp_path / "split"
    whole.write_bytes(content)
    split.write_bytes(b"")
    watches = [BootWatch(Console(path), 0, 0) for path in (whole, split)]
    watches[0].look()
    for start in range(0, len(content), size):
        with split.open("ab") as file:
            file.write(content[start : start + size])
        watches[1].look()
    order = list(Phase)
    for watch in watches:
        numbers = [order.index(start.phase) for start in watch.timeline]
        assert numbers == sorted(set(numbers))
    assert watches[0].phase == watches[1].phase


@pytest.mark.parametrize(
    "line",
    [
        b"Cloud-init v. " * 80_000,
        b"\x1b[" * 500_000,
        b"\x1b[" + b"0" * 1_000_000,
        b" " * 1_000_000,
        b"\xff" * 1_000_000,
    ],
)
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_console_that_never_ends_its_line_is_followed(
    line: bytes, end: bytes, tmp_path: Path
) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(line + end)
    watch = BootWatch(Console(log), 0, 0)
    begun = os.times().user
    watch.look()
    find_phase(line)
    clean_line(line)
    assert os.times().user - begun < 2
    assert len(watch.last_line) <= 4096


ANSWERS = (
    st.dictionaries(st.sampled_from(["exit", "out", "err", "now", "error"]), PLAIN, max_size=3)
    .map(json.dumps)
    .map(lambda text: text.encode()[:-1] + b', "id": 1}' if text != "{}" else b'{"id": 1}')
    | st.binary(max_size=40)
    # All of them are sent before the first is read, so they have to have room in the socket.
    | st.sampled_from([content for content in STRANGE if len(content) < 10_000])
)


@given(st.lists(ANSWERS, max_size=3))
@example([b'{"id": 1, "exit": "x"}'])
@example([b'{"id": 2, "out": "x"}'])
@example([b'{"id": 2, "out": 1e400}'])
@example([b'{"id": 1, "out": -5, "exit": 0}'])
@example([b'{"id": 1, "out": null, "exit": 0}'])
@example([b"[" * TOO_DEEP])
def test_helper_that_answers_anything_is_an_error_at_most(answers: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    with pytest.MonkeyPatch.context() as patch, theirs:
        patch.setattr("pycloudlib.guest.helper.secrets.randbits", lambda _: 1)
        theirs.sendall(b"\n".join([*answers, b""]))
        theirs.shutdown(socket.SHUT_WR)
        with HelperConnection(ours) as connection:
            try:
                command = connection.execute(["ls"], "user", b"", Deadline.after(5))
            except (HelperError, PycloudlibTimeoutError) as error:
                assert str(error)
            else:
                assert isinstance(command.status, int)


EVENT = {"event": "STOP", "data": {}, "timestamp": {"seconds": 1, "microseconds": 500000}}


@given(damaged_json(json.dumps(EVENT).encode()))
@example(b"{}")
@example(b'{"event": "STOP", "timestamp": {"seconds": "1", "microseconds": 0}}')
@example(b'{"event": "STOP", "data": 5, "timestamp": {"seconds": 1, "microseconds": 0}}')
@example(b'{"event": "STOP", "timestamp": {"seconds": 1' + b"0" * 400 + b', "microseconds": 0}}')
def test_event_is_read_or_told_to_be_none(content: bytes) -> None:
    assert parse_event(EVENT).timestamp == 1.5
    try:
        message = json.loads(content)
    except (ValueError, RecursionError):
        return
    try:
        event = parse_event(message)
    except ValueError as error:
        assert "is not an event" in str(error)
    else:
        assert isinstance(event.data.get("node-name"), object)
        assert isinstance(event.timestamp, float)
