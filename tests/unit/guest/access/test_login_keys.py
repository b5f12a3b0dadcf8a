"""Keys to log in with, in all forms that they come in, and by an agent."""

from __future__ import annotations

import base64
import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from pycloudlib.errors import InvalidKeyError, PycloudlibTimeoutError
from pycloudlib.guest.access import loginkey, ssh
from pycloudlib.guest.access import loginkey as agent_module
from pycloudlib.key import KeyPair
from tests.unit.keyserver import Agent, serving
from tests.unit.sshserver import LocalInstance

MakePair = Callable[..., KeyPair]

FORMS = {
    "openssh": form.PrivateFormat.OpenSSH,
    "pem": form.PrivateFormat.TraditionalOpenSSL,
    "pkcs8": form.PrivateFormat.PKCS8,
}
_RSA = rsa.generate_private_key(65537, 2048)
KEYS: dict[str, Any] = {
    "rsa": _RSA,
    "ecdsa-256": ec.generate_private_key(ec.SECP256R1()),
    "ecdsa-384": ec.generate_private_key(ec.SECP384R1()),
    "ecdsa-521": ec.generate_private_key(ec.SECP521R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
}
# ed25519 has no form in the old style of PEM.
COMBINATIONS = [
    (kind, shape) for kind in KEYS for shape in FORMS if (kind, shape) != ("ed25519", "pem")
]
ENCRYPTED = [("rsa", "openssh"), ("rsa", "pem"), ("rsa", "pkcs8"), ("ed25519", "openssh")]


def public_line(key: Any) -> str:
    line: bytes = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    return line.decode()


def blob(key: Any) -> bytes:
    return base64.b64decode(public_line(key).split()[1])


def private_text(key: Any, shape: str, passphrase: bytes = b"") -> bytes:
    encryption = form.BestAvailableEncryption(passphrase) if passphrase else form.NoEncryption()
    text: bytes = key.private_bytes(form.Encoding.PEM, FORMS[shape], encryption)
    return text


@pytest.fixture
def make_pair(tmp_path: Path) -> MakePair:
    """Give a function that writes a key in some form."""

    def make(kind: str, shape: str = "openssh", passphrase: bytes = b"") -> KeyPair:
        private = tmp_path / "a key of % \"mine'"
        private.write_bytes(private_text(KEYS[kind], shape, passphrase))
        public = private.with_name(f"{private.name}.pub")
        public.write_text(f"{public_line(KEYS[kind])} me@here\n")
        return KeyPair(public)

    return make


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    """Give an agent that holds seven other keys."""
    made = Agent(tmp_path / "agent")
    for _ in range(7):
        other = ed25519.Ed25519PrivateKey.generate()
        made.keys[blob(other)] = other
    monkeypatch.setenv("SSH_AUTH_SOCK", str(made.path))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _without_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


def behave(agent: Agent, manner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an agent behave in a manner; one that hangs is not waited for as long as usual."""
    agent.manner = manner
    if manner in ("hangs", "hangs signing"):
        monkeypatch.setattr(
            agent_module, "_LIST_LIMIT" if manner == "hangs" else "_SIGN_LIMIT", 0.5
        )


def logs_in(pair: KeyPair, key: Any) -> list[bytes]:
    """Log in to a server that lets this key in; give the keys that it was shown."""
    with serving(blob(key)) as server:
        endpoint = ssh.Endpoint(
            "127.0.0.1", server.port, "me", pair.private_key_path, pair.public_key_path
        )
        client = ssh.connect(endpoint, None, banner_timeout=20)
        try:
            transport = client.get_transport()
            assert transport is not None
            assert transport.is_authenticated()
        finally:
            client.close()
        return server.tried


@pytest.mark.parametrize(("kind", "shape"), COMBINATIONS)
def test_key_of_any_form_logs_in(kind: str, shape: str, make_pair: MakePair) -> None:
    pair = make_pair(kind, shape)

    loginkey.check(pair, "here")
    loginkey.prove(pair, "here")
    assert set(logs_in(pair, KEYS[kind])) == {blob(KEYS[kind])}


@pytest.mark.parametrize(
    ("kind", "shape"), [("rsa", "openssh"), ("rsa", "pem"), ("ed25519", "pkcs8")]
)
def test_older_library_that_knows_no_shortcut_loads_keys_too(
    kind: str, shape: str, make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cryptography 42 is, which may be installed beside the oldest paramiko that will do."""

    def without_shortcut(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_older(data: bytes, password: bytes | None) -> Any:
            return load(data, password)

        return load_older

    for name in ("load_ssh_private_key", "load_pem_private_key"):
        monkeypatch.setattr(form, name, without_shortcut(getattr(form, name)))
    key_pair = make_pair(kind, shape)
    loginkey.prove(key_pair, "the key")


@pytest.mark.parametrize(("kind", "shape"), ENCRYPTED)
def test_key_with_a_passphrase_is_used_by_the_agent(
    kind: str, shape: str, make_pair: MakePair, agent: Agent
) -> None:
    pair = make_pair(kind, shape, b"secret words")
    agent.keys[blob(KEYS[kind])] = KEYS[kind]

    loginkey.check(pair, "here")
    loginkey.prove(pair, "here")
    assert set(logs_in(pair, KEYS[kind])) == {blob(KEYS[kind])}


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
def test_public_half_is_enough_where_the_agent_has_the_other(
    kind: str, make_pair: MakePair, agent: Agent
) -> None:
    pair = make_pair(kind)
    Path(str(pair.private_key_path)).unlink()
    agent.keys[blob(KEYS[kind])] = KEYS[kind]

    loginkey.check(pair, "here")
    loginkey.prove(pair, "here")
    assert set(logs_in(pair, KEYS[kind])) == {blob(KEYS[kind])}


def test_agent_is_not_asked_for_a_key_that_is_in_a_file(make_pair: MakePair, agent: Agent) -> None:
    pair = make_pair("ed25519")
    agent.manner = "hangs"

    loginkey.prove(pair, "here")
    logs_in(pair, KEYS["ed25519"])

    assert agent.asked == []


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    ("manner", "said"),
    [
        ("absent", r"is not there \(\$SSH_AUTH_SOCK is not set\)"),
        ("dead", "cannot be asked: Connection refused"),
        ("gone", "cannot be asked: No such file"),
        ("locked", "holds no key, or is locked"),
        ("other keys", r"does not hold it \(but 7 others\)"),
        ("hangs", "did not answer within"),
        ("hangs up", "cannot be asked: it hung up"),
        ("garbage", "cannot be read"),
    ],
)
def test_agent_is_asked_before_it_is_believed(
    manner: str,
    said: str,
    missing: bool,
    make_pair: MakePair,
    agent: Agent,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pair = make_pair("ed25519", passphrase=b"secret words")
    if missing:
        Path(str(pair.private_key_path)).unlink()
    if manner != "other keys":
        agent.keys[blob(KEYS["ed25519"])] = KEYS["ed25519"]
    behave(agent, manner, monkeypatch)
    if manner == "absent":
        monkeypatch.delenv("SSH_AUTH_SOCK")
    elif manner == "gone":
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "nothing"))
    elif manner == "dead":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "dead"))
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "dead"))

    for look in (loginkey.check, loginkey.prove):
        with pytest.raises(InvalidKeyError, match=f"here: .*{said}.*ssh-add") as caught:
            look(pair, "here")
        assert "a key of %" in str(caught.value)
    with pytest.raises(paramiko.SSHException, match=said) as refused:
        logs_in(pair, KEYS["ed25519"])
    assert isinstance(refused.value.__cause__, InvalidKeyError)


