from __future__ import annotations

import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from pycloudlib.guest.access.hostkeys import HostKey, HostKeyPool


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "host-keys"


@pytest.fixture
def pool(directory: Path) -> HostKeyPool:
    return HostKeyPool(directory, kept=2)


def fill(pool: HostKeyPool) -> None:
    pool.fill()
    for thread in threading.enumerate():
        if thread.name == "host-keys":
            thread.join()


def rsa_of(keys: tuple[HostKey, ...]) -> str:
    return next(key.line for key in keys if key.type == "rsa")


def test_keys_are_of_the_types_that_cloud_init_makes(pool: HostKeyPool) -> None:
    keys = pool.take("root@vm")
    kinds = {
        "ed25519": ed25519.Ed25519PrivateKey,
        "ecdsa": ec.EllipticCurvePrivateKey,
        "rsa": rsa.RSAPrivateKey,
    }
    assert [key.type for key in keys] == list(kinds)
    for key in keys:
        private = load_ssh_private_key(key.private.encode(), None)
        assert isinstance(private, kinds[key.type])
        assert private.public_key() == load_ssh_public_key(key.public.encode())
        assert key.public == f"{key.line} root@vm"


def test_kept_keys_are_this_users_alone(pool: HostKeyPool, directory: Path) -> None:
    fill(pool)
    assert directory.stat().st_mode & 0o777 == 0o700
    files = list(directory.iterdir())
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600, 0o600]


def test_each_key_is_taken_once(pool: HostKeyPool, directory: Path) -> None:
    fill(pool)
    kept = [file.read_text() for file in directory.iterdir()]
    taken = [rsa_of(HostKeyPool(directory).take("root@vm")) for _ in range(3)]
    assert len(set(taken)) == 3
    assert sum(line.split()[1] in text for line in taken for text in kept) == 2
    assert list(directory.iterdir()) == []


def test_two_that_take_at_once_get_two_keys(pool: HostKeyPool, directory: Path) -> None:
    fill(pool)
    taken: list[str] = []
    begin = threading.Barrier(8)

    def take() -> None:
        begin.wait()
        taken.append(rsa_of(HostKeyPool(directory).take("root@vm")))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 8


def test_what_is_damaged_is_passed_over(
    pool: HostKeyPool, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(pool)
    damaged = min(directory.iterdir())
    damaged.write_text("{}")
    assert rsa_of(pool.take("root@vm"))
    assert str(damaged) in caplog.text
    assert not damaged.exists()


def test_directory_of_somebody_else_is_not_used(pool: HostKeyPool, directory: Path) -> None:
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    fill(pool)
    assert list(directory.iterdir()) == []
    assert rsa_of(pool.take("root@vm"))


def test_keys_that_somebody_else_may_have_put_there_are_not_taken(
    pool: HostKeyPool, directory: Path
) -> None:
    fill(pool)
    kept = [file.read_text() for file in directory.iterdir()]
    directory.chmod(0o777)
    taken = rsa_of(pool.take("root@vm"))
    assert not any(taken.split()[1] in text for text in kept)
    assert len(list(directory.iterdir())) == 2


def test_place_where_nothing_can_be_kept_is_no_obstacle(directory: Path) -> None:
    directory.write_text("a file")
    pool = HostKeyPool(directory)
    fill(pool)
    assert rsa_of(pool.take("root@vm"))
