"""The saved machines of the QEMU cloud as clients see them: saved, copied, found again."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pycloudlib._base.files import expand_user
from pycloudlib.errors import CloudError, InstanceExistsError, PycloudlibException
from pycloudlib.guest.access import loginkey
from pycloudlib.guest.data import runconfig
from pycloudlib.guest.helper import NewKey
from pycloudlib.images import store, uses
from pycloudlib.key import KeyPair, bring_along
from pycloudlib.progress import ProgressCallback
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.host.ownership import Orphans, disown
from pycloudlib.qemu.host.resources import HostLimits
from pycloudlib.qemu.images import QemuImages
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching import copies
from pycloudlib.qemu.launching.request import (
    Host,
    LaunchOptions,
    create_run_directory,
    start_machine,
)
from pycloudlib.qemu.saved import checkpoint, restoring
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import LoginFacts, RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import make_name
from pycloudlib.qemu.vm.machine import Machine


class QemuLive(QemuImages):
    """What the QEMU cloud does with machines that are saved while they run."""

    orphans: Orphans

    @property
    @abstractmethod
    def _host(self) -> Host:
        """What machines run on."""

    @abstractmethod
    def _make_instance(
        self, machine: Machine, key_pair: KeyPair, username: str
    ) -> QemuInstance: ...

    @abstractmethod
    def _key_for(self, rundir: RunDirectory) -> KeyPair: ...

    @abstractmethod
    def _check_name(self, name: str) -> str: ...

    def fork(
        self,
        instance: QemuInstance,
        count: int,
        fresh_identity: bool = False,
        names: Sequence[str] = (),
    ) -> list[QemuInstance]:
        """Start copies of a running instance; see `QemuInstance.fork`."""
        chosen = [self._check_name(name) for name in names]
        saved = self.find_saved(self._save(instance))

        def start(number: int) -> QemuInstance:
            name = chosen[number] if chosen else make_name(self.tag)
            return self._start_copy(copies.CopyRequest(name, saved, fresh_identity))

        with ThreadPoolExecutor(min(count, 2 * HostLimits.read().processors)) as threads:
            attempts = [threads.submit(start, number) for number in range(count)]
        failed = [attempt for attempt in attempts if attempt.exception() is not None]
        copies_made = [attempt.result() for attempt in attempts if attempt not in failed]
        if failed:
            for copy in copies_made:
                for error in copy.delete():
                    self._log.warning("%s stays until clean(): %s", copy.name, error)
            self._delete_soon(str(saved.image))
            failed[0].result()
        # The copies have its memory open; the disk that they are built on goes with the cloud.
        try:
            savedmachine.delete(saved.image)
        except OSError as error:
            self._log.warning("%s stays until clean(): %s", saved.directory, error)
        return copies_made

    def find_saved(self, image_id: str) -> SavedMachine:
        """Find the saved machine that an image id stands for.

        Raises:
            ImageNotFoundError: There is no such image.
            CloudError: It is an image of a disk alone, or where first boots begin.
        """
        saved = savedmachine.find(store.resolve(image_id, self.image_dir))
        if saved is None:
            raise CloudError(
                f"{image_id} is not a saved machine, but an image of a disk; machines are saved "
                "by snapshot(instance, memory=True)"
            )
        if saved.is_starting_point:
            raise CloudError(_tell_not_booted(saved))
        return saved

    def export_image(
        self,
        image_id: str,
        path: str | Path,
        compress: bool = True,
        *,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        """Write an image, and all that it is built on, as one qcow2 file that needs no other.

        What is kept of a saved machine goes with it, into the directory `<path>.live`.

        Arguments and errors are those of `QemuImages.export_image`.
        """
        saved = savedmachine.find(store.resolve(image_id, self.image_dir))
        target = check_new(path)
        super().export_image(image_id, path, compress, on_progress=on_progress)
        if saved is not None:
            try:
                restoring.copy_beside(saved, target)
            except BaseException:
                target.unlink()
                raise

    def delete_image(self, image_id: str, **kwargs: Any) -> None:
        """Delete an image and what belongs to it; one that is not there is no error.

        Raises:
            ImageInUseError: Instances or snapshots are built on it; names them.
        """
        image = store.locate(image_id, self.image_dir)
        ours = image_id in self.created_images
        super().delete_image(image_id, **kwargs)
        try:
            savedmachine.delete(image)
            if layers.is_snapshot(image):
                # Last, so that whatever is cut off before is found by it.
                disown(image)
        except BaseException:
            if ours:
                self.created_images.append(image_id)  # `clean` tries again
            raise

    def _save(self, instance: QemuInstance, path: Path | None = None) -> str:
        """Save a running instance; give the image's id."""
        instance.check_exists()
        machine = instance.machine
        ask_helper = instance.sync_by_helper if instance.start_helper() else None
        base = layers.chain(instance.instance_path)[-1]
        name = f"{make_name(instance.name)}.img"
        saved = checkpoint.save(machine, name, ask_helper=ask_helper)
        image = str(saved.image)
        self.created_images.append(image)
        instance.correct_clock()
        store.inherit(saved.image, base, source=f"saved from {instance.name}")
        if path is None:
            return image
        try:
            self.export_image(image, path, compress=False)
        finally:
            self._delete_soon(image)
        return str(path)

    def _delete_soon(self, image: str) -> None:
        """Delete an image of ours that has done its work; what fails is left to `clean()`.

        What was made of it is whole, and the caller's.
        """
        try:
            self.delete_image(image)
        except (OSError, CloudError) as error:
            self._log.warning("%s stays until clean(): %s", image, error)

    def _launch_saved(
        self, saved: SavedMachine, options: LaunchOptions, *, fresh_identity: bool
    ) -> QemuInstance:
        """Start a copy of a saved machine; where it cannot go on, it boots from its disk."""
        if saved.is_starting_point:
            raise ValueError(_tell_not_booted(saved))
        changes = options.changes_to(saved.spec)
        if changes:
            raise ValueError(
                f"{saved.image} is a saved machine, which cannot be changed by "
                f"{', '.join(changes)}: launch it without, or the image that it was made from"
            )
        user_data = options.user_data
        first_run = "" if user_data is None else runconfig.build_script(user_data)
        request = copies.CopyRequest(
            options.name_with(self.tag),
            saved,
            fresh_identity,
            user_data=user_data.encode() if isinstance(user_data, str) else user_data,
            first_run=first_run,
        )
        copy = self._try_copy(request, options.username)
        if copy is not None:
            return copy
        self._log.warning("%s boots from the disk of %s", request.name, saved.image)
        return self._start_copy(dataclasses.replace(request, boots=True), options.username)

    def _try_copy(self, request: copies.CopyRequest, username: str | None) -> QemuInstance | None:
        """Start a copy that goes on where it was saved; None where that cannot be, and say why."""
        host = self._host
        fingerprint = savedmachine.host_fingerprint(host.binary, host.accelerator)
        obstacle = request.saved.find_obstacle(fingerprint)
        if obstacle is None:
            try:
                return self._start_copy(request, username)
            except InstanceExistsError:
                raise
            except (PycloudlibException, ValueError, OSError) as error:
                # A damaged file shows itself in many ways; what else is wrong shows in a boot, too.
                obstacle = str(error)
        self._log.warning("%s cannot go on here: %s", request.saved.image, obstacle)
        return None

    def _start_copy(self, request: copies.CopyRequest, username: str | None = None) -> QemuInstance:
        """Start a copy of a saved machine.

        Raises:
            CloudError: It did not come to run; nothing is left of it.
            ImageNotFoundError: The saved machine is deleted.
        """
        saved = request.saved
        user = username or saved.login.username

        def switch_on(machine: Machine) -> None:
            if request.boots:
                machine.power_on()
            else:
                restoring.wake(machine, saved)

        with (
            uses.holding_image(str(saved.image), self.image_dir),
            contextlib.ExitStack() as stack,
        ):
            rundir = create_run_directory(self.parent_dir / request.name, stack, self.orphans)
            key, new_key = self._key_of_copy(rundir, request)
            request = dataclasses.replace(request, new_key=new_key)
            rundir.write_login(LoginFacts.of(user, key))
            copies.write_files(self._host, rundir, request)
            machine = start_machine(
                self._host,
                rundir,
                lambda lease: copies.describe_copy(rundir, request, lease),
                stack,
                switch_on,
            )
            layers.record_uses(rundir.disk)
            instance = self._make_instance(machine, key, user)
            instance.put_right_soon()
            self.created_instances.append(instance)
            stack.pop_all()
        self._host.host_keys.fill()
        self._tell_launched(instance, f"as a copy of {saved.image}")
        return instance

    def _tell_launched(self, instance: QemuInstance, origin: str) -> None:
        self._log.info(
            "Launched %s %s: %s, telnet %s %s",
            instance.name,
            origin,
            instance.login_command(),
            instance.ip,
            instance.telnet_port,
        )

    def _key_of_copy(
        self, rundir: RunDirectory, request: copies.CopyRequest
    ) -> tuple[KeyPair, NewKey | None]:
        """Give the key to log in to a copy with; another than the saved one is let in first."""
        login = request.saved.login
        kept = KeyPair(login.public_key_path, login.private_key_path, self._key_name)
        if not request.saved.helper or request.boots:
            # Nobody could let another key in.
            return key_of_machine(kept, request.saved.directory, rundir), None
        ours = self._key_for(rundir)
        loginkey.prove(ours, "the cloud's SSH key")
        old, new = (" ".join(key.public_key_content.split()[:2]) for key in (kept, ours))
        return ours, None if old == new else NewKey(login.username, old, new)


def check_new(path: str | Path) -> Path:
    """Make sure that an image and what is kept beside it can be made at a path.

    Raises:
        FileExistsError: There is something already.
        FileNotFoundError: Its directory does not exist.
    """
    target = expand_user(path).absolute()
    for file in (target, savedmachine.directory_of(target)):
        if file.exists():
            raise FileExistsError(errno.EEXIST, "an image does not overwrite a file", str(file))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory for an image", str(target.parent))
    return target


def _tell_not_booted(start: SavedMachine) -> str:
    base = layers.chain(start.image)[-1]
    launchable = base if base != start.image else "the image that it was made from"
    return (
        f"{start.image} is where first boots begin, not a machine that has booted: launch "
        f"{launchable} with fast_boot=True"
    )


def key_of_machine(key: KeyPair, kept: Path, rundir: RunDirectory) -> KeyPair:
    """Return the key to keep with a machine: a copy of one that is kept in a directory of ours."""
    public, private = (
        bring_along(path, kept, rundir.path) for path in (key.public_key_path, key.private_key_path)
    )
    return KeyPair(public, private, key.name)
