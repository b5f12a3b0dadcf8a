"""The machine for the next test is there before it is asked for, and never one too many."""

from __future__ import annotations

import signal

import pytest

from pycloudlib import Qemu
from pycloudlib.qemu.host.budget import Budget, Capacity
from pycloudlib.qemu.instance import QemuInstance
from tests.qemu.machines import alive, becomes, qemus, save
from tests.qemu.plugin.conftest import LIMIT, Suite

pytestmark = pytest.mark.qemu

TWO = "vm_processors = 2"

HANDED_OVER = """
def test_one(vm):
    note("ahead", one_is_ahead(vm))
    note("name", vm.name)

def test_two(vm):
    note("got", vm.machine.pid)
    note("name", vm.name)
"""


def test_next_tests_machine_is_there_before_it_is_asked_for(suite: Suite) -> None:
    suite.write(HANDED_OVER, settings=TWO)

    suite.run(passed=2)

    assert suite.noted("got") == suite.noted("ahead")
    assert len(suite.noted("start")) == 2, "none is started for a test that does not come"


@pytest.mark.thorough
def test_machines_have_names_and_identities_of_their_own(suite: Suite) -> None:
    suite.write(
        """
import json, pytest

@pytest.mark.parametrize("number", range(3))
def test_it(vm, number):
    fix_up = json.loads((vm.instance_dir / "fix-up.json").read_text())
    identity = fix_up["identity"]
    note("identity", vm.name, identity["hostname"], identity["machine_id"],
         (vm.instance_dir / "known_hosts").read_text())
    if number < 2:
        one_is_ahead(vm)
""",
        settings=TWO,
    )

    suite.run(passed=3)

    identities = suite.noted("identity")
    for number, (name, hostname, _, _) in enumerate(identities):
        assert name == hostname
        assert name.startswith(f"test-it-{number}-")
    for each in zip(*identities, strict=True):
        assert len(set(each)) == 3


@pytest.mark.thorough
def test_no_machine_is_started_ahead_without_the_option(suite: Suite) -> None:
    suite.write(
        "@pytest.mark.parametrize('number', range(3))\n"
        "def test_it(vm, number): assert others(vm) == []\n",
        settings=TWO,
    )

    suite.run("--vm-ahead=0", passed=3)

    assert [before for (before,) in suite.noted("start")] == [0, 0, 0]


@pytest.mark.parametrize(
    "settings",
    ["vm_processors = 1", pytest.param("vm_memory_mib = 100", marks=pytest.mark.thorough)],
    ids=["processors", "memory"],
)
def test_nothing_is_ahead_that_does_not_fit(suite: Suite, settings: str) -> None:
    suite.write(
        "@pytest.mark.parametrize('number', range(3))\ndef test_it(vm, number): pass\n",
        settings=settings,
    )

    suite.run(passed=3)

    assert [before for (before,) in suite.noted("start")] == [0, 0, 0]


@pytest.mark.thorough
def test_budget_is_kept_by_workers_together(suite: Suite) -> None:
    suite.write(
        "@pytest.mark.parametrize('number', range(8))\ndef test_it(vm, number): pass\n",
        settings="vm_processors = 3",
    )

    suite.run("-n", "2", passed=8)

    assert max(before for (before,) in suite.noted("start")) <= 2


def test_what_is_ahead_is_given_back_at_once_to_who_waits(suite: Suite) -> None:
    suite.write(
        """
from pathlib import Path

def test_one(vm):
    note("ahead", one_is_ahead(vm))
    assert machines.becomes(Path("go").exists, 60)
    note("one is done")

def test_two(vm):
    assert machines.runs(vm)
""",
        settings=TWO,
    )
    budget = Budget(suite.work.parent / "state" / "budget", Capacity(2, 100_000))
    with suite.running() as process:
        (pid,) = suite.wait_until_noted("ahead", process)
        with budget.reserving(Capacity(1, 64), lambda _holders: None):
            assert suite.noted("one is done") == []
            assert not alive(pid), "it still uses what it has given back"
            (suite.directory / "go").touch()
        output, _ = process.communicate(timeout=LIMIT)

    assert process.returncode == 0, output
    suite.leaves_nothing()


FAILING = """
def test_one(vm):
    one_is_ahead(vm)
    raise ValueError("as it is")

def test_two(vm): pass
def test_three(vm): pass
"""


def test_nothing_is_left_after_the_first_failure(suite: Suite) -> None:
    suite.write(FAILING, settings=TWO)

    suite.run("-x", failed=1)


@pytest.mark.thorough
def test_tests_after_a_failure_have_their_machines(suite: Suite) -> None:
    suite.write(FAILING, settings=TWO)

    output = suite.run(failed=1, passed=2)

    assert output.count("- machine test-") == 1, "others are not of this test"


