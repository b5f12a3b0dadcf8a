"""Where images come from, and whom to believe."""

from __future__ import annotations

import enum
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pycloudlib.images.download import Login, shown_url, split_login
from pycloudlib.images.signature import load_trusted_keys

_log = logging.getLogger(__name__)

UNVERIFIED = "nobody"
"""Who vouches for what a server said while signatures were not looked at."""

DEFAULT_MIRROR = "https://cloud-images.ubuntu.com"


def is_http_url(text: str) -> bool:
    """Say whether a text is a URL that can be downloaded from, by its form."""
    try:
        parts = urlsplit(text)
        # Reading the port is what looks at it.
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


class Stream(enum.Enum):
    """The two lines of builds."""

    RELEASED = "released"
    DAILY = "daily"

    @property
    def directory(self) -> str:
        """Its directory on the server."""
        return "releases" if self is Stream.RELEASED else "daily"

    @property
    def content_id(self) -> str:
        """The name of its catalog."""
        return f"com.ubuntu.cloud:{self.value}:download"


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where images come from and whom to believe.

    Attributes:
        mirror: Base URL of a server laid out like cloud-images.ubuntu.com. A name and a password
            that it is given with are taken out of it: no URL that is made of it carries them.
        keyring: File of the public keys to trust, armored or binary; None for Ubuntu's own.
        verified: Whether what the server says counts only when it is signed.
        cache_dir: Where catalogs are kept, to be fetched when they have changed; None to keep none.
        login: The name and the password that the mirror asks for.

    Raises:
        ValueError: The mirror is not an HTTP URL.
    """

    mirror: str = DEFAULT_MIRROR
    keyring: Path | None = None
    verified: bool = True
    cache_dir: Path | None = None
    login: Login | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not is_http_url(self.mirror):
            raise ValueError(
                f"Invalid image mirror {shown_url(self.mirror)!r}: expected a URL such as "
                f"{DEFAULT_MIRROR!r}"
            )
        mirror, login = split_login(self.mirror)
        object.__setattr__(self, "mirror", mirror)
        object.__setattr__(self, "login", login or self.login)

    @property
    def voucher(self) -> str:
        """Who vouches for what comes from here, as records of images name it.

        Raises:
            FileNotFoundError: There is no such keyring.
            ValueError: It holds no key.
        """
        return load_trusted_keys(self.keyring).name if self.verified else UNVERIFIED

    def believes(self, vouchers: Collection[str]) -> bool:
        """Whether an image is believed for which these vouch."""
        return self.voucher in vouchers if self.verified else bool(vouchers)

    def has_build_at(self, url: str, serial: str) -> bool:
        """Whether a URL is a place on the mirror where the build of a serial would be."""
        base, path = f"{self.mirror.rstrip('/')}/", url.rpartition("/")[0]
        is_there = url.startswith(base) and ".." not in url and "%" not in url
        return is_there and path.rpartition("/")[2] in (serial, f"release-{serial}")

    def base_url(self, stream: Stream, *, minimal: bool) -> str:
        """Name the directory to which the paths in a catalog are relative."""
        variant = "minimal/" if minimal else ""
        return f"{self.mirror.rstrip('/')}/{variant}{stream.directory}/"

    def catalog_url(self, stream: Stream, *, minimal: bool) -> str:
        """Name the catalog of a stream, the signed one if it is to be verified."""
        suffix = "sjson" if self.verified else "json"
        return f"{self.base_url(stream, minimal=minimal)}streams/v1/{stream.content_id}.{suffix}"

    def warn_if_unverified(self) -> None:
        """Say that nothing is verified, where that is so."""
        if not self.verified:
            _log.warning(
                "NOTHING THAT %s SENDS IS VERIFIED (image_verification = 'disabled' in [qemu]): "
                "whoever is on the way to it decides what the images are",
                self.mirror,
            )
