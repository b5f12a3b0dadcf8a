from __future__ import annotations

import getpass
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from pycloudlib.errors import InvalidKeyError, PycloudlibException, UnsetSSHKeyError
from pycloudlib.guest.access import loginkey
from pycloudlib.key import KeyPair, generate_ed25519
from pycloudlib.qemu.cloud import Qemu

MakeCloud = Callable[..., Qemu]


@pytest.fixture
def make_cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeCloud:
    binary = tmp_path / "bin" / "qemu-system-x86_64"
    binary.parent.mkdir()
    binary.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{binary.parent}{os.pathsep}{os.environ['PATH']}")

    def make(text: str = "", tag: str = "keys") -> Qemu:
        return Qemu(tag, timestamp_suffix=False, config_file=io.StringIO(text))

    return make


def write_pair(directory: Path, name: str) -> Path:
    """Write a key pair and give the path of its public half."""
    directory.mkdir(parents=True, exist_ok=True)
    private, public = generate_ed25519(comment=name)
    (directory / name).write_text(private)
    path = directory / f"{name}.pub"
    path.write_text(public + "\n")
    return path


def test_private_half_is_beside_the_public_one() -> None:
    pair = KeyPair("/keys/mine.pub")

    assert str(pair.public_key_path) == "/keys/mine.pub"
    assert str(pair.private_key_path) == "/keys/mine"


def test_private_half_may_be_elsewhere() -> None:
    pair = KeyPair("/keys/mine.pub", "/safe/mine", "work")

    assert str(pair.private_key_path) == "/safe/mine"
    assert pair.name == "work"


def test_content_is_the_public_key_file_as_it_is(tmp_path: Path) -> None:
    public = write_pair(tmp_path, "mine")

    assert KeyPair(public).public_key_content == public.read_text()
    assert KeyPair(public).public_key_line == public.read_text().rstrip("\n")


def test_comment_of_a_key_may_be_in_any_encoding(tmp_path: Path) -> None:
    public = write_pair(tmp_path, "mine")
    key = " ".join(public.read_text().split()[:2])
    public.write_bytes(f"{key} René\n".encode("latin-1"))

    assert KeyPair(public).public_key_content.strip() == f"{key} Ren\ufffd"


def test_content_without_a_key_says_that_none_is_set() -> None:
    with pytest.raises(UnsetSSHKeyError, match="No SSH key is set"):
        _ = KeyPair(None).public_key_content


def test_a_key_is_called_as_its_user_is(make_cloud: MakeCloud, tmp_path: Path) -> None:
    cloud = make_cloud()

    assert KeyPair("/keys/mine.pub").name == getpass.getuser()
    assert cloud.key_pair.name == getpass.getuser()

    cloud.use_key(write_pair(tmp_path, "work"))

    assert cloud.key_pair.name == getpass.getuser()
    assert cloud.list_keys() == [getpass.getuser()]


def test_a_key_of_a_user_without_a_name_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_123)

    assert KeyPair("/keys/mine.pub").name == "4000123"


def test_rsa_key_of_the_user_comes_first(make_cloud: MakeCloud, home: Path) -> None:
    write_pair(home / ".ssh", "id_ed25519")
    rsa = write_pair(home / ".ssh", "id_rsa")

    assert make_cloud().key_pair.public_key_path == str(rsa)


def test_ed25519_key_of_the_user_comes_second(make_cloud: MakeCloud, home: Path) -> None:
    ed25519 = write_pair(home / ".ssh", "id_ed25519")
    write_pair(home / ".ssh", "id_other")

    pair = make_cloud().key_pair

    assert pair.public_key_path == str(ed25519)
    assert pair.private_key_path == str(ed25519.with_suffix(""))


def test_without_any_key_a_fresh_one_is_made(make_cloud: MakeCloud) -> None:
    with make_cloud() as cloud:
        pair = cloud.key_pair
        private_path = Path(str(pair.private_key_path))

        assert pair.public_key_content.startswith("ssh-ed25519 ")
        private = load_ssh_private_key(private_path.read_bytes(), None)
        assert isinstance(private, Ed25519PrivateKey)
        public = load_ssh_public_key(pair.public_key_content.encode())
        assert public == private.public_key()
        assert stat.S_IMODE(private_path.stat().st_mode) == 0o600
        assert private_path.is_relative_to(cloud.parent_dir)

    assert not private_path.exists(), "the fresh key outlived its cloud"


def test_fresh_keys_of_two_clouds_differ(make_cloud: MakeCloud) -> None:
    with make_cloud(tag="one") as one, make_cloud(tag="two") as two:
        assert one.key_pair.public_key_content != two.key_pair.public_key_content


