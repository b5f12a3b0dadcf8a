"""Where an image of a release is had from: from what is here, or from the server."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.errors import ImageBuildError, ImageNotFoundError
from pycloudlib.images import releases, store
from pycloudlib.images.catalog import CatalogEntry, check_release_form, find_entry
from pycloudlib.images.source import ImageSource, Stream
from pycloudlib.progress import ProgressCallback

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Supply:
    """An image that is wanted, and where it may come from.

    Attributes:
        stream: Released or daily builds.
        release: Series or version.
        minimal: Whether the minimal variant is wanted.
        image_dir: Where images are kept.
        source: The server.
        offline: Whether it may not be asked.
        pin: The build that it has to be, if it is pinned.

    Raises:
        ValueError: `release` cannot be the name of a release.
    """

    stream: Stream
    release: str
    minimal: bool
    image_dir: Path
    source: ImageSource
    offline: bool = False
    pin: CatalogEntry | None = None

    def __post_init__(self) -> None:
        check_release_form(self.release)

    def stored_or_fetched(self, on_progress: ProgressCallback) -> str:
        """Give the newest that is here, without any network; else the server's newest.

        Raises:
            ImageNotFoundError: There is none here, and the server may not be asked.
            ImageBuildError: It could not be downloaded.
            ImageVerificationError: What came is not what its publisher signed.
        """
        if self.pin is not None:
            return self._pinned(self.pin, on_progress)
        stored = self._find_stored()
        if stored is not None:
            return str(stored)
        unverified = releases.find_unverified(
            self.image_dir, self.stream, self.release, self.minimal
        )
        if unverified is not None:
            return self._adopt(unverified, on_progress)
        if self.offline:
            raise self._offline_error(f"{self.stream.value} image of {self.release!r}")
        return self.newest(on_progress)

    def newest(self, on_progress: ProgressCallback) -> str:
        """Give the server's newest; downloaded unless that very build is here."""
        if self.pin is not None:
            return self._pinned(self.pin, on_progress)
        return self._fetch(None, on_progress)

    def newest_or_stored(self, on_progress: ProgressCallback) -> str:
        """Give the server's newest, or the newest here when the server cannot be reached."""
        try:
            return self.newest(on_progress)
        except ImageBuildError as error:
            stored = None if self.pin else self._find_stored()
            if stored is None:
                raise
            _log.warning("%s. Using %s, the newest that is here", error, stored)
            return str(stored)

    def _find_stored(self) -> Path | None:
        return releases.find_stored(self.image_dir, self.stream, self.release, self.minimal)

    def _pinned(self, pin: CatalogEntry, on_progress: ProgressCallback) -> str:
        """Give the build that it has to be, and no other."""
        if self.offline and not releases.is_complete(pin, self.image_dir):
            raise self._offline_error(f"build {pin.serial} of {self.release!r}, which is pinned,")
        image = releases.fetch_image(pin, self.source, self.image_dir, on_progress=on_progress)
        return str(image)

    def _offline_error(self, wanted: str) -> ImageNotFoundError:
        return ImageNotFoundError(
            resource_name=self.release,
            message=f"No {wanted} in {self.image_dir}, and the server is not asked (offline = true "
            f"in [qemu]). There are: {self._list_others()}",
        )

    def _adopt(self, image: Path, on_progress: ProgressCallback) -> str:
        """Give an image that another program left, verified as if it were downloaded."""
        if not self.offline:
            try:
                return self._fetch(image.parent.name, on_progress)
            except (ImageBuildError, ImageNotFoundError) as error:
                _log.info("%s", error)
        _log.warning("%s was not downloaded by this package, and is used unverified", image)
        return str(image)

    def _fetch(self, serial: str | None, on_progress: ProgressCallback) -> str:
        entry = find_entry(
            self.source, self.stream, self.release, minimal=self.minimal, serial=serial
        )
        image = releases.fetch_image(entry, self.source, self.image_dir, on_progress=on_progress)
        return str(image)

    def _list_others(self) -> str:
        others = [
            f"{stored.release} {stored.serial} ({Path(stored.image_id).name})"
            for stored in store.list_images(self.image_dir)
        ]
        return ", ".join(others) or "none"
