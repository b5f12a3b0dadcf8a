"""The commands of a machine's life: launch, power, save and copy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from pycloudlib.cli import looking
from pycloudlib.cli.machines import (
    ImageName,
    MachineName,
    Minutes,
    NewName,
    Size,
    delete_machine,
    find_machine,
    free_names,
    list_machines,
    open_machine,
    read_document,
)
from pycloudlib.cli.output import age_in_words, exit_code_of, is_expected, print_json, tell
from pycloudlib.cli.session import Session, command, is_terminal, json_option, wait_until_ready
from pycloudlib.errors import (
    ImageInUseError,
    ImageNotFoundError,
    InstanceExistsError,
    InstanceNotFoundError,
)
from pycloudlib.qemu import imagenames
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.spec import DEFAULT_INSTANCE_TYPE, InstanceType
from pycloudlib.util import raise_cleanup_errors

_STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
_FILE = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)


@command("launch", short_help="Start a machine from an image or release.")
@click.argument("image", type=ImageName())
@click.option("-n", "--name", type=NewName(), help="What it is called; made up by default.")
@click.option("-c", "--cpus", type=click.IntRange(1, 999), help="Processors; 1 by default.")
@click.option("-m", "--memory", type=Size("M"), help="Memory, such as 2G; 1500M by default.")
@click.option("-d", "--disk", type=Size("G"), help="Disk, such as 20G; 10G by default.")
@click.option("-u", "--user-data", type=_FILE, help="File for cloud-init; - for standard input.")
@click.option("--network-config", type=_FILE, help="Network configuration for cloud-init.")
@click.option("--username", help="Login user; by default the image's own.")
@click.option("--kernel-cmdline", default="", help="Boot the image's kernel directly with this.")
@click.option("--launch-arg", "launch_args", multiple=True, help="A further argument for QEMU.")
@click.option("--daily", is_flag=True, help="The daily image of a release, not the released one.")
@click.option("--fast-boot/--no-fast-boot", default=None, help="Begin the boot at cloud-init.")
@click.option("--warm", is_flag=True, help="A copy of one that was launched alike before.")
@click.option("--fresh-identity", is_flag=True, help="A copy is somebody of its own.")
@click.option("-w", "--wait", is_flag=True, help="Return when it is ready, not when it boots.")
@click.option("--timeout", type=Minutes(), metavar="MINUTES", help="How long --wait may take.")
@json_option
def launch(
    session: Session,
    image: str,
    name: str | None,
    cpus: int | None,
    memory: int | None,
    disk: int | None,
    user_data: Path | None,
    network_config: Path | None,
    username: str | None,
    kernel_cmdline: str,
    launch_args: tuple[str, ...],
    daily: bool,
    fast_boot: bool | None,
    warm: bool,
    fresh_identity: bool,
    wait: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Start a machine from IMAGE, and print its name.

    IMAGE is a release (noble, 24.04, bookworm), which is downloaded or built if it is not here; a
    snapshot; a build that is here (noble/20260930); or the path of a disk image.

    The machine lives until it is deleted.
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout is for --wait")
    if (
        user_data is not None
        and network_config is not None
        and all(str(file) in _STANDARD_INPUT for file in (user_data, network_config))
    ):
        raise click.UsageError(
            "Standard input can be one file: --user-data and --network-config both ask for it"
        )
    cloud = session.cloud
    given, network = read_document(user_data), read_document(network_config)
    image_id = imagenames.get_image(cloud, image, daily=daily, on_progress=session.progress)
    saved = savedmachine.find(Path(image_id))
    usual = InstanceType.parse(DEFAULT_INSTANCE_TYPE) if saved is None else saved.spec.instance_type
    size = InstanceType(cpus or usual.cpus, memory or usual.memory_mib)

    def start(chosen: str) -> QemuInstance:
        return cloud.launch(
            image_id,
            str(size),
            user_data=given,
            network_config=network,
            kernel_cmdline=kernel_cmdline,
            username=username,
            launch_args=list(launch_args) or None,
            fast_boot=fast_boot,
            warm=warm,
            fresh_identity=fresh_identity or None,
            name=chosen,
            disk_size_gib=disk,
        )

    instance = start_named(session, name, imagenames.name_prefix(image), start)
    if wait:
        wait_until_ready(session, instance, timeout)
    if as_json:
        print_json(looking.collect(find_machine(cloud.working_dir, instance.name)))
    else:
        click.echo(instance.name)
    if not wait:
        session.note(f"It boots now: 'pycloudlib wait {instance.name}' waits until it is ready")


def start_named(
    session: Session, name: str | None, prefix: str, start: Callable[[str], QemuInstance]
) -> QemuInstance:
    """Start a machine under the name that was chosen, or under the first that is free.

    Raises:
        InstanceExistsError: The chosen name is in use; says by what.
    """
    working_dir = session.cloud.working_dir
    if name is not None:
        try:
            return start(name)
        except InstanceExistsError as error:
            raise NameInUseError(error, tell_user_of_name(session, name)) from error
    for candidate in free_names(working_dir, prefix):
        try:
            return start(candidate)
        except InstanceExistsError:
            continue  # another command was quicker
    raise AssertionError("unreachable: there is always another name")


class NameInUseError(InstanceExistsError):
    """The name that was chosen is in use, with what is known of its user."""

    def __init__(self, error: InstanceExistsError, user: str) -> None:
        super().__init__(error.name, error.directory)
        name = error.name
        self.args = (
            f"The name {name!r} is in use{user}: 'pycloudlib delete {name}' removes it, "
            "or choose another",
        )


def tell_user_of_name(session: Session, name: str) -> str:
    """Tell, as the end of a clause, of the machine that has a name."""
    try:
        found = find_machine(session.cloud.working_dir, name)
    except InstanceNotFoundError:
        return ""
    seen = looking.collect(found)
    of_what = looking.image_in_words(seen.image, session.cloud.image_dir)
    age = age_in_words(looking.created_at(found))
    return f" by a machine of {of_what} ({seen.state}, launched {age} ago)"


_names = click.argument("names", type=MachineName(), nargs=-1, metavar="NAME...")
_all = click.option("-a", "--all", "everything", is_flag=True, help="All machines of `list`.")
_wait = click.option("-w", "--wait", is_flag=True, help="Return when it is ready.")
_timeout = click.option(
    "--timeout", type=Minutes(), metavar="MINUTES", help="How long it may take."
)


@command("start", short_help="Switch machines on.")
@_names
@_all
@_wait
@_timeout
def start(
    session: Session, names: tuple[str, ...], everything: bool, wait: bool, timeout: float | None
) -> int:
    """Switch machines on; those that run already stay as they are."""

    def do(name: str) -> None:
        instance = open_machine(session.cloud, name)
        instance.start(wait=False)
        if wait:
            wait_until_ready(session, instance, timeout)

    return for_each(session, _chosen(session, names, everything), do)


@command("stop", short_help="Switch machines off.")
@_names
@_all
@click.option("-f", "--force", is_flag=True, help="Pull the plug instead of asking the guest.")
def stop(session: Session, names: tuple[str, ...], everything: bool, force: bool) -> int:
    """Switch machines off: by the power button, or by force if the guest does not answer to it."""

    def do(name: str) -> None:
        instance = open_machine(session.cloud, name)
        if force:
            instance.machine.kill()
        else:
            if is_terminal():
                session.note(f"Waiting for {name} to switch itself off (--force does not)")
            instance.shutdown()

    return for_each(session, _chosen(session, names, everything), do)


@command("restart", short_help="Reboot machines.")
@_names
@_all
@_wait
def restart(session: Session, names: tuple[str, ...], everything: bool, wait: bool) -> int:
    """Reboot machines, cleanly where the guest can be asked to."""

    def do(name: str) -> None:
        open_machine(session.cloud, name).restart(wait=wait)

    return for_each(session, _chosen(session, names, everything), do)


@command("wait", short_help="Wait until machines are ready.")
@_names
@_all
@_timeout
def wait(session: Session, names: tuple[str, ...], everything: bool, timeout: float | None) -> int:
    """Wait until machines execute commands and cloud-init has finished.

    It ends at once when a machine can never be ready, and says why.
    """

    def do(name: str) -> None:
        wait_until_ready(session, open_running(session, name), timeout)

    return for_each(session, _chosen(session, names, everything), do)


@command("delete", short_help="Delete machines.")
@_names
@_all
def delete(session: Session, names: tuple[str, ...], everything: bool) -> int:
    """Delete machines, running or not, with their disks. Snapshots of them stay."""

    def do(name: str) -> None:
        raise_cleanup_errors(delete_machine(session.cloud, name), None)

    code = for_each(session, _chosen(session, names, everything), do)
    drop_fork_bases(session)
    return code


def drop_fork_bases(session: Session) -> list[str]:
    """Delete what forks were built on that are no more; give the paths."""
    dropped = []
    for image in imagenames.fork_bases(session.cloud.working_dir):
        try:
            session.cloud.delete_image(str(image))
            dropped.append(str(image))
        except ImageInUseError:
            continue
    return dropped


def _chosen(session: Session, names: Sequence[str], everything: bool) -> list[str]:
    if bool(names) is everything:
        raise click.UsageError("Name machines, or give --all")
    if names:
        return list(dict.fromkeys(names))
    return [machine.full_name for machine in list_machines(session.cloud.working_dir)]


def for_each(session: Session, names: Sequence[str], do: Callable[[str], None]) -> int:
    """Do something with each of some machines; what fails with one does not keep the others.

    Returns:
        The exit code: of the first that failed, or 0.
    """
    code = 0
    for name in names:
        try:
            do(name)
        except Exception as error:
            if len(names) == 1 or not is_expected(error):
                raise
            tell(error, with_traceback=session.verbosity > 1)
            code = code or int(exit_code_of(error))
    return code


def open_running(session: Session, name: str) -> QemuInstance:
    """Take a machine over that is to be reached; it is put right first where it is a copy.

    Errors are those of `open_machine`.
    """
    instance = open_machine(session.cloud, name)
    instance.machine.look()
    instance.put_right_soon()
    return instance


@command("snapshot", short_help="Make an image of a machine.")
@click.argument("name", type=MachineName())
@click.option("--memory", is_flag=True, help="Save the running machine; its copies do not boot.")
@click.option("--clean/--no-clean", default=True, help="Whether copies boot as for the first time.")
def snapshot(session: Session, name: str, memory: bool, clean: bool) -> None:
    """Make an image of a machine, and print its name, by which `launch` takes it.

    For an image of the disk the machine is switched off; one that is off already is saved as it is.
    With --memory it runs on, with its connections, and `launch` starts copies that go on from there
    at once.
    """
    instance = open_running(session, name)
    image = session.cloud.snapshot(instance, clean, memory=memory)
    click.echo(Path(image).stem)
    if not memory:
        session.note(f"{name} is off: 'pycloudlib start {name}' switches it on")


@command("fork", short_help="Start running copies of a running machine.")
@click.argument("name", type=MachineName())
@click.option("-n", "--name", "new_name", type=NewName(), help="What the copy is called.")
@click.option("--count", type=click.IntRange(1, 50), default=1, help="How many; 1 by default.")
@click.option("--fresh-identity", is_flag=True, help="Each copy is somebody of its own.")
def fork(
    session: Session, name: str, new_name: str | None, count: int, fresh_identity: bool
) -> None:
    """Start copies of a machine that go on from this moment, and print their names.

    The machine itself goes on, too. Several copies are called NAME-1, NAME-2 and so on.
    """
    instance = open_running(session, name)
    prefix = instance.name if new_name is None else new_name
    if new_name is not None and count == 1:
        names = [new_name]
    else:
        names = list(itertools.islice(free_names(session.cloud.working_dir, prefix), count))
    copies = instance.fork(count, fresh_identity=fresh_identity, names=names)
    for copy in copies:
        click.echo(copy.name)


@command("rollback", short_help="Take a machine back to where it was saved.")
@click.argument("name", type=MachineName())
@click.argument("snapshot", type=ImageName(), required=False)
def rollback(session: Session, name: str, snapshot: str | None) -> None:
    """Take a machine back to a SNAPSHOT with memory, by default its latest one.

    What happened in it since is forgotten; it goes on from there.
    """
    instance = open_machine(session.cloud, name)
    cloud = session.cloud
    if snapshot is None:
        latest = imagenames.find_saved_of(cloud.working_dir, instance.name)
        if latest is None:
            raise ImageNotFoundError(
                message=f"{name} has no snapshot to go back to: "
                f"'pycloudlib snapshot --memory {name}' makes one"
            )
        image = str(latest)
    else:
        found = imagenames.find_here(cloud, snapshot)
        if found is None:
            raise imagenames.unknown_image(cloud, snapshot)
        image = found
    instance.rollback(image)
