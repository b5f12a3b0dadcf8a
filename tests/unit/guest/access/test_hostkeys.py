from __future__ import annotations

import base64
import contextlib
import gzip
import json
import socket
import threading
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path

import paramiko
import pytest
import yaml

from pycloudlib.guest.access import ssh
from pycloudlib.guest.access.hostkeys import HostKey, MachineHostKeys, are_decided_by, pin

SUPPLIED = HostKey("ed25519", "secret", "ssh-ed25519 AAAAsupplied root@vm")
SUPPLIED_RSA = HostKey("rsa", "secret", "ssh-rsa AAAArsa root@vm")
OTHER = "ssh-ed25519 AAAAother"


@pytest.fixture
def known_hosts(tmp_path: Path) -> Path:
    return tmp_path / "known_hosts"


def keys_of(known_hosts: Path, *, is_machine: bool) -> MachineHostKeys:
    return MachineHostKeys(known_hosts, lambda _connection: is_machine)


def test_supplied_keys_are_pinned_for_their_owner_alone(known_hosts: Path) -> None:
    pin(known_hosts, [SUPPLIED, SUPPLIED_RSA])
    pinned = keys_of(known_hosts, is_machine=False).pinned()
    assert pinned == ["ssh-ed25519 AAAAsupplied", "ssh-rsa AAAArsa"]
    assert known_hosts.stat().st_mode & 0o777 == 0o600


def test_nothing_is_pinned_where_nothing_was_supplied(known_hosts: Path) -> None:
    assert list(keys_of(known_hosts, is_machine=True).pinned()) == []


@pytest.mark.parametrize("supplied", [(), (SUPPLIED,)], ids=["none", "supplied"])
def test_key_that_somebody_else_shows_is_refused(
    supplied: tuple[HostKey, ...], known_hosts: Path
) -> None:
    """The first one, too, where none is known yet."""
    pin(known_hosts, supplied)
    keys = keys_of(known_hosts, is_machine=False)
    before = keys.pinned()
    with socket.socket() as connection:
        assert not keys.accepts(OTHER, connection)
    assert keys.pinned() == before


@pytest.mark.parametrize("supplied", [(), (SUPPLIED,)], ids=["none", "supplied"])
def test_key_that_the_machine_shows_is_pinned_in_place_of_others(
    supplied: tuple[HostKey, ...], known_hosts: Path
) -> None:
    pin(known_hosts, supplied)
    keys = keys_of(known_hosts, is_machine=True)
    with socket.socket() as connection:
        assert keys.accepts(OTHER, connection)
    assert keys_of(known_hosts, is_machine=False).pinned() == [OTHER]
    assert known_hosts.stat().st_mode & 0o777 == 0o600


class AnyKey:
    """Accepts whatever is shown, and knows the latest from then on."""

    def __init__(self) -> None:
        self.known = _ecdsa_line()
        self.accepted = 0

    def pinned(self) -> list[str]:
        return [self.known]

    def accepts(self, key_line: str, connection: socket.socket) -> bool:
        self.known = key_line
        self.accepted += 1
        return True


def _ecdsa_line() -> str:
    key = paramiko.ECDSAKey.generate()
    return f"{key.get_name()} {key.get_base64()}"


def test_guest_that_never_shows_a_key_twice_is_given_up() -> None:
    """A guest is not believed so far that it could keep us busy for ever."""
    keys = AnyKey()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):  # until the listener is closed
                while True:
                    transport = paramiko.Transport(listener.accept()[0])
                    transport.add_server_key(paramiko.ECDSAKey.generate())
                    transport.start_server(event=threading.Event())

        threading.Thread(target=serve, daemon=True).start()
        endpoint = ssh.Endpoint("127.0.0.1", listener.getsockname()[1], "ubuntu", None)
        with pytest.raises(paramiko.SSHException, match="another host key is shown"):
            ssh.connect(endpoint, keys, banner_timeout=30)
        listener.shutdown(socket.SHUT_RDWR)
    assert keys.accepted == 2


def multipart(*parts: tuple[str, str]) -> bytes:
    document = MIMEMultipart()
    for text, subtype in parts:
        document.attach(MIMEText(text, subtype))
    return document.as_bytes()


KEYS = "#cloud-config\n" + yaml.safe_dump({"ssh_keys": {"rsa_private": "secret\n"}})
SCRIPT = "#!/bin/sh\n"
PLAIN_CONFIG = "#cloud-config\nssh_authorized_keys: [ssh-rsa AAAA me]\nssh_pwauth: true\n"

