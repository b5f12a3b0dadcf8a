"""Where an image of a release is had from: from what is here, or from the server."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.errors import ImageBuildError, ImageNotFoundError
from pycloudlib.images import releases, store
from pycloudlib.images.catalog import check_release_form, find_entry
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

    Raises:
        ValueError: `release` cannot be the name of a release.
    """

    stream: Stream
    release: str
    minimal: bool
    image_dir: Path
    source: ImageSource
    offline: bool = False

    def __post_init__(self) -> None:
        check_release_form(self.release)

    def stored_or_fetched(self, on_progress: ProgressCallback) -> str:
        """Give the newest that is here, without any network; else the server's newest.

        Raises:
            ImageNotFoundError: There is none here, and the server may not be asked.
            ImageBuildError: It could not be downloaded.
            ImageVerificationError: What came is not what its publisher signed.
        """
        stored = self._find_stored()
        if stored is not None:
            return str(stored)
        unverified = releases.find_unverified(
            self.image_dir, self.stream, self.release, self.minimal
        )
        if unverified is not None:
            return self._adopt(unverified, on_progress)
        if self.offline:
            raise ImageNotFoundError(
                f"No {self.stream.value} image of {self.release!r} in {self.image_dir}, and the "
                f"server is not asked (offline = true in [qemu]). There are: {self._list_others()}",
                resource_name=self.release,
            )
        return self.newest(on_progress)

    def newest(self, on_progress: ProgressCallback) -> str:
        """Give the server's newest; downloaded unless that very build is here."""
        return self._fetch(None, on_progress)

    def newest_or_stored(self, on_progress: ProgressCallback) -> str:
        """Give the server's newest, or the newest here when the server cannot be reached."""
        try:
            return self.newest(on_progress)
        except ImageBuildError as error:
            stored = self._find_stored()
            if stored is None:
                raise
            _log.warning("%s. Using %s, the newest that is here", error, stored)
            return str(stored)

    def _find_stored(self) -> Path | None:
        return releases.find_stored(self.image_dir, self.stream, self.release, self.minimal)

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
