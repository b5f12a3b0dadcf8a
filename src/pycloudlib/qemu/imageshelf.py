"""The images of the QEMU cloud: obtained, built, exported, deleted."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pycloudlib._base.files import expand_user, is_file
from pycloudlib.cloud import ImageType
from pycloudlib.errors import CloudError, ImageInUseError, ImageNotFoundError
from pycloudlib.images import store, uses
from pycloudlib.images.store import StoredImage
from pycloudlib.progress import ProgressCallback, showing_progress
from pycloudlib.qemu.disk import diskimage, layers
from pycloudlib.qemu.host.ownership import disown
from pycloudlib.qemu.launching.warmcache import WarmCache
from pycloudlib.qemu.saved import restoring
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.settings import SIGNED, QemuSettings

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pycloudlib.images.lookup import ImageLock, ImageLookup
    from pycloudlib.images.source import ImageSource, Stream


@dataclass(frozen=True, slots=True)
class ImageShelf:
    """The images below `image_dir`, and those that a cloud's snapshots have made.

    Attributes:
        settings: Section `[qemu]` of the configuration.
        cache: The machines that are kept ready.
        created: The images that the cloud made, and deletes at its end.
    """

    settings: QemuSettings
    cache: WarmCache
    created: list[str]

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

        Args:
            image_id: The image.
            path: The new file.
            compress: Whether its content is compressed: smaller, and slower to write.
            on_progress: Called with how much is done, in percent; by default shown.

        Raises:
            ImageNotFoundError: There is no such image.
            FileExistsError, FileNotFoundError: `path` exists, or its directory does not.
        """
        image = store.resolve(image_id, self.settings.image_dir)
        saved = savedmachine.find(image)
        target = check_new(path)
        with showing_progress(on_progress, _log) as tell:
            diskimage.export(image, target, compress=compress, on_progress=tell)
        if saved is not None:
            try:
                restoring.copy_beside(saved, target)
            except BaseException:
                target.unlink()
                raise

    def build_image(
        self,
        /,
        release: str = "bookworm",
        packages: Sequence[str] = (),
        *,
        on_progress: ProgressCallback | None = None,
        refresh: bool = False,
        **options: Any,
    ) -> str:
        """Build a cloud image from a distribution's signed packages; no image server is needed.

        An image that was built of the same parts before is used again; two processes build it once.

        Args:
            release: `bookworm` or `trixie`, of Debian.
            packages: Packages to install besides those that a cloud image has.
            on_progress: Called at each step; by default shown.
            refresh: Whether to build anew, with the distribution's latest packages.
            **options: More about the image; see `pycloudlib.images.build.BuildRecipe`.

        Returns:
            The image's id, its path.

        Raises:
            ValueError: There is no such release, or an option is malformed.
            MissingPrerequisiteError: A tool for building is not installed; names the package.
            ImageBuildError: A step failed; names it, with the tool's own last lines.
        """
        from pycloudlib.images.build import BuildRecipe, build_image  # noqa: PLC0415 - seldom

        recipe = BuildRecipe(release=release, packages=tuple(packages), **options)
        with self.settings.naming("image_dir"), showing_progress(on_progress, _log) as tell:
            return str(
                build_image(recipe, self.settings.image_dir, refresh=refresh, on_progress=tell)
            )

    def released_image(
        self,
        /,
        release: str,
        *,
        image_type: ImageType = ImageType.GENERIC,
        refresh: bool = False,
        on_progress: ProgressCallback | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the latest released image of an Ubuntu release; downloaded if there is none yet.

        Args:
            release: A series (`noble`) or a version (`24.04`).
            image_type: `GENERIC` or `MINIMAL`.
            refresh: Whether to ask the server for a newer one than there is.
            on_progress: Called with the bytes of a download; by default shown.
            **kwargs: Accepted for older programs.

        Returns:
            The image's id, its path.

        Raises:
            ValueError: There is no such release, or no image of that type.
            ImageNotFoundError: There is none here, and `offline` is configured.
            ImageBuildError: The download failed.
            ImageVerificationError: What the server sent is not what its publisher signed.
        """
        from pycloudlib.images.source import Stream  # noqa: PLC0415 - seldom

        wanted = self._look_up(Stream.RELEASED, release, image_type)
        with self.settings.naming("image_dir"), showing_progress(on_progress, _log) as tell:
            if refresh and not self.settings.offline:
                return wanted.newest(tell)
            return wanted.stored_or_fetched(tell)

    def daily_image(
        self,
        /,
        release: str,
        *,
        image_type: ImageType = ImageType.GENERIC,
        on_progress: ProgressCallback | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the latest daily image of an Ubuntu release; see `released_image`.

        When the server cannot be reached, it is the newest one that is here, which is logged.
        """
        from pycloudlib.images.source import Stream  # noqa: PLC0415 - seldom

        wanted = self._look_up(Stream.DAILY, release, image_type)
        with self.settings.naming("image_dir"), showing_progress(on_progress, _log) as tell:
            if self.settings.offline:
                return wanted.stored_or_fetched(tell)
            return wanted.newest_or_stored(tell)

    def lock_image(
        self,
        release: str,
        *,
        daily: bool = False,
        image_type: ImageType = ImageType.GENERIC,
    ) -> str:
        """Pin a release to its newest build; no other is used from then on.

        The lock is `image_lock` of the configuration, or `pycloudlib.lock` in the directory that
        the program runs in; it is for a project's version control.

        Args:
            release: A series or a version.
            daily: Whether its daily image is meant, not the released one.
            image_type: `GENERIC` or `MINIMAL`.

        Returns:
            The serial of the build.

        Raises:
            ValueError: There is no such release, or the lock is damaged.
            ImageBuildError: The server could not be asked.
            ImageVerificationError: What it says is not what its publisher signed.
        """
        from pycloudlib.images.source import Stream  # noqa: PLC0415 - seldom

        stream = Stream.DAILY if daily else Stream.RELEASED
        return self._update_lock([(stream, release, _is_minimal(image_type))])[0]

    def update_image_lock(self) -> list[str]:
        """Pin all that is pinned to the newest builds; return their serials.

        Errors are those of `lock_image`; the lock stays as it was then.
        """
        lock = self.pins
        pinned = [(pin.stream, pin.release, pin.minimal) for pin in lock.pins]
        return self._update_lock(pinned, lock.list_aliases())

    def images(self) -> list[StoredImage]:
        """List the images in `image_dir`, downloaded or built, of each the newest build first."""
        return store.list_images(self.settings.image_dir)

    def prune_images(self, keep: int = 1) -> list[str]:
        """Delete old builds in `image_dir` that no instance and no snapshot is built on.

        Args:
            keep: How many builds of each image stay, the newest ones; 0 or more.

        Returns:
            The ids of what was deleted.
        """
        if keep < 0:
            raise ValueError(f"keep is {keep}, expected 0 or more")
        seen: Counter[tuple[str, str]] = Counter()
        deleted = []
        for stored in self.images():
            image = Path(stored.image_id)
            kind = (image.parent.parent.name, image.name)
            seen[kind] += 1
            if seen[kind] <= keep:
                continue
            try:
                self.delete_image(stored.image_id)
                deleted.append(stored.image_id)
            except ImageInUseError as error:
                _log.info("%s is kept: %s", image, error)
            except OSError as error:
                # What is wrong with one is no reason to keep the others.
                _log.warning("%s could not be deleted: %s", image, error)
        store.remove_stale_downloads(self.settings.image_dir)
        return deleted

    def get_image_id_from_name(self, name: str) -> str:
        """Return the id of the image that has a name.

        Args:
            name: The file name, with or without suffix, of a snapshot that this cloud made, or of
                an image in `image_dir`, whose newest build is meant.

        Raises:
            ImageNotFoundError: There is none.
        """
        stored = [image.image_id for image in self.images()]
        for image_id in (*reversed(self.created), *stored):
            if name in (Path(image_id).name, Path(image_id).stem):
                return image_id
        raise ImageNotFoundError(
            resource_name=name,
            message=f"No image is called {name!r}, of those that this cloud made and of those in "
            f"{self.settings.image_dir}",
        )

    def image_serial(self, image_id: str) -> str:
        """Return the build serial of an image.

        Raises:
            ImageNotFoundError: There is no such image, or its serial is not recorded.
        """
        return store.find_serial(store.resolve(image_id, self.settings.image_dir))

    def delete_image(self, /, image_id: str, **kwargs: Any) -> None:
        """Delete an image and what belongs to it; one that is not there is no error.

        Raises:
            ImageInUseError: Instances or snapshots are built on it; names them.
        """
        settings = self.settings
        image = store.locate(image_id, settings.image_dir)
        if is_file(image):
            with layers.deleting(image, settings.working_dir):
                layers.delete(image, settings.image_dir)
        if layers.is_snapshot(image):
            uses.forget(image)
            layers.LayerStore(image.parent.parent).collect()
        savedmachine.delete(image)
        if layers.is_snapshot(image):
            # Last, so that whatever is cut off before is found by it.
            disown(image)
        if image_id in self.created:
            self.created.remove(image_id)
        self.cache.forget(image)

    def delete_soon(self, image_id: str) -> None:
        """Delete an image that has done its work; what fails is left to `clean()`.

        What was made of it is whole, and the caller's.
        """
        try:
            self.delete_image(image_id)
        except (OSError, CloudError) as error:
            _log.warning("%s stays until clean(): %s", image_id, error)

    def find_saved(self, image_id: str) -> SavedMachine:
        """Find the saved machine that an image id stands for.

        Raises:
            ImageNotFoundError: There is no such image.
            CloudError: It is an image of a disk alone, or where first boots begin.
        """
        saved = savedmachine.find(store.resolve(image_id, self.settings.image_dir))
        if saved is None:
            raise CloudError(
                f"{image_id} is not a saved machine, but an image of a disk; machines are saved "
                "by snapshot(instance, memory=True)"
            )
        restoring.check_has_booted(saved, CloudError)
        return saved

    def _look_up(self, stream: Stream, release: str, image_type: ImageType) -> ImageLookup:
        from pycloudlib.images.lookup import ImageLookup  # noqa: PLC0415 - seldom

        minimal = _is_minimal(image_type)
        # A download may have to replace a file, which those have to be known for that are built on.
        layers.record_missing_uses(self.settings.working_dir)
        lock = self.pins
        return ImageLookup(
            stream,
            release,
            minimal,
            self.settings.image_dir,
            self.source,
            offline=self.settings.offline,
            pin=lock.find(stream, release, minimal=minimal),
            lock=lock.path,
        )

    @property
    def source(self) -> ImageSource:
        """Where images come from, and whom to believe."""
        from pycloudlib.images.source import DEFAULT_MIRROR, ImageSource  # noqa: PLC0415 - seldom

        settings = self.settings
        return ImageSource(
            settings.image_mirror or DEFAULT_MIRROR,
            settings.image_keyring,
            settings.image_verification == SIGNED,
            settings.cache_dir / "catalogs",
        )

    @property
    def pins(self) -> ImageLock:
        """The builds that the project pins."""
        from pycloudlib.images.lookup import FILE, ImageLock  # noqa: PLC0415 - seldom

        return ImageLock.read(self.settings.image_lock or Path(FILE).absolute())

    def _update_lock(
        self,
        wanted: Sequence[tuple[Stream, str, bool]],
        aliases: Sequence[tuple[Stream, str, bool]] = (),
    ) -> list[str]:
        from pycloudlib.images.catalog import check_release_form, fetch_catalog  # noqa: PLC0415

        lock, source = self.pins, self.source
        for _, release, _ in wanted:
            check_release_form(release)
        catalogs = {
            (stream, minimal): fetch_catalog(source, stream, minimal=minimal)
            for stream, minimal in dict.fromkeys((stream, minimal) for stream, _, minimal in wanted)
        }
        entries = [catalogs[stream, minimal].find(release) for stream, release, minimal in wanted]
        for stream, alias, minimal in aliases:
            with contextlib.suppress(ImageNotFoundError):  # it is gone from the catalog
                entries.append(catalogs[stream, minimal].find(alias))
        lock.write_with(entries)
        return [entry.serial for entry in dict.fromkeys(entries)]


def _is_minimal(image_type: ImageType) -> bool:
    if image_type not in (ImageType.GENERIC, ImageType.MINIMAL):
        raise ValueError(
            f"image_type is {image_type!r}, expected ImageType.GENERIC or ImageType.MINIMAL"
        )
    return image_type is ImageType.MINIMAL


def check_new(path: str | Path) -> Path:
    """Make sure that an image and what is kept beside it can be made at a path.

    Raises:
        FileExistsError: There is something already.
        FileNotFoundError: Its directory does not exist.
    """
    target = expand_user(path).absolute()
    beside = layers.list_kept_disks(target)
    for file in (target, savedmachine.directory_of(target), *beside):
        if file.exists():
            raise FileExistsError(errno.EEXIST, "an image does not overwrite a file", str(file))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory for an image", str(target.parent))
    return target