DECIDE = {
    "ssh_keys": KEYS.encode(),
    "ssh_genkeytypes": b"#cloud-config\nssh_genkeytypes: [ecdsa]\n",
    "ssh_deletekeys": b"#cloud-config\nssh_deletekeys: false\n",
    "JSON": b'#cloud-config\n{"ssh_genkeytypes": []}',
    "template": b"## template: jinja\n#cloud-config\n{% if v1 %}\nssh_keys: {}\n{% endif %}\n",
    "archive": b"#cloud-config-archive\n" + json.dumps([{"content": KEYS}]).encode(),
    "MIME": multipart((SCRIPT, "x-shellscript"), (KEYS, "cloud-config")),
    "MIME in base64": multipart((KEYS + "# grüße", "cloud-config")),
    "gzip": gzip.compress(KEYS.encode(), mtime=0),
    "gzip of MIME": gzip.compress(multipart((KEYS, "cloud-config")), mtime=0),
    "script": b"#!/bin/sh\nrm /etc/ssh/ssh_host_rsa_key\n",
    "boothook": b"#cloud-boothook\n#!/bin/sh\nssh-keygen -A\n",
    "server's configuration": b"#!/bin/sh\necho HostKey /root/key >>/etc/ssh/sshd_config\n",
    "documents from elsewhere": b"#include\nhttp://10.0.2.2/more\n",
    "documents from elsewhere in MIME": multipart(("http://10.0.2.2/more", "x-include-url")),
    "part handler": b"#part-handler\ndef list_types(): ...\n",
    "damaged": gzip.compress(KEYS.encode(), mtime=0)[:-9],
}
DECIDE_NOT = {
    "nothing": b"",
    "script": SCRIPT.encode(),
    "cloud-config": PLAIN_CONFIG.encode(),
    "gzip": gzip.compress(PLAIN_CONFIG.encode(), mtime=0),
    "MIME": multipart((SCRIPT, "x-shellscript"), (PLAIN_CONFIG, "cloud-config")),
    "rubbish": b"\xff\xfe\0" + bytes(range(256)),
    "base64 of something": b"#!/bin/sh\n# " + base64.b64encode(KEYS.encode()),
}


@pytest.mark.parametrize("kind", DECIDE)
def test_document_that_may_decide_about_host_keys_leaves_them_to_the_guest(kind: str) -> None:
    assert are_decided_by(DECIDE[kind], "user_data")


@pytest.mark.parametrize("kind", DECIDE_NOT)
def test_other_documents_do_not(kind: str) -> None:
    assert not are_decided_by(DECIDE_NOT[kind], "user_data")


def test_line_that_is_cut_off_is_passed_over_wherever_it_is_cut(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for line in (_ecdsa_line(), _line(paramiko.RSAKey.generate(1024)), ED25519):
        assert ssh.read_pinned_key("vm", line) is not None
        for cut in range(len(line)):
            assert ssh.read_pinned_key("vm", line[:cut]) is None, line[:cut]
    assert "A pinned host key of vm is damaged and is not used: ssh-rsa AAAA" in caplog.text


ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ6kIwBjVqIePzJPCFV6cDMrNYF4BNlxaePuSkMPJjHI"


def _line(key: paramiko.PKey) -> str:
    return f"{key.get_name()} {key.get_base64()}"


@pytest.mark.parametrize("content", ["{line:.40}", "{line:.40}\n{line}\n", "\0\0\0", "\xff\n"])
def test_damaged_file_of_keys_is_no_obstacle(content: str, known_hosts: Path) -> None:
    """As after a crash of the host: what the machine shows is pinned anew."""
    key = paramiko.ECDSAKey.generate()
    known_hosts.write_text(content.format(line=_line(key)), encoding="latin-1")
    keys = keys_of(known_hosts, is_machine=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            transport = paramiko.Transport(listener.accept()[0])
            transport.add_server_key(key)
            transport.start_server(event=threading.Event())

        threading.Thread(target=serve, daemon=True).start()
        endpoint = ssh.Endpoint("127.0.0.1", listener.getsockname()[1], "ubuntu", None)
        # The host key is not what is wrong.
        with pytest.raises(paramiko.SSHException, match="No authentication methods"):
            ssh.connect(endpoint, keys, banner_timeout=30)
    assert _line(key) in keys.pinned()