@pytest.mark.thorough
def test_only_the_failed_tests_machine_is_kept(suite: Suite, cloud: Qemu) -> None:
    suite.write(FAILING.replace("raise", "note('kept', vm.id)\n    raise"), settings=TWO)

    with suite.running("--vm-keep") as process:
        output, _ = process.communicate(timeout=LIMIT)

    assert "1 failed, 2 passed" in output
    ((kept,),) = suite.noted("kept")
    machine = cloud.get_instance(kept)
    assert qemus(suite.work) == [machine.machine.pid]
    assert machine.delete() == []
    cloud.prune()
    suite.leaves_nothing()


WAITING = """
import os, time

def test_one(vm):
    note("ahead", one_is_ahead(vm), os.getpid())
    time.sleep(60)

def test_two(vm): pass
"""


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.thorough),
        pytest.param(signal.SIGKILL, marks=pytest.mark.thorough),
    ],
)
def test_nothing_is_left_of_a_run_that_is_interrupted_or_killed(
    suite: Suite, cloud: Qemu, number: signal.Signals
) -> None:
    suite.write(WAITING, settings=TWO)

    with suite.running() as process:
        suite.wait_until_noted("ahead", process)
        process.send_signal(number)
        process.communicate(timeout=LIMIT)

    assert becomes(lambda: not qemus(suite.work))
    cloud.prune()
    suite.leaves_nothing()


@pytest.mark.thorough
def test_nothing_is_left_of_a_worker_that_is_killed(suite: Suite, cloud: Qemu) -> None:
    suite.write(WAITING.replace("time.sleep(60)", "os.kill(os.getpid(), 9)"), settings=TWO)

    with suite.running("-n", "1", "--max-worker-restart=0") as process:
        output, _ = process.communicate(timeout=LIMIT)

    assert "crashed" in output
    assert becomes(lambda: not qemus(suite.work))
    cloud.prune()
    suite.leaves_nothing()


def test_machine_that_dies_while_it_waits_is_replaced(suite: Suite) -> None:
    suite.write(
        """
import os

def test_one(vm):
    pid = one_is_ahead(vm)
    os.kill(pid, 9)
    assert machines.becomes(lambda: not machines.alive(pid))

def test_two(vm):
    assert machines.runs(vm)
""",
        settings=TWO,
    )

    suite.run(passed=2)


def test_each_test_gets_the_machine_that_it_wants(suite: Suite) -> None:
    suite.write(
        """
import pytest
from pycloudlib.guest.data.seed import read_iso

SCRIPT = "#!/bin/sh\\n# marked\\n"

def check(vm, user_data):
    data = read_iso(vm.instance_dir / "seed.iso").user_data or b""
    assert (b"marked" in data) == (user_data is not None), data
    note("machine", vm.name)

@pytest.mark.parametrize("number", range(2))
def test_plain(vm, number):
    check(vm, None)

@pytest.mark.vm(user_data=SCRIPT)
@pytest.mark.parametrize("number", range(2))
def test_marked(vm, number):
    check(vm, SCRIPT)

class TestMarked:
    pytestmark = pytest.mark.vm(user_data=SCRIPT)

    def test_by_class(self, vm):
        check(vm, SCRIPT)

    def test_given(self, vm_factory):
        check(vm_factory(user_data="#!/bin/sh\\n"), None)

def test_plain_again(vm):
    check(vm, None)

def test_without(): pass

def test_several(vm, vm_factory):
    check(vm, None)
    check(vm_factory(name="odd"), None)
    check(vm_factory(user_data=SCRIPT), SCRIPT)

@pytest.mark.parametrize("number", range(3))
def test_options(vm_factory, number):
    vm = vm_factory(name=f"own-{number}")
    assert vm.name == f"own-{number}"
    check(vm, None)

@pytest.mark.skip
def test_skipped(vm): pass

@pytest.mark.skipif(True, reason="as it is")
def test_skipped_too(vm): pass

def test_last(vm):
    check(vm, None)
""",
        settings=TWO,
    )

    suite.run(passed=13, skipped=2)

    names = [name for (name,) in suite.noted("machine")]
    assert len(set(names)) == len(names) == 14


@pytest.fixture
def other_image(running: QemuInstance) -> str:
    """Return another saved machine."""
    return str(save(running, "other").image)


@pytest.mark.thorough
def test_tests_of_other_images_have_theirs(other_image: str, suite: Suite) -> None:
    suite.write(
        f"""
import pytest
from pycloudlib.qemu.disk.layers import chain

@pytest.mark.parametrize("number", range(2))
def test_first(vm, number):
    assert {other_image!r} not in map(str, chain(vm.instance_path))

@pytest.mark.vm(image={other_image!r})
@pytest.mark.parametrize("number", range(2))
def test_second(vm, number):
    assert {other_image!r} in map(str, chain(vm.instance_path))

def test_third(vm):
    assert {other_image!r} not in map(str, chain(vm.instance_path))
""",
        settings=TWO,
    )

    suite.run(passed=5)