@pytest.mark.parametrize("written", ["{path}", "~/keys/work.pub", "$HOME/keys/work.pub"])
def test_configured_key_is_used(written: str, make_cloud: MakeCloud, home: Path) -> None:
    write_pair(home / ".ssh", "id_rsa")
    work = write_pair(home / "keys", "work")

    pair = make_cloud(
        f"[qemu]\npublic_key_path = '{written.format(path=work)}'\nkey_name = 'work key'\n"
    ).key_pair

    assert pair.public_key_path == str(work)
    assert pair.private_key_path == str(work.with_suffix(""))
    assert pair.name == "work key"


@pytest.mark.parametrize("written", ["{path}", "~/elsewhere", "$HOME/elsewhere"])
def test_configured_private_key_is_used(written: str, make_cloud: MakeCloud, home: Path) -> None:
    work = write_pair(home / "keys", "work")
    elsewhere = work.with_suffix("").rename(home / "elsewhere")

    pair = make_cloud(
        f"[qemu]\npublic_key_path = '{work}'\n"
        f"private_key_path = '{written.format(path=elsewhere)}'\n"
    ).key_pair

    assert pair.private_key_path == str(elsewhere)


def test_configured_key_that_does_not_exist_is_an_error(
    make_cloud: MakeCloud, tmp_path: Path
) -> None:
    with pytest.raises(InvalidKeyError, match="public_key_path") as caught:
        make_cloud(f"[qemu]\npublic_key_path = '{tmp_path}/missing.pub'\n")

    assert f"{tmp_path}/missing.pub" in str(caught.value)


def test_configured_private_key_that_does_not_exist_is_an_error(
    make_cloud: MakeCloud, tmp_path: Path
) -> None:
    public = write_pair(tmp_path, "work")

    with pytest.raises((ValueError, FileNotFoundError), match="missing"):
        make_cloud(
            f"[qemu]\npublic_key_path = '{public}'\nprivate_key_path = '{tmp_path}/missing'\n"
        )


def test_configured_private_key_alone_is_not_dropped_in_silence(
    make_cloud: MakeCloud, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    private = write_pair(tmp_path, "work").with_suffix("")

    try:
        used = make_cloud(f"[qemu]\nprivate_key_path = '{private}'\n").key_pair.private_key_path
    except (ValueError, PycloudlibException) as error:
        assert "public_key_path" in str(error)  # noqa: PT017 - one of three ways to be honest
    else:
        assert used == str(private) or "private_key_path" in caplog.text


def test_new_key_pair_is_given_and_not_stored(make_cloud: MakeCloud) -> None:
    public, private = make_cloud().create_key_pair()

    key = load_ssh_private_key(private.encode(), None)
    assert load_ssh_public_key(public.encode()) == key.public_key()


def test_used_key_is_the_clouds_from_then_on(make_cloud: MakeCloud, tmp_path: Path) -> None:
    public = write_pair(tmp_path, "work")
    cloud = make_cloud()

    cloud.use_key(str(public), name="work")

    assert cloud.key_pair.public_key_path == str(public)
    assert cloud.key_pair.private_key_path == str(public.with_suffix(""))
    assert "work" in cloud.list_keys()


def test_used_key_may_be_below_home(make_cloud: MakeCloud, home: Path) -> None:
    public = write_pair(home, "work")
    cloud = make_cloud()

    cloud.use_key("~/work.pub")

    assert cloud.key_pair.public_key_content == public.read_text()
    assert Path(str(cloud.key_pair.private_key_path)).expanduser() == public.with_suffix("")


@pytest.mark.parametrize(
    "problem", ["no public", "public is private", "private is public", "no key"]
)
def test_key_that_cannot_work_is_refused_and_the_old_one_stays(
    problem: str, make_cloud: MakeCloud, tmp_path: Path
) -> None:
    public = write_pair(tmp_path, "work")
    private = public.with_suffix("")
    cloud = make_cloud()
    cloud.use_key(write_pair(tmp_path, "old"))
    old = cloud.key_pair
    if problem == "no public":
        public.unlink()
    elif problem == "public is private":
        public = private
    elif problem == "private is public":
        private = public
    else:
        public.write_text("not a key at all\n")

    with pytest.raises(InvalidKeyError, match="work"):
        cloud.use_key(public, private)

    assert cloud.key_pair is old


def test_private_half_may_be_written_after_the_key_is_chosen(
    make_cloud: MakeCloud, tmp_path: Path
) -> None:
    public = write_pair(tmp_path, "work")
    private = public.with_suffix("").rename(tmp_path / "later")
    cloud = make_cloud()

    cloud.use_key(public)

    assert cloud.key_pair.private_key_path == str(public.with_suffix(""))
    with pytest.raises(InvalidKeyError, match="there is no private key"):
        loginkey.prove(cloud.key_pair, "here")
    private.rename(public.with_suffix(""))
    loginkey.prove(cloud.key_pair, "here")


def test_key_of_a_wrong_type_is_refused(make_cloud: MakeCloud) -> None:
    with pytest.raises((TypeError, ValueError, PycloudlibException)):
        make_cloud().use_key(5)  # type: ignore[arg-type]
