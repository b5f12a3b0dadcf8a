"""Names of the clouds that are not part of this package, for programs that import them all.

A test suite for many clouds imports the classes of each of them, whichever it runs on. Here, all
but QEMU's are placeholders: distinct classes that can be named, subclassed and asked for by
`isinstance`. Making an object of one raises an error that says what this package is.

To a type checker they are concrete: they have the methods of the base classes, and anything else
is `Any`. Each is in the module where programs look for it (`pycloudlib.ec2.instance`), and is
imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pycloudlib.cloud import BaseCloud
from pycloudlib.errors import UnsupportedCloudError
from pycloudlib.instance import BaseInstance

if TYPE_CHECKING:
    from typing_extensions import Self

_PACKAGE = f"{__package__}."  # what the modules of placeholders begin with


class Placeholder:
    """Something of another cloud: it has a name, and cannot be made.

    Raises:
        UnsupportedCloudError: Always; says what this package is, and where the other one is.
    """

    # Not __init__: subclasses of programs have their own, and the base classes are abstract.
    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        """Refuse to be made."""
        placeholder = next(kind for kind in cls.__mro__ if kind.__module__.startswith(_PACKAGE))
        raise UnsupportedCloudError(placeholder.__qualname__)

    if TYPE_CHECKING:

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


class OtherCloud(Placeholder, BaseCloud):
    """A cloud that is not part of this package."""

    if TYPE_CHECKING:

        def delete_image(self, image_id: str, **kwargs: Any) -> None: ...
        def released_image(self, release: str, **kwargs: Any) -> str: ...
        def daily_image(self, release: str, **kwargs: Any) -> str: ...
        def image_serial(self, image_id: str) -> str: ...
        def get_instance(
            self, instance_id: str, username: str | None = None, **kwargs: Any
        ) -> Any: ...
        def launch(
            self,
            image_id: str,
            instance_type: str | None = None,
            user_data: str | bytes | None = None,
            **kwargs: Any,
        ) -> Any: ...
        def snapshot(self, instance: Any, clean: bool = True, **kwargs: Any) -> str: ...


class OtherInstance(Placeholder, BaseInstance):
    """An instance of a cloud that is not part of this package."""

    if TYPE_CHECKING:

        @property
        def id(self) -> str: ...
        @property
        def name(self) -> str: ...
        @property
        def ip(self) -> str: ...
        def delete(self, wait: bool = True) -> list[Exception]: ...
        def _do_restart(self, **kwargs: Any) -> None: ...
        def shutdown(self, wait: bool = True, **kwargs: Any) -> None: ...
        def start(self, wait: bool = True) -> None: ...
        def wait_for_delete(self, **kwargs: Any) -> None: ...
        def wait_for_stop(self, **kwargs: Any) -> None: ...
