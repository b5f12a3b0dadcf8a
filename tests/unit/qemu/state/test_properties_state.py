"""State files that were damaged are told of as broken, whatever is in them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pycloudlib import Qemu
from pycloudlib.errors import InstanceNotFoundError
from pycloudlib.guest.access.hostkeys import HostKey
from pycloudlib.guest.helper import FixUp, Identity, NewKey
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.host import accelerator
from pycloudlib.qemu.host.accelerator import Accelerator, Trial, kvm_problem
from pycloudlib.qemu.host.processes import ProcessIdentity
from pycloudlib.qemu.host.resources import PORTS, PortLease, PortRegistry
from pycloudlib.qemu.launching.warmcache import WarmCache
from pycloudlib.qemu.parts.standard import InstanceType, KernelBoot
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import LoginFacts, RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import MachineSpec
from pycloudlib.qemu.vm.process import QemuProcess
from tests.unit.hostile import NAMES, STRANGE, damaged, damaged_json, put

TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)
PATHS = st.builds(
    lambda name: Path("/", os.fsdecode(name)),
    st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name),
)
SPECS = st.builds(
    MachineSpec,
    name=TEXTS,
    instance_type=st.builds(InstanceType, st.integers(1, 999), st.integers(1, 10**8 - 1)),
    accelerator=st.sampled_from(Accelerator),
    disk=PATHS,
    seed=st.none() | PATHS,
    ssh_port=st.integers(1, 65535),
    telnet_port=st.integers(1, 65535),
    mac=TEXTS,
    kernel_boot=st.none() | st.builds(KernelBoot, PATHS, st.none() | PATHS, TEXTS),
    launch_args=st.lists(TEXTS, max_size=3).map(tuple),
)
LOGINS = st.builds(LoginFacts, TEXTS, st.none() | TEXTS, st.none() | TEXTS)
SPEC = MachineSpec(
    "vm",
    InstanceType(1, 512),
    Accelerator.TCG,
    Path("/run/vm.qcow2"),
    Path("/run/seed.iso"),
    18000,
    18001,
    "52:54:00:00:00:01",
    KernelBoot(Path("/vmlinuz"), Path("/initrd"), "quiet"),
    ("-S",),
)
LOGIN = LoginFacts("ubuntu", "/key.pub", "/key")
SPEC_TEXT = SPEC.to_json().encode()
LOGIN_TEXT = json.dumps(dataclasses.asdict(LOGIN)).encode()
IDENTITY = ProcessIdentity(1234, 5678)
SAVED = {
    "format": savedmachine.FORMAT,
    "spec": json.loads(SPEC_TEXT),
    "login": dataclasses.asdict(LOGIN),
    "host": "host",
    "helper": True,
    "saved_at": 1700000000.5,
    "rtc_lag": 0.5,
    "memory_mark": "0 0",
    "state_mark": "0 0",
}
SAVED_TEXT = json.dumps(SAVED).encode()
FIX_UP = FixUp(
    Identity("vm", "0" * 32, "iid", (HostKey("rsa", "private", "public"),)),
    NewKey("u", "old", "new"),
)


@pytest.fixture
def rundir(tmp_path: Path) -> RunDirectory:
    path = tmp_path / "work" / "pycl-qemu-t" / "vm"
    path.mkdir(parents=True)
    return RunDirectory(path)


@given(SPECS, LOGINS)
def test_machine_is_read_back_as_it_was_written(
    rundir: RunDirectory, spec: MachineSpec, login: LoginFacts
) -> None:
    rundir.write_spec(spec)
    rundir.write_login(login)
    assert (rundir.read_spec(), rundir.read_login()) == (spec, login)


@given(damaged_json(SPEC_TEXT))
@example(b"[" * 100_000)
@example(SPEC_TEXT.replace(b'"name": "vm"', b'"name": 5'))
@example(SPEC_TEXT.replace(b'[\n  "-S"\n ]', b'"-S"'))
def test_damaged_machine_is_no_instance(rundir: RunDirectory, content: bytes) -> None:
    put(rundir.path / "machine.json", content)
    try:
        spec = rundir.read_spec()
    except InstanceNotFoundError as error:
        assert "machine.json is damaged" in str(error)
        assert str(rundir.path) in str(error)
    else:
        assert MachineSpec.from_json(spec.to_json()) == spec


@given(damaged_json(LOGIN_TEXT))
def test_damaged_login_is_told_of(rundir: RunDirectory, content: bytes) -> None:
    put(rundir.path / "login.json", content)
    try:
        rundir.write_login(rundir.read_login())
    except InstanceNotFoundError as error:
        assert "login.json is damaged" in str(error)


@pytest.mark.parametrize("name", ["machine.json", "login.json"])
def test_directory_in_place_of_a_file_is_told_of(name: str, rundir: RunDirectory) -> None:
    put(rundir.path / name, None)
    with pytest.raises(InstanceNotFoundError, match=f"{name} cannot be read"):
        _ = rundir.read_spec() if name == "machine.json" else rundir.read_login()


@given(st.builds(ProcessIdentity, st.integers(1, 2**31 - 1), st.integers()))
def test_process_is_read_back_as_it_was_written(
    rundir: RunDirectory, identity: ProcessIdentity
) -> None:
    rundir.write_process(identity)
    assert rundir.find_process() == identity


@given(damaged_json(b'{"pid": 1234, "start": 5678}') | st.sampled_from(STRANGE))
@example(b"[1]")
@example(b'{"pid": "1234", "start": 5678}')
@example(b'{"pid": -1, "start": 5678}')
@example(b'{"pid": 18446744073709551616, "start": 5678}')
def test_damaged_process_is_none_or_one_that_can_be_looked_for(
    rundir: RunDirectory, content: bytes
) -> None:
    put(rundir.path / "process.json", content)
    found = rundir.find_process()
    if found is not None:
        assert QemuProcess.attach(found, rundir.disk, rundir.qemu_log) is None


def test_damaged_process_is_told_of(rundir: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    for content in (b"{}", None):
        put(rundir.path / "process.json", content)
        assert rundir.find_process() is None
    assert len(caplog.records) == 2
    assert all("process.json is damaged" in record.getMessage() for record in caplog.records)


@given(damaged_json(FIX_UP.to_json().encode()))
def test_what_is_to_be_put_right_is_read_back_or_refused(content: bytes) -> None:
    assert FixUp.from_json(FIX_UP.to_json()) == FIX_UP
    try:
        read = FixUp.from_json(content.decode(errors="replace"))
    except ValueError as error:
        assert str(error)
    else:
        assert FixUp.from_json(read.to_json()) == read
        json.dumps(read.request())


@pytest.fixture
def image(rundir: RunDirectory) -> Path:
    """Give the image of a saved machine, with all that belongs to it."""
    image = rundir.path / "saved.img"
    image.touch()
    directory = savedmachine.directory_of(image)
    directory.mkdir(mode=0o700)
    for name in ("memory", "state"):
        (directory / name).touch()
    return image


def saved_at(image: Path, spec: MachineSpec, login: LoginFacts, seconds: float) -> SavedMachine:
    return SavedMachine(image, spec, login, "host", True, seconds, rtc_lag=seconds)


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(SPECS, LOGINS, FINITE)
def test_saved_machine_is_read_back_as_it_was_written(
    image: Path, spec: MachineSpec, login: LoginFacts, seconds: float
) -> None:
    written = savedmachine.write_facts(saved_at(image, spec, login, seconds), login)
    assert savedmachine.find(image) == written


@given(damaged_json(SAVED_TEXT))
def test_damaged_saved_machine_is_none(image: Path, content: bytes) -> None:
    put(image.with_name("saved.img.live") / "saved.json", content)
    found = savedmachine.find(image)
    if found is not None:
        assert savedmachine.write_facts(found, found.login).spec == found.spec
        assert isinstance(found.find_obstacle("another host"), str)


@pytest.mark.parametrize("content", [*STRANGE, None])
def test_damaged_saved_machine_is_told_of(
    content: bytes | None, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(image.with_name("saved.img.live") / "saved.json", content)
    assert savedmachine.find(image) is None
    assert "only its disk is used" in caplog.text
    assert "saved.img" in caplog.text


@given(st.none() | damaged_json(SAVED_TEXT), st.binary(max_size=30))
def test_machines_kept_ready_are_listed_beside_damaged_ones(
    tmp_path: Path, content: bytes | None, disk: bytes
) -> None:
    cache = WarmCache(tmp_path, 1 << 30)
    for key in ("good", "bad"):
        directory = cache.directory / key / "disk.img.live"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for file in (directory / "memory", directory / "state", directory.with_suffix("")):
            file.touch()
        put(directory / "saved.json", SAVED_TEXT)
    put(cache.directory / "bad" / "disk.img.live" / "saved.json", content)
    put(cache.directory / "bad" / "disk.img", disk)
    keys = {warm.key for warm in cache.entries()}
    assert "good" in keys
    assert keys <= {"good", "bad"}
    assert cache.prune(1 << 30) == []


@given(st.sampled_from([*STRANGE, b'{"problem": 5}', b'{"problem": null, "more": 1}', None]))
def test_damaged_outcome_of_a_trial_is_tried_again(tmp_path: Path, content: bytes | None) -> None:
    binary = tmp_path / "qemu"
    if not binary.exists():
        binary.touch()
    cache = tmp_path / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerator, "KVM_DEVICE", binary)
        patch.setattr(accelerator, "try_accelerator", lambda *_: Trial("tried"))
        cache.mkdir(exist_ok=True)
        for kept in cache.iterdir():
            put(kept, b"")
        assert kvm_problem(binary, cache, retry=True) == "tried"
        (kept,) = cache.glob("kvm-*")
        put(kept, content)
        assert kvm_problem(binary, cache) == "tried"


@pytest.fixture
def registry(tmp_path: Path) -> PortRegistry:
    return PortRegistry(tmp_path / "ports")


NO_PATHS = st.binary(max_size=40) | damaged(b"/tmp\n") | st.just(b"/" + b"x" * 300 + b"\n")


@given(contents=st.lists(st.none() | NO_PATHS, min_size=2, max_size=6))
@example(contents=[None, b"\xff\xfe", b"/" + b"x" * 5000, b"\0"])
def test_damaged_leases_keep_nobody_from_others(
    registry: PortRegistry, tmp_path: Path, contents: list[bytes | None]
) -> None:
    owner = tmp_path / "owner"
    owner.mkdir(exist_ok=True)
    registry.directory.mkdir(exist_ok=True, mode=0o700)
    for number, content in enumerate(contents):
        put(registry.directory / str(PORTS[0] + number), content)
    lease = registry.acquire(owner)
    assert PORTS[0] <= lease.ssh < lease.telnet <= PORTS[-1]
    registry.release(lease, owner)
    registry.release(PortLease(PORTS[0], PORTS[0] + 1), owner)
    for number in range(len(contents)):
        put(registry.directory / str(PORTS[0] + number), b"")


@given(name=PATHS.map(lambda path: path.name).filter(bool))
@example(name=os.fsdecode(b"\xff"))
@example(name="a\rb")
@example(name="a\n")
def test_lease_holds_for_a_directory_of_any_name(
    registry: PortRegistry, tmp_path: Path, name: str
) -> None:
    owner = tmp_path / "owners" / name
    owner.mkdir(parents=True, exist_ok=True)
    lease = registry.acquire(owner)
    other = registry.acquire(tmp_path)
    assert {lease.ssh, lease.telnet}.isdisjoint({other.ssh, other.telnet})
    registry.release(lease, owner)
    assert not (registry.directory / str(lease.ssh)).exists()
    registry.release(other, tmp_path)


def qcow2(backing: bytes, *, offset: int = 32, length: int | None = None) -> bytes:
    told = len(backing) if length is None else length
    header = b"QFI\xfb" + (3).to_bytes(4, "big") + offset.to_bytes(8, "big")
    return (header + told.to_bytes(4, "big")).ljust(32, b"\0") + backing


DISKS = st.builds(
    qcow2,
    st.binary(max_size=40)
    | st.sampled_from([b"a.img", b"b.img", b"../d/a.img", b".", b"a.img/x", b"x" * 300, b"a\0b"]),
    offset=st.sampled_from([0, 8, 32, 10**6, 2**63, 2**64 - 1]) | st.integers(0, 100),
    length=st.none() | st.sampled_from([0, 1024, 2**32 - 1]) | st.integers(0, 50),
)


@given(st.lists(DISKS | damaged(qcow2(b"b.img")), min_size=2, max_size=2))
@example([qcow2(b"a.img"), b""])
@example([qcow2(b"b.img"), qcow2(b"a.img")])
@example([qcow2(b"../d/a.img"), b""])
@example([qcow2(b"b.img", offset=2**64 - 1), b""])
@example([qcow2(b"b.img", length=2**32 - 1), b""])
@example([qcow2(b"a\0b"), qcow2(b"x" * 300)])
def test_damaged_disk_has_an_end(tmp_path: Path, contents: list[bytes]) -> None:
    directory = tmp_path / "d"
    directory.mkdir(exist_ok=True)
    for name, content in zip(("a.img", "b.img"), contents, strict=True):
        put(directory / name, content)
    chain = layers.chain(directory / "a.img")
    assert chain[0] == directory / "a.img"
    assert len(chain) == len(set(chain)) <= 4


@pytest.fixture
def cloud(tmp_path: Path) -> Qemu:
    binary = tmp_path / "qemu-system-x86_64"
    binary.touch(mode=0o755)
    (tmp_path / "work").mkdir(exist_ok=True)
    config = tmp_path / "config.toml"
    config.write_text(f"[qemu]\nqemu_binary = '{binary}'\nworking_dir = '{tmp_path}/work'\n")
    return Qemu("t", timestamp_suffix=False, config_file=config)


@given(NAMES | st.builds("{}::{}::{}".format, NAMES, NAMES, NAMES))
@example("x" * 5000)
@example("/a\0b/c::1::2")
@example("\ud800/a/b::1::2")
def test_what_is_no_id_of_an_instance_is_told_of(cloud: Qemu, instance_id: str) -> None:
    with pytest.raises(InstanceNotFoundError, match=r"No instance in|is not the id"):
        cloud.get_instance(instance_id)


FILES = {
    "machine.json": SPEC_TEXT,
    "login.json": LOGIN_TEXT,
    "process.json": b'{"pid": 1234, "start": 5678}',
}
DAMAGED_FILES = st.sampled_from(sorted(FILES)).flatmap(
    lambda name: st.tuples(st.just(name), st.none() | damaged_json(FILES[name]))
)


@given(DAMAGED_FILES)
def test_instance_with_damaged_files_is_found_or_told_of(
    cloud: Qemu, rundir: RunDirectory, broken: tuple[str, bytes | None]
) -> None:
    for name, content in {**FILES, **dict([broken])}.items():
        put(rundir.path / name, content)
    instance_id = f"{rundir.disk}::18000::18001"
    try:
        instance = cloud.get_instance(instance_id)
    except InstanceNotFoundError as error:
        assert str(rundir.path) in str(error)
    else:
        assert instance.id == instance_id
        assert instance.port == "18000"


def test_whole_instance_is_found(cloud: Qemu, rundir: RunDirectory) -> None:
    rundir.write_spec(SPEC)
    rundir.write_login(LOGIN)
    found: Any = cloud.get_instance(f"{rundir.disk}::18000::18001")
    assert found.username == "ubuntu"