@pytest.mark.parametrize(
    ("manner", "said"), [("refuses", "refuses to sign"), ("hangs signing", "did not answer within")]
)
def test_agent_that_does_not_sign_is_noticed_before_a_boot(
    manner: str,
    said: str,
    make_pair: MakePair,
    agent: Agent,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = make_pair("ed25519", passphrase=b"secret words")
    agent.keys[blob(KEYS["ed25519"])] = KEYS["ed25519"]
    behave(agent, manner, monkeypatch)

    with pytest.raises(InvalidKeyError, match=said):
        loginkey.prove(pair, "here")
    with pytest.raises(paramiko.SSHException, match=said):
        logs_in(pair, KEYS["ed25519"])


@pytest.mark.skipif(shutil.which("ssh-agent") is None, reason="there is no ssh-agent")
def test_real_agent(make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair("rsa", passphrase=b"secret words")
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "real"))
    process = subprocess.Popen(
        ["ssh-agent", "-D", "-a", str(tmp_path / "real")], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()  # from then on it listens
        with pytest.raises(InvalidKeyError, match="holds no key"):
            loginkey.prove(pair, "here")
        plain = tmp_path / "plain"
        plain.touch(mode=0o600)
        plain.write_bytes(private_text(KEYS["rsa"], "openssh"))
        subprocess.run(["ssh-add", "-q", str(plain)], check=True)

        loginkey.prove(pair, "here")
        assert set(logs_in(pair, KEYS["rsa"])) == {blob(KEYS["rsa"])}
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.parametrize(("kind", "shape"), [*COMBINATIONS])
def test_halves_of_different_keys_are_refused(kind: str, shape: str, make_pair: MakePair) -> None:
    pair = make_pair(kind, shape)
    other = ed25519.Ed25519PrivateKey.generate()
    Path(str(pair.public_key_path)).write_text(public_line(other))

    with pytest.raises(InvalidKeyError, match=r"here: .*halves of different keys.*ssh-keygen -y"):
        loginkey.prove(pair, "here")
    with pytest.raises(paramiko.SSHException, match="halves of different keys"):
        logs_in(pair, KEYS[kind])


def test_halves_of_different_keys_are_told_of_one_with_a_passphrase(
    make_pair: MakePair, agent: Agent
) -> None:
    pair = make_pair("ed25519", passphrase=b"secret words")
    other = next(iter(agent.keys.values()))
    Path(str(pair.public_key_path)).write_text(public_line(other))

    with pytest.raises(InvalidKeyError, match="halves of different keys"):
        loginkey.check(pair, "here")


DSA = "ssh-dss " + base64.b64encode(b"\0\0\0\7ssh-dss" + b"\0\0\0\1\1" * 4).decode() + " me@here"
PUBLIC = "ssh-rsa " + base64.b64encode(b"\0\0\0\7ssh-rsa" + b"\0\0\0\1\1" * 2).decode()
CERTIFICATE = (
    "ssh-ed25519-cert-v01@openssh.com "
    + base64.b64encode(b"\0\0\0\x20ssh-ed25519-cert-v01@openssh.com" + b"\0\0\0\1\1" * 4).decode()
)


@pytest.mark.parametrize(
    ("half", "content", "said"),
    [
        ("public", DSA, r"is a DSA key, .*ssh-keygen -t ed25519"),
        ("public", CERTIFICATE, r"is a certificate.*plain public key"),
        ("public", "---- BEGIN SSH2 PUBLIC KEY ----\nx", r"RFC 4716.*ssh-keygen -i -f"),
        ("public", "-----BEGIN PUBLIC KEY-----\nx", r"PEM form.*ssh-keygen -i -m PKCS8 -f"),
        ("public", "-----BEGIN RSA PUBLIC KEY-----\nx", r"PEM form.*ssh-keygen -i -m PEM -f"),
        ("public", "-----BEGIN OPENSSH PRIVATE KEY-----\nx", "is a private key"),
        ("public", 'from="10.0.0.0/8" ssh-ed25519 AAAA', "is not an OpenSSH public key"),
        ("public", "", "is not an OpenSSH public key"),
        ("private", "PuTTY-User-Key-File-3: ssh-ed25519\n", r"PuTTY.*puttygen .* private-openssh"),
        ("private", "-----BEGIN DSA PRIVATE KEY-----\nx", r"is a DSA key"),
        ("private", PUBLIC, "is a public key, and a private key is wanted"),
        ("private", "-----BEGIN PUBLIC KEY-----\nx", "is not a private key"),
        ("private", "", "is not a private key"),
        ("private", "-----BEGIN OPENSSH PRIVATE KEY-----\n****\n", "is damaged"),
        ("private", "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaA==\n", "is damaged"),
    ],
)
def test_file_that_is_something_else_is_named(
    half: str, content: str, said: str, make_pair: MakePair
) -> None:
    pair = make_pair("ed25519")
    file = Path(str(pair.public_key_path if half == "public" else pair.private_key_path))
    file.write_text(content)

    for look in (loginkey.check, loginkey.prove):
        with pytest.raises(InvalidKeyError, match=f"here: .*{said}") as caught:
            look(pair, "here")
        assert repr(str(file)) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (ec.generate_private_key(ec.SECP256K1()), "on the curve secp256k1. that SSH does not know"),
        (ed448.Ed448PrivateKey.generate(), "Ed448. that SSH does not know"),
    ],
)
def test_key_of_a_kind_that_ssh_does_not_know(key: Any, said: str, make_pair: MakePair) -> None:
    pair = make_pair("rsa")
    Path(str(pair.private_key_path)).write_bytes(private_text(key, "pkcs8"))

    with pytest.raises(InvalidKeyError, match=f"{said}.*ssh-keygen -t ed25519"):
        loginkey.prove(pair, "here")


