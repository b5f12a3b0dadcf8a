"""The end of machines: delete, clean, context managers; nothing is left."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.errors import CleanupError, InstanceNotFoundError, PycloudlibTimeoutError
from pycloudlib.qemu.host import resources
from pycloudlib.qemu.host.processes import ProcessIdentity
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.vm.running import MachineEndedError, State
from tests.qemu.conftest import UNSTARTED, CloudMaker

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("own_ports")]


def is_gone(instance: QemuInstance, pid: int | None) -> bool:
    free = all(resources.can_listen(int(p)) for p in (instance.port, instance.telnet_port))
    ended = pid is None or ProcessIdentity.find(pid) is None
    return free and ended and not instance.instance_dir.exists()


def test_delete_leaves_no_process_no_directory_and_no_port(unstarted: QemuInstance) -> None:
    pid, instance_id = unstarted.machine.pid, unstarted.id
    assert unstarted.delete() == []
    assert is_gone(unstarted, pid)
    assert unstarted.id == instance_id
    unstarted.wait_for_delete()


def test_delete_can_be_repeated_and_takes_the_instance_off_its_cloud(
    cloud: Qemu, unstarted: QemuInstance
) -> None:
    assert cloud.created_instances == [unstarted]
    assert unstarted.delete(wait=False) == []
    assert unstarted.delete() == []
    assert cloud.created_instances == []


def test_a_dead_machine_can_be_deleted(unstarted: QemuInstance) -> None:
    pid = unstarted.machine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert unstarted.delete() == []
    assert is_gone(unstarted, pid)


def test_delete_waits_for_no_child_that_was_forked_meanwhile(
    unstarted: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a child has copies of all that was open, locks included, for as long as it lives."""
    ours, childs = os.pipe()
    children: list[int] = []

    def fork() -> None:
        child = os.fork()
        if child == 0:
            os.close(childs)
            os.read(ours, 1)
            os._exit(0)
        children.append(child)

    with unstarted.machine.rundir.lock():
        forks = threading.Thread(target=fork)
        forks.start()
        forks.join()
    try:
        deletes = threading.Thread(target=unstarted.delete, daemon=True)
        deletes.start()
        deletes.join(60)
        assert not deletes.is_alive()
        assert os.waitpid(children[0], os.WNOHANG) == (0, 0)
    finally:
        os.close(childs)
        os.close(ours)
        os.waitpid(children[0], 0)


def test_processes_that_outlive_a_lock_do_not_have_it(
    tiny_image: Path, working_dir: Path, tmp_path: Path
) -> None:
    """QEMU, and the guardian that is started with the first machine."""
    program = textwrap.dedent(
        f'''
        import io, os
        from pathlib import Path
        from pycloudlib import Qemu
        from pycloudlib._base.locks import exclusive_lock
        from pycloudlib.qemu.host import ownership as guardian
        config = io.StringIO("""
        [qemu]
        working_dir = "{working_dir}"
        accelerator = "tcg"
        """)
        with Qemu("locks", timestamp_suffix=False, config_file=config) as cloud:
            with exclusive_lock(Path({str(tmp_path / "lock")!r})):
                machine = cloud.launch({str(tiny_image)!r}, launch_args={UNSTARTED!r})
                for pid in (machine.machine.pid, guardian.find_guardian().pid):
                    print(*(os.readlink(file) for file in Path(f"/proc/{{pid}}/fd").iterdir()))
        '''
    )
    shown = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    qemu, guardian = (line.split() for line in shown.stdout.decode().splitlines())
    assert any(file.endswith("/seed.iso") for file in qemu)
    assert any(file.startswith("pipe:") for file in guardian)
    assert [file for file in qemu + guardian if file.endswith("lock")] == []


