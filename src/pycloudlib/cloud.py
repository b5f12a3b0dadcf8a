"""The base class of clouds: vocabulary that clients subclass; no QEMU in it."""

from __future__ import annotations

import enum
import logging
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pycloudlib._base.documents import safe_repr
from pycloudlib._base.files import expand_user
from pycloudlib._base.locks import renew_in_children
from pycloudlib.config import Config, ConfigFile, parse_config
from pycloudlib.errors import InvalidKeyError, InvalidTagNameError
from pycloudlib.guest.access import loginkey
from pycloudlib.instance import BaseInstance
from pycloudlib.key import KeyPair, generate_ed25519, login_name
from pycloudlib.util import get_timestamped_tag, raise_cleanup_errors

if TYPE_CHECKING:
    from typing_extensions import Self

_DEFAULT_PUBLIC_KEYS = ("~/.ssh/id_rsa.pub", "~/.ssh/id_ed25519.pub")
_TAG_RULES = (
    (r".{1,63}", "it must have 1 to 63 characters"),
    (r"[a-z0-9-]*", "it may hold only a-z, 0-9 and '-'"),
    (r"(?!-).*(?<!-)", "it must not begin or end with '-'"),
)


@enum.unique
class ImageType(enum.Enum):
    """The variants of a release's image."""

    GENERIC = "generic"
    MINIMAL = "minimal"
    PRO = "Pro"
    PRO_FIPS = "Pro FIPS"
    PRO_FIPS_UPDATES = "Pro FIPS Updates"


