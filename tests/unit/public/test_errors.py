from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

from pycloudlib.errors import (
    CleanupError,
    CloudError,
    CloudSetupError,
    ImageNotFoundError,
    InstanceNotFoundError,
    InvalidKeyError,
    InvalidTagNameError,
    MissingKernelError,
    MissingPrerequisiteError,
    NetworkNotFoundError,
    PycloudlibError,
    PycloudlibException,
    PycloudlibTimeoutError,
    ResourceNotFoundError,
    ResourceType,
    UnsetSSHKeyError,
    UnsupportedCloudError,
)

EVERY_KIND = [
    PycloudlibException("broken"),
    PycloudlibError("broken"),
    CloudError("broken"),
    CloudSetupError("broken"),
    PycloudlibTimeoutError("broken"),
    MissingPrerequisiteError("broken"),
    UnsetSSHKeyError("broken"),
    ResourceNotFoundError(ResourceType.NETWORK, "an-id", zone="z"),
    ImageNotFoundError("an-id", message="broken"),
    InstanceNotFoundError("an-id", "a-name"),
    NetworkNotFoundError(resource_name="a-name"),
    UnsupportedCloudError("EC2"),
    InvalidKeyError("broken"),
    MissingKernelError("broken"),
    InvalidTagNameError("Tag", ["it is broken"]),
    CleanupError([ValueError("broken")]),
]


@pytest.mark.parametrize(
    ("kind", "resource_type", "word"),
    [
        (ImageNotFoundError, ResourceType.IMAGE, "image"),
        (InstanceNotFoundError, ResourceType.INSTANCE, "instance"),
        (NetworkNotFoundError, ResourceType.NETWORK, "network"),
    ],
)
def test_missing_resource_says_what_was_looked_for(
    kind: Callable[..., ResourceNotFoundError], resource_type: ResourceType, word: str
) -> None:
    error = kind(resource_id="the-id", resource_name="the-name")

    assert error.resource_type is resource_type
    assert word in str(error)
    assert "the-id" in str(error)
    assert "the-name" in str(error)


def test_missing_resource_says_all_that_is_known_of_it() -> None:
    error = ResourceNotFoundError(ResourceType.IMAGE, "an-id", image_type="Pro", zone=None)

    assert str(error) == "Could not find image with id 'an-id' and image_type 'Pro'"
    assert error.more == {"image_type": "Pro", "zone": None}


def test_missing_resource_may_be_told_in_other_words() -> None:
    error = ImageNotFoundError("warty", message="no image for 'warty'")

    assert str(error) == "no image for 'warty'"
    assert error.resource_id == "warty"


def test_cleanup_error_tells_every_error() -> None:
    errors = [ValueError("first"), OSError("second")]

    error = CleanupError(errors)

    assert error.args == (errors,)
    assert error.exceptions == errors
    assert "ValueError: first" in str(error)
    assert "OSError: second" in str(error)


def test_unset_key_error_says_what_to_do_about_it() -> None:
    assert "public_key_path" in str(UnsetSSHKeyError())


def test_bad_tag_error_keeps_the_tag_and_the_rules() -> None:
    error = InvalidTagNameError("Tag", ["one rule", "another rule"])

    assert error.tag == "Tag"
    assert error.rules_failed == ["one rule", "another rule"]
    assert "one rule" in str(error)
    assert "another rule" in str(error)


@pytest.mark.parametrize("error", EVERY_KIND, ids=lambda error: type(error).__name__)
def test_error_can_be_raised_from_another_process(error: PycloudlibException) -> None:
    """An exception that cannot be unpickled makes `multiprocessing.Pool` wait for ever."""
    arrived = pickle.loads(pickle.dumps(error))

    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
