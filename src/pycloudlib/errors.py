"""Every error this package raises on purpose.

One tree: `except PycloudlibException` catches them all. Its direct children are those that existing
programs know: their `except PycloudlibError` catches no cloud's error and no time-out, as before. A
new error is a child of the nearest of them. Where Python users expect a built-in error
(`ValueError` for a malformed value, `FileNotFoundError` for a missing file), that is raised.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pycloudlib.diagnosis import Cause, Diagnosis


class ResourceType(enum.Enum):
    """The kinds of things a cloud holds, as they are called in messages."""

    IMAGE = "image"
    INSTANCE = "instance"
    NETWORK = "network"

    def __str__(self) -> str:
        return self.value


class PycloudlibException(Exception):  # noqa: N818 - the name is part of the contract with clients
    """Root of the tree.

    Attributes:
        diagnosis: What was going on with the machine; None where no machine was concerned.
    """

    diagnosis: Diagnosis | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the constructor's arguments: errors come from worker processes."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(
    kind: type[PycloudlibException], args: tuple[Any, ...], state: dict[str, Any]
) -> PycloudlibException:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class PycloudlibError(PycloudlibException):
    """Something this package was asked to do could not be done."""


class GuestRefusedError(PycloudlibError):
    """A guest that was reached did not fulfil a request; the message has its own reason."""


class ResourceNotFoundError(PycloudlibException):
    """An image, instance or network that was named does not exist.

    Args:
        resource_type: The kind of resource.
        resource_id: The id that was asked for.
        resource_name: The name that was asked for.
        message: What was looked for and where; made from the other arguments if empty.
        **more: Further facts, for the message.

    Attributes:
        more: Further facts.
    """

    def __init__(
        self,
        resource_type: ResourceType | str,
        resource_id: object = None,
        resource_name: object = None,
        *,
        message: str = "",
        **more: object,
    ) -> None:
        self.resource_type = resource_type
        self.resource_id = resource_id
        self.resource_name = resource_name
        self.more = more
        super().__init__(message or self._default_message())

    def _default_message(self) -> str:
        known = {"id": self.resource_id, "name": self.resource_name, **self.more}
        wanted = [f"{key} {value!r}" for key, value in known.items() if value is not None]
        return f"Could not find {self.resource_type}" + (
            f" with {' and '.join(wanted)}" if wanted else ""
        )


class ImageNotFoundError(ResourceNotFoundError):
    """No image of that id or release."""

    def __init__(
        self, resource_id: object = None, resource_name: object = None, **more: Any
    ) -> None:
        super().__init__(ResourceType.IMAGE, resource_id, resource_name, **more)


class InstanceNotFoundError(ResourceNotFoundError):
    """No instance of that id."""

    def __init__(
        self, resource_id: object = None, resource_name: object = None, **more: Any
    ) -> None:
        super().__init__(ResourceType.INSTANCE, resource_id, resource_name, **more)


class NetworkNotFoundError(ResourceNotFoundError):
    """No network of that name."""

    def __init__(
        self, resource_id: object = None, resource_name: object = None, **more: Any
    ) -> None:
        super().__init__(ResourceType.NETWORK, resource_id, resource_name, **more)


class CloudError(PycloudlibException):
    """The cloud, here QEMU and the host, refused or failed."""


class InstanceExistsError(CloudError):
    """The name that was chosen for an instance is in use.

    Attributes:
        name: The name.
        directory: The directory of the instance that has it.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        super().__init__(
            f"The name {name!r} is in use by the instance in {directory}. Delete that one, or take "
            "another name"
        )


class CloudSetupError(PycloudlibException):
    """The cloud cannot be used as it is configured."""