class BaseCloud(ABC):
    """Something that launches instances of images.

    Args:
        tag: Names what this cloud makes: 1 to 63 characters of a-z, 0-9 and '-'.
        timestamp_suffix: Whether the time is appended to the tag.
        config_file: The configuration file, a path or an open text; see `parse_config`.
        required_values: The program's values for required settings. If one is None, this cloud's
            section of the configuration has to exist.

    Raises:
        InvalidTagNameError: The tag breaks the rules; lists which.
        KeyError: A required value is not given, and this cloud's section of the configuration is
            missing.
        InvalidKeyError: The configured SSH key is missing, or is no key.
        ValueError: The configuration cannot be read or has a wrong value.
    """

    _type = "base"

    def __init__(
        self,
        tag: str,
        timestamp_suffix: bool = True,
        config_file: ConfigFile | None = None,
        required_values: Sequence[Any] | None = None,
    ) -> None:
        self._log = logging.getLogger(f"{__name__}.{type(self).__name__}")
        self.created_instances: list[BaseInstance] = []
        self.created_images: list[str] = []
        if not isinstance(tag, str):
            raise TypeError(f"tag must be a text, not {tag!r}")
        self._validate_tag(tag)
        self.tag = get_timestamped_tag(tag) if timestamp_suffix else tag
        self._config_file = Config()
        self.config: dict[str, Any] = {}
        self._check_and_set_config(config_file, required_values)
        self._key_lock = threading.Lock()
        renew_in_children(self, _key_lock=threading.Lock)
        self._key_pair = self._get_ssh_keys(
            public_key_path=self._configured_text("public_key_path"),
            private_key_path=self._configured_text("private_key_path"),
            name=self._key_name,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        raise_cleanup_errors(self.clean(), exc)

    @property
    def key_pair(self) -> KeyPair:
        """The SSH key that instances get: the configured one, the user's own, or a fresh one."""
        with self._key_lock:
            if self._key_pair is None:
                self._key_pair = self._make_key_pair(self._key_name)
            return self._key_pair

    @key_pair.setter
    def key_pair(self, key_pair: KeyPair) -> None:
        self._key_pair = key_pair

    def find_key_pair(self) -> KeyPair | None:
        """Return the SSH key that instances get; None if it is yet to be made."""
        return self._key_pair

    def clean(self) -> list[Exception]:
        """Delete every instance and image that this cloud made.

        Returns:
            The errors met on the way; empty when nothing is left.
        """
        errors: list[Exception] = []
        for instance in list(self.created_instances):
            try:
                errors.extend(instance.delete() or ())
            except Exception as error:  # noqa: BLE001 - collected and reported, all of them
                errors.append(error)
        # Later ones may be built on earlier ones.
        for image_id in reversed(list(self.created_images)):
            try:
                self.delete_image(image_id)
            except Exception as error:  # noqa: BLE001 - collected and reported, all of them
                errors.append(error)
        return errors

    @abstractmethod
    def delete_image(self, image_id: str, **kwargs: Any) -> None:
        """Delete an image; one that is not there is no error."""

    @abstractmethod
    def released_image(self, release: str, **kwargs: Any) -> str:
        """Return the id of the latest released image of a release."""

    @abstractmethod
    def daily_image(self, release: str, **kwargs: Any) -> str:
        """Return the id of the latest daily image of a release."""

    @abstractmethod
    def image_serial(self, image_id: str) -> str:
        """Return the build serial of an image."""

    def get_image_id_from_name(self, name: str) -> str:
        """Return the id of the image that has a name.

        Raises:
            NotImplementedError: This cloud finds no images by name.
        """
        raise NotImplementedError(f"{type(self).__name__} finds no images by name")

    @abstractmethod
    def get_instance(self, instance_id: str, username: str | None = None, **kwargs: Any) -> Any:
        """Find an instance again by its id."""

    @abstractmethod
    def launch(
        self,
        image_id: str,
        instance_type: str | None = None,
        user_data: str | bytes | None = None,
        **kwargs: Any,
    ) -> Any:
        """Start an instance of an image, without waiting for its boot."""

    @abstractmethod
    def snapshot(self, instance: Any, clean: bool = True, **kwargs: Any) -> str:
        """Make an image of an instance's disk and return its id."""

    def list_keys(self) -> list[str]:
        """Return the names of the SSH keys."""
        return [self.key_pair.name]

    def create_key_pair(self) -> tuple[str, str]:
        """Make a new SSH key.

        Returns:
            The public key's line and the private key in OpenSSH's format; neither is stored.
        """
        private, public = generate_ed25519(comment=self.tag)
        return public, private

    def use_key(
        self,
        public_key_path: str | Path,
        private_key_path: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        """Log in with this key from now on: instances launched later get it.

        Args:
            public_key_path: The public key file.
            private_key_path: The private key file, by default the public one's path without
                `.pub`; it may be written later, before the first launch.
            name: The key's name; by default the login name of this process's user.

        Raises:
            InvalidKeyError: One of the files cannot be read, or is not a key. It is a
                `PycloudlibError` and a `ValueError`.
        """
        key_pair = KeyPair(public_key_path, private_key_path, name)
        there = os.path.lexists(str(key_pair.private_key_path))
        loginkey.check(key_pair, "use_key()", private=there)
        if not there:
            self._log.info("The private key %s is not there yet", key_pair.private_key_path)
        self.key_pair = key_pair

    @staticmethod
    def _validate_tag(tag: str) -> None:
        failed = [rule for pattern, rule in _TAG_RULES if not re.fullmatch(pattern, tag, re.DOTALL)]
        if failed:
            raise InvalidTagNameError(tag, failed)

    def _check_and_set_config(
        self, config_file: ConfigFile | None, required_values: Sequence[Any] | None
    ) -> None:
        """Set `config`, this cloud's section of the configuration; subclasses may have their own.

        Args:
            config_file: What the constructor was given.
            required_values: What the constructor was given.
        """
        self._config_file = parse_config(config_file)
        if required_values is not None and any(value is None for value in required_values):
            _ = self._config_file[self._type]  # raises if it is missing
        self.config = self._section(self._config_file)

    def _section(self, config: Config) -> dict[str, Any]:
        section = config.get(self._type, {})
        if not isinstance(section, dict):
            raise ValueError(
                f"{config.source}: [{self._type}] is not a section but {safe_repr(section)}"
            )
        return section

    @property
    def _key_name(self) -> str:
        return self._configured_text("key_name") or login_name()

    def _get_ssh_keys(
        self,
        public_key_path: str | None = None,
        private_key_path: str | None = None,
        name: str | None = None,
    ) -> KeyPair | None:
        """Find the key to use: the configured one, then the user's own.

        Args:
            public_key_path: The configured public key, if any.
            private_key_path: The configured private key, if any.
            name: The key's name.

        Returns:
            The key; None if there is none, so that one is made when it is first needed.
        """
        public, private = public_key_path, private_key_path
        named = "private_key_path" if public is None else "public_key_path"
        if private is not None and public is None:
            public = f"{private}.pub"
        if public is not None:
            key_pair = KeyPair(public, private, name)
            loginkey.check(key_pair, f"{named} in [{self._type}] of {self._config_file.source}")
            return key_pair
        for default in map(expand_user, _DEFAULT_PUBLIC_KEYS):
            key_pair = KeyPair(default, name=name)
            # Without a home directory, `~` stays as it is.
            if default.is_absolute() and os.path.lexists(default):
                try:
                    loginkey.check(key_pair, "the user's own SSH key")
                except InvalidKeyError as error:
                    self._log.info("%s is passed over: %s", default, error)
                else:
                    return key_pair
        return None

    def _make_key_pair(self, name: str) -> KeyPair:
        """Make a key where none is found; clouds that have a place for one override this."""
        return KeyPair(None, name=name)

    def _configured_text(self, key: str) -> str | None:
        """Read a configured path or name, with `~` and `$VARS` expanded."""
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"{key} in [{self._type}] of {self._config_file.source} is "
                f"{safe_repr(value)}, expected a text"
            )
        return str(expand_user(os.path.expandvars(value))) if key.endswith("path") else value