@pytest.mark.parametrize("shape", FORMS)
def test_damaged_key_is_refused_before_a_boot(shape: str, make_pair: MakePair) -> None:
    pair = make_pair("rsa", shape)
    file = Path(str(pair.private_key_path))
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-4], *lines[-2:]]))

    with pytest.raises(InvalidKeyError, match=r"is damaged.*ssh-keygen -y -f"):
        loginkey.prove(pair, "here")


def test_certificate_beside_the_key_is_left_alone(make_pair: MakePair) -> None:
    """A machine knows no authority, and would refuse it."""
    pair = make_pair("ed25519")
    Path(f"{pair.private_key_path}-cert.pub").write_text(CERTIFICATE)

    assert set(logs_in(pair, KEYS["ed25519"])) == {blob(KEYS["ed25519"])}


def test_private_half_alone_logs_in(make_pair: MakePair) -> None:
    pair = make_pair("rsa", "pkcs8")
    Path(str(pair.public_key_path)).unlink()

    alone = KeyPair(None, pair.private_key_path)
    assert set(logs_in(alone, KEYS["rsa"])) == {blob(KEYS["rsa"])}


class Unusable(LocalInstance):
    """A machine whose key cannot be used."""

    def __init__(self, directory: Path, endpoint: ssh.Endpoint) -> None:
        super().__init__(directory)
        self.endpoint = endpoint

    def _endpoint(self) -> ssh.Endpoint:
        return self.endpoint

    def _ssh_connect(self) -> paramiko.SSHClient:
        return ssh.connect(self.endpoint, None, banner_timeout=20)