class UnsupportedCloudError(CloudSetupError):
    """A cloud that is not part of this package.

    Args:
        name: What was to be made: a cloud, an instance of one, or something else that is its own.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} is a placeholder: this pycloudlib launches QEMU machines on this host "
            "(pycloudlib.Qemu), and has no other cloud. Those are in Canonical's package of the "
            "same name, https://github.com/canonical/pycloudlib; install it in an environment of "
            "its own: pip install git+https://github.com/canonical/pycloudlib"
        )


class PycloudlibTimeoutError(PycloudlibException):
    """Something that was waited for did not happen within its time."""


class BootFailedError(PycloudlibTimeoutError):
    """A boot does not continue by itself, so that what was waited for can never happen.

    A time-out, as programs catch one for a machine that cannot be reached; only sooner.

    Attributes:
        cause: Why.
    """

    def __init__(self, name: str, cause: Cause, line: str) -> None:
        self.cause = cause
        super().__init__(f"{name} does not boot: {cause.value} ({line})")


class KernelPanicError(CloudError):
    """The guest's kernel has panicked, so that nothing in it runs any more.

    Attributes:
        cause: Why, as far as its last line shows.
    """

    def __init__(self, name: str, cause: Cause, line: str) -> None:
        self.cause = cause
        super().__init__(f"The kernel of {name} has panicked: {line}")


class CleanupError(PycloudlibException):
    """Some resources could not be cleaned up.

    Args:
        exceptions: What went wrong, one error for each resource that is left.
    """

    def __init__(self, exceptions: Sequence[Exception]) -> None:
        self.exceptions = list(exceptions)
        super().__init__(self.exceptions)

    def __str__(self) -> str:
        lines = "".join(f"\n- {type(error).__name__}: {error}" for error in self.exceptions)
        return f"{len(self.exceptions)} error(s) while cleaning up:{lines}"


class MissingPrerequisiteError(PycloudlibException):
    """A program that has to be installed on the host is not there."""


class InvalidTagNameError(PycloudlibException):
    """A tag breaks the naming rules.

    Args:
        tag: The tag as it was given.
        rules_failed: The rules it breaks, one sentence each.
    """

    def __init__(self, tag: str, rules_failed: Sequence[str]) -> None:
        self.tag = tag
        self.rules_failed = list(rules_failed)
        super().__init__(f"Invalid tag {tag!r}: {'; '.join(self.rules_failed)}")


class UnsetSSHKeyError(PycloudlibException):
    """An SSH key is needed and none is set."""

    _MESSAGE = "No SSH key is set: configure public_key_path, or call use_key() on the cloud"

    def __init__(self, message: str = _MESSAGE) -> None:
        super().__init__(message)


class InvalidKeyError(PycloudlibError, ValueError):
    """A file of an SSH key is missing, cannot be read, or is no key."""


class MissingKernelError(PycloudlibError, ValueError):
    """A kernel command line was given, and no kernel is known to boot with it."""


class ImageBuildError(PycloudlibError):
    """A step of building or fetching an image failed; the message names the step."""


class ImageVerificationError(PycloudlibError):
    """Data from an image server is not what its publisher signed."""


class ImageInUseError(CloudError):
    """An image cannot be deleted or replaced because others are built on it.

    Attributes:
        image_id: The image.
        users: The instances and images that are built on it, by name; of those that have none
            here, what they are.
    """

    def __init__(self, image_id: str, users: Sequence[str]) -> None:
        self.image_id = image_id
        self.users = list(users)
        super().__init__(
            f"The image {image_id} stays as it is: {', '.join(self.users)} built on it. "
            "Delete them first"
        )


def describe_exit(status: int) -> str:
    """Describe how a process ended: "exit status 1", or "signal 9" for -9."""
    return f"signal {-status}" if status < 0 else f"exit status {status}"


class ToolError(PycloudlibError):
    """A host program ended with an error.

    Attributes:
        step: What was being done, for people.
        argv: The command line.
        exit_status: Its exit status; negative for the signal that ended it.
        output: What it printed.
    """

    _SHOWN_LINES = 15

    def __init__(self, step: str, argv: Sequence[str], exit_status: int, output: str) -> None:
        self.step = step
        self.argv = list(argv)
        self.exit_status = exit_status
        self.output = output
        how = describe_exit(exit_status)
        tail = "".join(f"\n  {line}" for line in output.splitlines()[-self._SHOWN_LINES :])
        super().__init__(
            f"{step} failed: {self.argv[0]} ended with {how}{':' if tail else ''}{tail}"
        )