def test_delete_from_many_threads_at_once(unstarted: QemuInstance) -> None:
    pid = unstarted.machine.pid
    results: list[list[Exception]] = []
    threads = [
        threading.Thread(target=lambda: results.append(unstarted.delete())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[]] * 8
    assert is_gone(unstarted, pid)


def test_delete_from_another_thread_ends_a_wait(unstarted: QemuInstance) -> None:
    deleter = threading.Timer(0.5, unstarted.delete)
    deleter.start()
    with pytest.raises(PycloudlibTimeoutError, match="not running"):
        unstarted.wait(ready_timeout=5)
    deleter.join()


def test_an_instance_is_a_context_manager(cloud: Qemu, tiny_image: Path) -> None:
    with cloud.launch(str(tiny_image), launch_args=UNSTARTED) as instance:
        pid = instance.machine.pid
    assert is_gone(instance, pid)


def test_the_finalizer_can_be_called_twice_and_ends_nothing(unstarted: QemuInstance) -> None:
    unstarted.__del__()
    unstarted.__del__()
    assert unstarted.machine.state is State.PAUSED


def test_clean_deletes_everything_the_cloud_made(cloud: Qemu, tiny_image: Path) -> None:
    instances = [cloud.launch(str(tiny_image), launch_args=UNSTARTED) for _ in range(3)]
    pids = [instance.machine.pid for instance in instances]
    assert cloud.clean() == []
    assert all(is_gone(i, p) for i, p in zip(instances, pids, strict=True))
    assert not cloud.parent_dir.exists()
    assert tiny_image.exists()


def test_a_cloud_can_be_used_again_after_clean(cloud: Qemu, tiny_image: Path) -> None:
    cloud.launch(str(tiny_image), launch_args=UNSTARTED)
    assert cloud.clean() == []
    again = cloud.launch(str(tiny_image), launch_args=UNSTARTED)
    assert again.machine.state is State.PAUSED


def test_leaving_a_cloud_cleans_it(make_cloud: CloudMaker, tiny_image: Path) -> None:
    with make_cloud() as cloud:
        instance = cloud.launch(str(tiny_image), launch_args=UNSTARTED)
        pid = instance.machine.pid
    assert is_gone(instance, pid)


def test_leaving_a_cloud_tells_what_could_not_be_cleaned(
    make_cloud: CloudMaker, tiny_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: object) -> None:
        raise PermissionError("the directory is stuck")

    cloud = make_cloud()
    cloud.launch(str(tiny_image), launch_args=UNSTARTED)
    with monkeypatch.context() as patch:
        patch.setattr("pycloudlib.qemu.state.rundir.RunDirectory.remove", fail)
        with pytest.raises(CleanupError, match="stuck") as raised:
            cloud.__exit__(None, None, None)
    assert [type(error) for error in raised.value.exceptions] == [PermissionError]
    assert cloud.clean() == []


def test_another_cloud_of_the_same_tag_keeps_its_machines(
    make_cloud: CloudMaker, tiny_image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pycloudlib")
    ours, theirs = make_cloud("same"), make_cloud("same")
    mine = ours.launch(str(tiny_image), launch_args=UNSTARTED)
    other = theirs.launch(str(tiny_image), launch_args=UNSTARTED)
    assert ours.clean() == []
    assert not mine.instance_dir.exists()
    assert other.machine.state is State.PAUSED
    assert other.instance_dir.exists()
    (kept,) = (line for line in caplog.messages if line.startswith(f"{ours.parent_dir} is kept: "))
    assert other.name in kept


def test_an_unclean_power_off_keeps_ports_disk_and_seed(unstarted: QemuInstance) -> None:
    before = (unstarted.id, unstarted.machine.spec)
    unstarted.machine.kill()
    with pytest.raises(MachineEndedError):
        unstarted.machine.check_on()
    unstarted.start(wait=False)
    assert unstarted.machine.state is State.PAUSED
    assert (unstarted.id, unstarted.machine.spec) == before


PROGRAM = """
    import io, os, sys
    from pycloudlib import Qemu

    cloud = Qemu("prog", timestamp_suffix=False, config_file=io.StringIO(sys.argv[1]))
    instance = cloud.launch(sys.argv[2], launch_args=["-S"])
"""
TELL = """
    print(instance.id, instance.machine.pid, flush=True)
"""
WAIT_IN_CLOUD = """
    with cloud:
        print(instance.id, instance.machine.pid, flush=True)
        instance.wait()
"""


def run_program(working_dir: Path, image: Path, ending: str) -> subprocess.Popen[str]:
    config = f'[qemu]\nworking_dir = "{working_dir}"\naccelerator = "tcg"\n'
    code = textwrap.dedent(PROGRAM) + textwrap.dedent(ending)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-X", "dev", "-c", code, config, str(image)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_machine_outlives_a_program_that_ends_normally_and_is_found_again(
    make_cloud: CloudMaker, working_dir: Path, tiny_image: Path
) -> None:
    output, errors = run_program(working_dir, tiny_image, TELL).communicate(timeout=60)
    instance_id, pid = output.split()
    assert "Task was destroyed" not in errors
    assert "Traceback" not in errors
    cloud = make_cloud("prog")
    instance = cloud.get_instance(instance_id)
    assert instance.id == instance_id
    assert instance.machine.pid == int(pid)
    assert instance.machine.execute("query-status")["status"] == "prelaunch"
    assert instance.delete() == []
    assert is_gone(instance, int(pid))
    with pytest.raises(InstanceNotFoundError):
        cloud.get_instance(instance_id)


def test_ctrl_c_in_a_program_cleans_up_when_its_cloud_is_left(
    working_dir: Path, tiny_image: Path
) -> None:
    program = run_program(working_dir, tiny_image, WAIT_IN_CLOUD)
    assert program.stdout is not None
    instance_id, pid = program.stdout.readline().split()
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert ProcessIdentity.find(int(pid)) is None
    assert list(working_dir.iterdir()) == []
    assert instance_id


@pytest.mark.parametrize("instance_id", ["", "nonsense", "/nowhere/disk.qcow2::18000::18001"])
def test_an_instance_that_does_not_exist_is_not_found(cloud: Qemu, instance_id: str) -> None:
    with pytest.raises(InstanceNotFoundError):
        cloud.get_instance(instance_id)