@pytest.mark.thorough
def test_prepared_machines_are_ahead_too(suite: Suite) -> None:
    suite.write(
        """
import pytest

@pytest.fixture(scope="session")
def vm_image(prepare_vm, pytestconfig):
    return prepare_vm(lambda vm: note("prepared"), image=pytestconfig.option.vm_image)

def test_one(vm):
    note("ahead", one_is_ahead(vm))

def test_two(vm):
    note("got", vm.machine.pid)
""",
        settings=TWO,
    )

    suite.run(passed=2)

    assert suite.noted("prepared") == [[]]
    assert suite.noted("got") == suite.noted("ahead")


@pytest.mark.thorough
def test_factory_of_a_prepared_image_works_in_any_order(suite: Suite) -> None:
    suite.write(
        """
import pytest
from pycloudlib.qemu.disk.layers import chain

@pytest.fixture(scope="session")
def prepared(prepare_vm):
    return prepare_vm(lambda vm: None)

@pytest.mark.parametrize("number", range(2))
def test_prepared(vm_factory, prepared, number):
    assert prepared in map(str, chain(vm_factory(prepared).instance_path))

@pytest.mark.parametrize("number", range(2))
def test_plain(vm, number):
    assert "made" not in str(chain(vm.instance_path))

@pytest.mark.parametrize("number", range(2))
def test_prepared_again(vm_factory, prepared, number):
    assert prepared in map(str, chain(vm_factory(prepared).instance_path))
""",
        settings=TWO,
    )

    suite.run(passed=6)


def test_shared_machine_keeps_its_name_and_the_budget(suite: Suite) -> None:
    suite.write(
        """
import pytest

@pytest.mark.parametrize("number", range(4))
def test_shared(shared_vm, number):
    assert machines.runs(shared_vm)
    note("name", shared_vm.name)

def test_fresh(vm):
    note("fresh", vm.name)

def test_shared_after(shared_vm):
    note("name", shared_vm.name)
    shared_vm.shutdown(wait=False)
    shared_vm.machine.kill()

def test_shared_after_it_was_switched_off(shared_vm):
    assert machines.runs(shared_vm)
    note("name", shared_vm.name)
    shared_vm.delete()

def test_shared_after_it_was_deleted(shared_vm):
    assert machines.runs(shared_vm)
    note("other", shared_vm.name)
""",
        settings=TWO,
    )

    suite.run(passed=8)

    ((name,),) = {tuple(values) for values in suite.noted("name")}
    assert name not in {other for (other,) in suite.noted("other") + suite.noted("fresh")}
    assert max(before for (before,) in suite.noted("start")) <= 1


def test_fixture_that_fails_and_a_test_that_is_run_again_lose_nothing(suite: Suite) -> None:
    suite.write(
        """
import pytest

@pytest.fixture
def failing(vm):
    raise ValueError("as it is")

@pytest.fixture
def failing_before():
    raise ValueError("as it is")

def test_one(vm): pass
def test_fails(failing): pass
def test_fails_before(failing_before, vm): pass
def test_fails_after(vm, failing_before): pass
def test_two(vm):
    note("pid", vm.machine.pid)
def test_three(vm): pass
""",
        settings=TWO,
        conftest="""
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    if item.name != "test_two":
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for log in (False, True):
        reports = runtestprotocol(item, nextitem=nextitem, log=log)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
""",
    )

    suite.run(passed=3, errors=3)

    first, second = suite.noted("pid")
    assert first != second


@pytest.mark.thorough
def test_part_of_a_suite_has_its_machines(suite: Suite) -> None:
    suite.write(
        "@pytest.mark.parametrize('number', range(6))\n"
        "def test_it(vm, number):\n    note('start of', number)\n",
        settings=TWO,
    )

    suite.run("-k", "1 or 3 or 5", passed=3)

    assert len(suite.noted("start")) == 3


@pytest.mark.thorough
def test_machine_is_not_ahead_of_a_test_that_the_run_does_not_reach(suite: Suite) -> None:
    suite.write(
        """
def test_one(vm):
    one_is_ahead(vm)
    pytest.exit("as it is")

def test_two(vm): pass
""",
        settings=TWO,
    )

    with suite.running() as process:
        process.communicate(timeout=LIMIT)

    suite.leaves_nothing()


@pytest.mark.thorough
def test_two_ahead_fit_two(suite: Suite) -> None:
    suite.write(
        """
@pytest.mark.parametrize("number", range(5))
def test_it(vm, number):
    if number < 3:
        assert machines.becomes(lambda: len(others(vm)) == 2)
    assert machines.runs(vm)
""",
        settings="vm_processors = 3\nvm_ahead = 2",
    )

    suite.run(passed=5)

    assert len(suite.noted("start")) == 5
