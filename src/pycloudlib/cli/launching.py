"""`launch`: a machine that lives until it is deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from pycloudlib.cli import facts, imagenames
from pycloudlib.cli.machines import find_machine, free_names
from pycloudlib.cli.output import age_in_words, print_json
from pycloudlib.cli.session import Session, command, json_option
from pycloudlib.cli.values import ImageName, Minutes, NewName, Size, read_document
from pycloudlib.cli.waiting import wait_until_ready
from pycloudlib.errors import InstanceExistsError, InstanceNotFoundError
from pycloudlib.qemu import savedmachine
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.spec import DEFAULT_INSTANCE_TYPE, InstanceType

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
        print_json(facts.collect(find_machine(cloud.working_dir, instance.name)))
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
    seen = facts.collect(found)
    of_what = facts.image_in_words(seen.image, session.cloud.image_dir)
    age = age_in_words(facts.created_at(found))
    return f" by a machine of {of_what} ({seen.state}, launched {age} ago)"
