"""The pytest plugin with guests: suites of tests run, their machines copies of a saved one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pycloudlib import Qemu

pytestmark = pytest.mark.guest

LIMIT = 300


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Give what runs a suite, with the home directory that machines and settings belong to."""
    monkeypatch.setenv("HOME", HOME)
    pytester.makeini("[pytest]\n")  # whatever stands in directories above
    return pytester


HOME = os.environ["HOME"]

FRESH_AND_SHARED = """
import pytest

SEEN = {}

def test_fresh_one(vm):
    SEEN["one"] = vm.name
    assert vm.execute("touch /var/tmp/mark; hostname") == vm.name

def test_fresh_two(vm):
    assert vm.name != SEEN["one"]
    assert vm.execute("ls /var/tmp/mark; hostname") == vm.name

@pytest.mark.parametrize("number", range(3))
def test_shared(shared_vm, number):
    assert SEEN.setdefault("shared", shared_vm.name) == shared_vm.name
    assert shared_vm.execute("ls /var/tmp/mark").failed
    assert shared_vm.execute("touch /var/tmp/mark /run/mark; hostname") == shared_vm.name

def test_shared_deleted(shared_vm):
    assert shared_vm.delete() == []

def test_shared_anew(shared_vm):
    assert shared_vm.name != SEEN["shared"]
    assert shared_vm.execute("ls /var/tmp/mark").failed

@pytest.mark.vm(user_data="#!/bin/sh\\necho marked >/var/tmp/proof\\n")
def test_marked(vm_factory, tmp_path):
    script = tmp_path / "user-data"
    script.write_text("#!/bin/sh\\necho given >/var/tmp/proof\\n")
    by_marker, given = vm_factory(), vm_factory(user_data=script)
    assert by_marker.execute("cat /var/tmp/proof") == "marked"
    assert given.execute("cat /var/tmp/proof") == "given"
"""


@pytest.mark.usefixtures("working_dir")
def test_machines_are_fresh_or_as_they_were_at_their_beginning(
    suite: pytest.Pytester, saved: str
) -> None:
    suite.makepyfile(FRESH_AND_SHARED)

    result = suite.runpytest_subprocess(f"--vm-image={saved}", timeout=LIMIT)

    result.assert_outcomes(passed=8)


AHEAD = """
import os, time, pytest

HOST_KEY = "/etc/ssh/ssh_host_ed25519_key.pub"

@pytest.mark.parametrize("number", range(3))
def test_it(vm, number):
    facts = [vm.name, vm.execute("hostname"), *map(vm.execute, (
        "cat /etc/machine-id", f"cut -d' ' -f2 {HOST_KEY}", "ls /var/tmp/mark; touch /var/tmp/mark"
    ))]
    known = (vm.instance_dir / "known_hosts").read_text()
    assert facts[3] in known
    ahead = lambda: [
        path.parent.name for path in vm.instance_dir.parent.glob("*/machine.json")
        if path.parent != vm.instance_dir
    ]
    until = time.monotonic() + 60
    while number < 2 and not ahead() and time.monotonic() < until:
        time.sleep(0.05)
    with open(os.environ["QUEUE_LOG"], "a") as log:
        print(*(str(fact) or "-" for fact in facts), *ahead(), file=log)
"""