def test_wait_ends_at_once_for_a_key_that_cannot_be_used(
    make_pair: MakePair, tmp_path: Path
) -> None:
    pair = make_pair("rsa", passphrase=b"secret words")
    with serving(blob(KEYS["rsa"])) as server:
        endpoint = ssh.Endpoint("127.0.0.1", server.port, "me", pair.private_key_path)

        with pytest.raises(paramiko.SSHException, match="takes a passphrase"):
            Unusable(tmp_path, endpoint).wait()

        assert server.tried == []


class Ending(LocalInstance):
    """A machine that says something once, and is not heard of again."""

    def __init__(self, directory: Path, *answers: Exception) -> None:
        super().__init__(directory)
        self.answers = list(answers)

    def _is_connected(self) -> bool:
        return True

    def _ssh_connect(self) -> paramiko.SSHClient:
        if len(self.answers) > 1:
            raise self.answers.pop(0)
        time.sleep(0.01)
        raise self.answers[0]


def test_last_try_without_time_does_not_hide_what_was_known(tmp_path: Path) -> None:
    late = paramiko.SSHException("no SSH banner within 0 s")
    late.__cause__ = TimeoutError()
    known = paramiko.SSHException("an error that says much")
    machine = Ending(tmp_path, *[known] * 4, late)

    with pytest.raises(PycloudlibTimeoutError, match="last seen: an error that says much"):
        machine._wait_for_execute(timeout=1.2)

    assert machine.answers == [late]


@pytest.mark.parametrize("there", ["both", "public", "private", "neither"])
def test_command_line_for_people_names_the_key_and_no_other(
    there: str, make_pair: MakePair
) -> None:
    pair = make_pair("ed25519")
    halves = {"private": pair.private_key_path, "public": pair.public_key_path}
    for half, path in halves.items():
        if there not in ("both", half):
            Path(str(path)).unlink()
    endpoint = ssh.Endpoint("127.0.0.1", 18000, "me", pair.private_key_path, pair.public_key_path)

    words = shlex.split(ssh.login_command(endpoint, "web"))

    assert words[0] == "ssh"
    assert "IdentitiesOnly=yes" in words
    assert "HostKeyAlias=web" in words
    assert words[-3:] == ["-p", "18000", "me@127.0.0.1"]
    if shutil.which("ssh"):
        settings = subprocess.run(
            ["ssh", "-F", "none", "-G", *words[1:]], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        named = halves["public" if there == "public" else "private"]
        # As ssh has it before it puts in what `%` stands for.
        assert f"identityfile {str(named).replace('%', '%%')}" in settings
        assert "identitiesonly yes" in settings


@pytest.mark.parametrize("name", ["plain", "with space", "it's", 'a "b"', "back\\slash", "ü"])
def test_command_line_for_people_holds_the_path_as_one_word(name: str) -> None:
    endpoint = ssh.Endpoint("127.0.0.1", 18000, "me", f"/keys/{name}")

    words = shlex.split(ssh.login_command(endpoint))

    assert words[words.index("-i") + 1] == f"/keys/{name}"


def test_command_line_without_a_key() -> None:
    assert ssh.login_command(ssh.Endpoint("h", 22, "me", None)) == "ssh -p 22 me@h"


def test_own_keys_that_cannot_be_used_are_passed_over(
    make_pair: MakePair, home: Path, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that is there and does not hold the key is of no help."""
    pair = make_pair("rsa", passphrase=b"secret words")
    (home / ".ssh").mkdir()
    for half in (pair.public_key_path, pair.private_key_path):
        suffix = ".pub" if str(half).endswith(".pub") else ""
        shutil.copy(str(half), home / ".ssh" / f"id_rsa{suffix}")
    binary = home / "qemu-system-x86_64"
    binary.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")
    from pycloudlib import Qemu  # noqa: PLC0415 - with its own PATH

    assert Qemu("t").find_key_pair() is None
    agent.keys[blob(KEYS["rsa"])] = KEYS["rsa"]
    found = Qemu("t").find_key_pair()
    assert found is not None
    assert found.public_key_path == str(home / ".ssh" / "id_rsa.pub")