@pytest.mark.usefixtures("working_dir")
def test_machine_that_was_started_ahead_has_an_identity_of_its_own(
    suite: pytest.Pytester, saved: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("QUEUE_LOG", str(log))
    suite.makeini("[pytest]\nvm_processors = 2\n")
    suite.makepyfile(AHEAD)

    result = suite.runpytest_subprocess(f"--vm-image={saved}", timeout=LIMIT)

    result.assert_outcomes(passed=3)
    tests = [line.split() for line in log.read_text().splitlines()]
    names, hostnames, machine_ids, host_keys, marks, *_ = zip(
        *(test[:5] for test in tests), strict=True
    )
    assert names == hostnames
    for values in (names, machine_ids, host_keys):
        assert len(set(values)) == 3
    assert set(marks) == {"-"}
    assert [test[5:] for test in tests] == [[names[1]], [names[2]], []]


FAILING = """
import pytest

@pytest.fixture(scope="session")
def prepared(prepare_vm):
    return prepare_vm(lambda vm: vm.execute("touch /var/tmp/prepared; sync"))

def test_own(vm_factory, prepared):
    vm = vm_factory(prepared)
    assert vm.execute("echo left >>/var/tmp/left; ls /var/tmp/prepared; sync").failed, "as it is"

def test_shared(shared_vm):
    assert shared_vm.execute("echo left >>/var/tmp/left; sync").failed, "as it is"

def test_shared_anew(shared_vm):
    assert shared_vm.execute("cat /var/tmp/left").failed
"""


@pytest.mark.usefixtures("working_dir")
def test_failure_tells_of_its_machines_which_can_be_kept(
    suite: pytest.Pytester, saved: str
) -> None:
    suite.makepyfile(test_failing=FAILING)

    result = suite.runpytest_subprocess(
        f"--vm-image={saved}", "--vm-keep", "--vm-artifacts=kept", timeout=LIMIT
    )

    result.assert_outcomes(failed=2, passed=1)
    told = result.stdout.str()
    assert told.count("Cause: unknown") == 2
    assert re.search(r"- machine test-own-[0-9a-f]{8} -", told)
    (directory,) = suite.path.glob("kept/test_failing.py-test_own/*")
    files = {"error.txt", "machine.json", "events.json", "diagnosis.txt"}
    assert files <= {file.name for file in directory.iterdir()}
    summary = told.rpartition("machines that are kept")[2]
    names = re.findall(r"pycloudlib delete (\S+)", summary)
    assert [re.sub("-[0-9a-f]{8}$", "", name) for name in names] == [
        "pytest/test-own",
        "pytest/shared",
    ]
    try:
        for name in names:
            found = cli("exec", name, "cat", "/var/tmp/left")
            assert (found.returncode, found.stdout) == (0, "left\n"), found.stderr
    finally:
        assert cli("delete", *names).returncode == 0
    assert cli("prune").returncode == 0


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pycloudlib", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


QUEUE = """
import os, time, pytest

@pytest.mark.parametrize("number", range(4))
def test_it(vm, number):
    with open(os.environ["QUEUE_LOG"], "a") as log:
        log.write(f"begin {number}\\n")
    assert vm.execute("true").ok
    with open(os.environ["QUEUE_LOG"], "a") as log:
        log.write(f"end {number}\\n")
"""


@pytest.mark.usefixtures("working_dir")
def test_workers_wait_for_room(
    suite: pytest.Pytester, saved: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("QUEUE_LOG", str(log))
    suite.makeini("[pytest]\nvm_processors = 1\n")
    suite.makepyfile(QUEUE)

    result = suite.runpytest_subprocess(f"--vm-image={saved}", "-n", "3", timeout=LIMIT)

    result.assert_outcomes(passed=4)
    words = [line.split() for line in log.read_text().splitlines()]
    assert [word for word, _number in words] == ["begin", "end"] * 4
    assert len({number for _word, number in words}) == 4


SHARED_BY_WORKERS = """
import os, pytest

@pytest.mark.parametrize("number", range(4))
def test_it(vm, number):
    with open(os.environ["QUEUE_LOG"], "a") as log:
        log.write("booted\\n" if "Linux version" in vm.console_log() else "copied\\n")
    assert vm.execute("cat /var/tmp/proof; hostname") == f"made once\\n{vm.name}"
"""


@pytest.mark.thorough
def test_workers_share_one_machine_that_boots_once(
    suite: pytest.Pytester, image: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("QUEUE_LOG", str(log))
    user_data = f"#!/bin/sh\necho made once >/var/tmp/proof # {uuid.uuid4()}\n"
    (suite.path / "user-data").write_text(user_data)
    suite.makepyfile(
        "from pathlib import Path\nimport pytest\n"
        "pytestmark = pytest.mark.vm(instance_type='c1m512', user_data=Path('user-data'))\n"
        + SHARED_BY_WORKERS
    )
    cloud = Qemu(tag="plugin-test")
    before = {warm.key for warm in cloud.warm_images()}
    try:
        result = suite.runpytest_subprocess(f"--vm-image={image}", "-n", "2", timeout=1200)
    finally:
        for warm in cloud.warm_images():
            if warm.key not in before and not warm.first_boot:
                cloud.delete_image(warm.image_id)

    result.assert_outcomes(passed=4)
    assert sorted(log.read_text().split()) == ["booted", "copied", "copied", "copied"]
