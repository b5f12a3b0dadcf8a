"""What clients import, call and subclass, held as data."""

from __future__ import annotations

import enum
import importlib
import importlib.metadata
import inspect
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import pycloudlib
from pycloudlib import errors
from pycloudlib.cloud import BaseCloud, ImageType
from pycloudlib.instance import BaseInstance
from pycloudlib.key import KeyPair
from pycloudlib.qemu.cloud import Qemu
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.result import Result

MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    "pycloudlib": (
        "Qemu",
        "__version__",
        "cloud",
        "config",
        "errors",
        "instance",
        "key",
        "result",
        "util",
    ),
    "pycloudlib.cloud": ("BaseCloud", "ImageType"),
    "pycloudlib.config": ("Config", "parse_config"),
    "pycloudlib.errors": (
        "CleanupError",
        "CloudError",
        "CloudSetupError",
        "ImageNotFoundError",
        "InstanceNotFoundError",
        "InvalidTagNameError",
        "MissingPrerequisiteError",
        "NetworkNotFoundError",
        "PycloudlibError",
        "PycloudlibException",
        "PycloudlibTimeoutError",
        "ResourceNotFoundError",
        "ResourceType",
        "UnsetSSHKeyError",
    ),
    "pycloudlib.instance": ("BaseInstance",),
    "pycloudlib.key": ("KeyPair",),
    "pycloudlib.qemu.cloud": ("Qemu",),
    "pycloudlib.qemu.instance": ("QemuInstance",),
    "pycloudlib.result": ("Result",),
    "pycloudlib.util": (
        "LTS_RELEASES",
        "UBUNTU_RELEASE_VERSION_MAP",
    ),
}

# Names of other clouds, and what they are kinds of; each is a class of its own.
PLACEHOLDERS: Final[Mapping[str, Mapping[str, tuple[type, ...]]]] = {
    "pycloudlib": dict.fromkeys(
        (
            "Azure",
            "EC2",
            "GCE",
            "IBM",
            "IBMClassic",
            "LXD",
            "LXDContainer",
            "LXDVirtualMachine",
            "OCI",
            "Openstack",
            "VMWare",
        ),
        (BaseCloud,),
    ),
    "pycloudlib.azure.cloud": {"Azure": (BaseCloud,)},
    "pycloudlib.azure.instance": {"AzureInstance": (BaseInstance,)},
    "pycloudlib.azure.util": {"AzureParams": (), "AzureCreateParams": ()},
    "pycloudlib.ec2.cloud": {"EC2": (BaseCloud,)},
    "pycloudlib.ec2.instance": {"EC2Instance": (BaseInstance,)},
    "pycloudlib.gce.cloud": {"GCE": (BaseCloud,)},
    "pycloudlib.gce.instance": {"GceInstance": (BaseInstance,)},
    "pycloudlib.ibm.cloud": {"IBM": (BaseCloud,)},
    "pycloudlib.ibm.instance": {"IBMInstance": (BaseInstance,)},
    "pycloudlib.ibm_classic.cloud": {"IBMClassic": (BaseCloud,)},
    "pycloudlib.ibm_classic.instance": {"IBMClassicInstance": (BaseInstance,)},
    "pycloudlib.lxd.cloud": dict.fromkeys(
        ("LXD", "LXDContainer", "LXDVirtualMachine", "_BaseLXD"), (BaseCloud,)
    ),
    "pycloudlib.lxd.instance": dict.fromkeys(
        ("LXDInstance", "LXDVirtualMachineInstance"), (BaseInstance,)
    ),
    "pycloudlib.oci.cloud": {"OCI": (BaseCloud,)},
    "pycloudlib.oci.instance": {"OciInstance": (BaseInstance,)},
    "pycloudlib.openstack.cloud": {"Openstack": (BaseCloud,)},
    "pycloudlib.openstack.instance": {"OpenstackInstance": (BaseInstance,)},
    "pycloudlib.vmware.cloud": {"VMWare": (BaseCloud,)},
    "pycloudlib.vmware.instance": {"VMWareInstance": (BaseInstance,)},
}

REQUIRED: Final = inspect.Parameter.empty
OPTIONAL: Final = object()  # has a default; which one is not said

# Parameters as `name: default`. The name "_" stands for one that clients give by position. After
# "*" come those that clients give by name; "**" says that any other keyword is accepted.
Parameters = Mapping[str, Any]

LAUNCH: Final[Parameters] = {
    "image_id": REQUIRED,
    "instance_type": "c1m1500",
    "user_data": None,
    "meta_data": None,
    "vendor_data": None,
    "network_config": None,
    "kernel_cmdline": "",
    "kernel_path": None,
    "no_seed_iso": False,
    "username": None,
    "launch_args": None,
    "**": None,
}

CLOUD_METHODS: Final[Mapping[str, Parameters]] = {
    "__init__": {"tag": REQUIRED, "timestamp_suffix": True, "config_file": None},
    "__enter__": {},
    "__exit__": {"_": REQUIRED, "_2": REQUIRED, "_3": REQUIRED},
    "clean": {},
    "create_key_pair": {},
    "daily_image": {"release": REQUIRED, "**": None},
    "delete_image": {"image_id": REQUIRED},
    "get_instance": {"instance_id": REQUIRED, "username": None},
    "get_image_id_from_name": {"name": REQUIRED},
    "image_serial": {"image_id": REQUIRED},
    "list_keys": {},
    "released_image": {"release": REQUIRED, "**": None},
    "snapshot": {"instance": REQUIRED, "clean": True},
    "use_key": {"public_key_path": REQUIRED, "private_key_path": None, "name": None},
}

INSTANCE_METHODS: Final[Mapping[str, Parameters]] = {
    "__enter__": {},
    "__exit__": {"_": REQUIRED, "_2": REQUIRED, "_3": REQUIRED},
    "clean": {},
    "console_log": {},
    "delete": {"wait": True},
    "execute": {
        "_": REQUIRED,
        "stdin": None,
        "description": None,
        "*": None,
        "use_sudo": False,
        "get_pty": False,
    },
    "get_boot_id": {},
    "get_status": {},
    "install": {"_": REQUIRED},
    "pull_file": {"remote_path": REQUIRED, "local_path": REQUIRED},
    "push_file": {"local_path": REQUIRED, "remote_path": REQUIRED},
    "restart": {"wait": True},
    "run_script": {"_": REQUIRED},
    "shutdown": {"wait": True},
    "start": {"wait": True},
    "update": {},
    "wait": {"*": None, "ready_timeout": OPTIONAL},
    "wait_for_delete": {},
    "wait_for_restart": {"old_boot_id": REQUIRED},
    "wait_for_stop": {},
    "__del__": {},
    "_ssh": {"_": REQUIRED, "stdin": None},
    "_ssh_connect": {},
    "_wait_for_cloudinit": {},
    "_wait_for_execute": {},
}

RESOURCE: Final[Parameters] = {"resource_id": None, "resource_name": None, "**": None}

FUNCTIONS: Final[Mapping[str, Mapping[str, Parameters]]] = {
    "pycloudlib.config": {"parse_config": {"config_file": None}},
    "pycloudlib.util": {
        "add_key_to_cloud_config": {"public_key": REQUIRED, "user_data": REQUIRED},
        "chmod": {"path": REQUIRED, "mode": REQUIRED},
        "get_timestamped_tag": {"tag": REQUIRED},
        "is_writable_dir": {"path": REQUIRED},
        "log_exception_list": {"_": REQUIRED},
        "mkdtemp": {"prefix": OPTIONAL},
        "rmfile": {"path": REQUIRED},
        "shell_pack": {"cmd": REQUIRED},
        "shell_quote": {"cmd": REQUIRED},
        "shell_safe": {"cmd": REQUIRED},
        "subp": {
            "args": REQUIRED,
            "data": None,
            "env": None,
            "shell": False,
            "rcs": (0,),
            "shortcircuit_stdin": True,
        },
        "touch": {"path": REQUIRED, "mode": None},
        "update_nested": {"mapping": REQUIRED, "update": REQUIRED},
    },
}

# Parts that programs override or patch, beside those below.
CLOUD_HOOKS: Final[Mapping[str, Parameters]] = {
    "_check_and_set_config": {"config_file": REQUIRED, "required_values": REQUIRED},
    "_get_ssh_keys": {"public_key_path": None, "private_key_path": None, "name": None},
    "_validate_tag": {"tag": REQUIRED},
}

METHODS: Final[Mapping[type, Mapping[str, Parameters]]] = {
    BaseCloud: {
        **CLOUD_METHODS,
        **CLOUD_HOOKS,
        "__init__": {**CLOUD_METHODS["__init__"], "required_values": None},
        "launch": {"image_id": REQUIRED, "**": None},
    },
    Qemu: {**CLOUD_METHODS, "launch": LAUNCH},
    BaseInstance: INSTANCE_METHODS,
    QemuInstance: INSTANCE_METHODS,
    KeyPair: {"__init__": {"public_key_path": REQUIRED, "private_key_path": None, "name": None}},
    Result: {"__new__": {"_": REQUIRED, "_2": "", "return_code": 0}},
    errors.CleanupError: {"__init__": {"_": REQUIRED}},
    errors.InvalidTagNameError: {"__init__": {"tag": REQUIRED, "rules_failed": REQUIRED}},
    errors.ResourceNotFoundError: {"__init__": {"resource_type": REQUIRED, **RESOURCE}},
    errors.ImageNotFoundError: {"__init__": RESOURCE},
    errors.InstanceNotFoundError: {"__init__": RESOURCE},
    errors.NetworkNotFoundError: {"__init__": RESOURCE},
}

CLOUD_ATTRIBUTES: Final = ("tag", "config", "key_pair", "created_instances", "created_images")
QEMU_ATTRIBUTES: Final = ("image_dir", "working_dir", "parent_dir", "qemu_binary")
RESULT_ATTRIBUTES: Final = ("stdout", "stderr", "return_code", "ok", "failed")
INSTANCE_PROPERTIES: Final = ("id", "name", "ip", "private_ip", "ready_timeout")
KEY_PAIR_ATTRIBUTES: Final = ("name", "public_key_path", "private_key_path")
INSTANCE_ATTRIBUTES: Final = (
    "port",
    "telnet_port",
    "username",
    "key_pair",
    "instance_dir",
    "instance_path",
)

ERROR_PARENTS: Final[Mapping[str, str]] = {
    "PycloudlibException": "Exception",
    "PycloudlibError": "PycloudlibException",
    "ResourceNotFoundError": "PycloudlibException",
    "ImageNotFoundError": "ResourceNotFoundError",
    "InstanceNotFoundError": "ResourceNotFoundError",
    "NetworkNotFoundError": "ResourceNotFoundError",
    "CloudSetupError": "PycloudlibException",
    "CloudError": "PycloudlibException",
    "PycloudlibTimeoutError": "PycloudlibException",
    "CleanupError": "PycloudlibException",
    "MissingPrerequisiteError": "PycloudlibException",
    "InvalidTagNameError": "PycloudlibException",
    "UnsetSSHKeyError": "PycloudlibException",
}

IMAGE_TYPES: Final = {
    "GENERIC": "generic",
    "MINIMAL": "minimal",
    "PRO": "Pro",
    "PRO_FIPS": "Pro FIPS",
    "PRO_FIPS_UPDATES": "Pro FIPS Updates",
}

# How programs make errors, and the attributes that they read.
FAILURES: Final = [ValueError("a"), OSError("b")]
ERRORS_AS_MADE: Final[Mapping[errors.PycloudlibException, Mapping[str, Any]]] = {
    errors.ResourceNotFoundError(errors.ResourceType.NETWORK, "x", region="r"): {
        "resource_type": errors.ResourceType.NETWORK,
        "resource_id": "x",
        "resource_name": None,
    },
    errors.ImageNotFoundError("x", image_type="y"): {
        "resource_type": errors.ResourceType.IMAGE,
        "resource_id": "x",
    },
    errors.InstanceNotFoundError("x", "n"): {
        "resource_type": errors.ResourceType.INSTANCE,
        "resource_id": "x",
        "resource_name": "n",
    },
    errors.NetworkNotFoundError(resource_name="n"): {
        "resource_type": errors.ResourceType.NETWORK,
        "resource_name": "n",
    },
    errors.CleanupError(FAILURES): {"args": (FAILURES,)},
    errors.InvalidTagNameError("T", ["r"]): {"tag": "T", "rules_failed": ["r"]},
    errors.UnsetSSHKeyError(): {},
}

# What was a PycloudlibError to programs, and is a ValueError to whoever hands in a bad value.
ERRORS_OF_TWO_KINDS: Final = [
    (errors.InvalidKeyError, (errors.PycloudlibError, ValueError)),
    (errors.MissingKernelError, (errors.PycloudlibError, ValueError)),
]

NEW_ERRORS: Final = [
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, Exception) and name not in ERROR_PARENTS
]

CLIENTS_PINS: Final = (">=1!10.0.2,<1!12", ">=1!11.1.2,<1!12")

# At most these: every further one would break a client's subclass.
ABSTRACT_METHODS: Final[Mapping[type, frozenset[str]]] = {
    BaseCloud: frozenset(
        (
            "delete_image",
            "released_image",
            "daily_image",
            "image_serial",
            "get_instance",
            "launch",
            "snapshot",
        )
    ),
    BaseInstance: frozenset(
        (
            "id",
            "name",
            "ip",
            "delete",
            "_do_restart",
            "shutdown",
            "start",
            "wait_for_delete",
            "wait_for_stop",
        )
    ),
}


def signature_problems(function: Any, expected: Parameters, *, bound: int = 0) -> list[str]:
    """Compare a function with what clients rely on; what it has beyond that must be optional."""
    given = list(inspect.signature(function).parameters.values())[bound:]
    by_name = {parameter.name: parameter for parameter in given}
    positional = [p for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]
    problems = []
    seen: set[str] = set()
    by_keyword = False
    for index, (name, default) in enumerate(expected.items()):
        if name == "**":
            if not any(p.kind is p.VAR_KEYWORD for p in given):
                problems.append("does not accept other keywords")
            continue
        if name == "*":
            by_keyword = True
            continue
        if by_keyword:
            parameter = by_name.get(name)
        else:
            parameter = positional[index] if index < len(positional) else None
        if parameter is None or not (name.startswith("_") or parameter.name == name):
            where = "by name" if by_keyword else f"at position {index + 1}"
            problems.append(f"has no {name!r} {where}")
            continue
        seen.add(parameter.name)
        if default is OPTIONAL:
            if parameter.default is REQUIRED:
                problems.append(f"{name!r} has no default")
        elif parameter.default != default:
            problems.append(f"{name!r} has the default {parameter.default!r}, not {default!r}")
    problems.extend(
        f"{p.name!r} is required and new to clients"
        for p in given
        if p.name not in seen
        and p.default is REQUIRED
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    )
    return problems


def missing_from(thing: object, names: Iterable[str]) -> list[str]:
    return [name for name in names if not hasattr(thing, name)]


@pytest.mark.parametrize("module", MODULES)
def test_module_has_the_names_that_clients_import(module: str) -> None:
    missing = missing_from(importlib.import_module(module), MODULES[module])

    assert not missing, f"{module} lacks {', '.join(missing)}"


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        pytest.param(owner, method, id=f"{owner.__name__}.{method}")
        for owner, methods in METHODS.items()
        for method in methods
    ],
)
def test_method_takes_the_parameters_that_clients_give(owner: type, method: str) -> None:
    function = inspect.getattr_static(owner, method, None)
    assert function is not None, f"{owner.__name__} lacks {method}()"

    bound = 0 if isinstance(function, staticmethod) and method != "__new__" else 1
    function = getattr(function, "__func__", function)
    problems = signature_problems(function, METHODS[owner][method], bound=bound)

    assert not problems, f"{owner.__name__}.{method}(): {'; '.join(problems)}"


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module in FUNCTIONS for name in FUNCTIONS[module]]
)
def test_function_takes_the_parameters_that_clients_give(module: str, name: str) -> None:
    function = getattr(importlib.import_module(module), name)

    assert not signature_problems(function, FUNCTIONS[module][name])


@pytest.mark.parametrize("method", ["released_image", "daily_image"])
def test_images_are_generic_unless_another_type_is_asked_for(method: str) -> None:
    parameter = inspect.signature(getattr(Qemu, method)).parameters.get("image_type")

    assert parameter is not None, f"Qemu.{method}() lacks image_type"
    assert parameter.default is ImageType.GENERIC


@pytest.mark.parametrize("error", ERROR_PARENTS)
def test_error_has_its_place_in_the_tree(error: str) -> None:
    """Its parent alone: another one above it would make programs catch it that did not."""
    found = getattr(errors, error)

    assert [base.__name__ for base in found.__bases__] == [ERROR_PARENTS[error]]


@pytest.mark.parametrize("name", NEW_ERRORS)
def test_new_error_is_below_one_that_programs_know(name: str) -> None:
    error = getattr(errors, name)
    known = {base.__name__ for base in error.__mro__} & ERROR_PARENTS.keys()

    assert known - {"PycloudlibException"}, f"{name} hangs below the root alone"


def test_every_error_of_the_package_is_below_the_root() -> None:
    strangers = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type)
        and issubclass(value, Exception)
        and not issubclass(value, errors.PycloudlibException)
    ]

    assert not strangers, f"not below PycloudlibException: {', '.join(strangers)}"


def test_resource_types_are_an_enum() -> None:
    assert issubclass(errors.ResourceType, enum.Enum)
    assert {"IMAGE", "INSTANCE", "NETWORK"} <= set(errors.ResourceType.__members__)
    assert all(str(member) == member.value for member in errors.ResourceType)


@pytest.mark.parametrize("error", ERRORS_AS_MADE, ids=lambda error: type(error).__name__)
def test_error_is_made_as_programs_make_it(error: errors.PycloudlibException) -> None:
    assert {name: getattr(error, name) for name in ERRORS_AS_MADE[error]} == ERRORS_AS_MADE[error]
    assert str(error)


@pytest.mark.parametrize(("error", "kinds"), ERRORS_OF_TWO_KINDS)
def test_error_is_caught_by_programs_of_both_kinds(
    error: type[Exception], kinds: tuple[type[Exception], ...]
) -> None:
    assert all(issubclass(error, kind) for kind in kinds)


def test_image_types_have_their_values() -> None:
    assert {member.name: member.value for member in ImageType} == IMAGE_TYPES


@pytest.mark.parametrize("base", ABSTRACT_METHODS, ids=lambda base: str(base.__name__))
def test_base_class_asks_no_more_of_subclasses_than_agreed(base: type) -> None:
    found: frozenset[str] = getattr(base, "__abstractmethods__", frozenset())
    new = found - ABSTRACT_METHODS[base]

    assert not new, f"{base.__name__} has the new abstract methods {', '.join(sorted(new))}"


def test_qemu_classes_are_kinds_of_the_base_classes() -> None:
    assert pycloudlib.Qemu is Qemu
    assert issubclass(Qemu, BaseCloud)
    assert issubclass(QemuInstance, BaseInstance)
    assert not getattr(Qemu, "__abstractmethods__", None)
    assert not getattr(QemuInstance, "__abstractmethods__", None)


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module in PLACEHOLDERS for name in PLACEHOLDERS[module]]
)
def test_another_clouds_name_is_a_placeholder(module: str, name: str) -> None:
    placeholder = getattr(importlib.import_module(module), name)

    assert placeholder.__name__ == name
    assert all(issubclass(placeholder, kind) for kind in PLACEHOLDERS[module][name])
    assert not issubclass(Qemu, placeholder)
    assert not issubclass(QemuInstance, placeholder)
    with pytest.raises(errors.PycloudlibException, match=f"{name} is a placeholder.*QEMU"):
        placeholder("tag", anything=1)


def test_placeholders_are_distinct() -> None:
    placeholders = {
        getattr(importlib.import_module(module), name)
        for module, names in PLACEHOLDERS.items()
        for name in names
    }
    names = {name for names in PLACEHOLDERS.values() for name in names}

    assert len(placeholders) == len(names)


def test_a_programs_subclass_of_a_placeholder_names_that() -> None:
    class Own(pycloudlib.EC2):
        def __init__(self, region: str) -> None:
            super().__init__(tag="own", region=region)

    with pytest.raises(errors.UnsupportedCloudError, match=r"^EC2 is a placeholder"):
        Own("here")


def test_a_name_that_no_cloud_has_is_missing() -> None:
    with pytest.raises(AttributeError, match="'pycloudlib' has no attribute 'GCP'"):
        pycloudlib.GCP  # type: ignore[attr-defined]  # noqa: B018


def test_cloud_has_its_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "bin" / "qemu-system-x86_64"
    binary.parent.mkdir()
    binary.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{binary.parent}:{os.environ['PATH']}")

    with Qemu("surface", config_file=io.StringIO("")) as cloud:
        missing = missing_from(cloud, (*CLOUD_ATTRIBUTES, *QEMU_ATTRIBUTES))

        assert not missing, f"Qemu objects lack {', '.join(missing)}"
        assert cloud.created_instances == []
        assert cloud.created_images == []
        assert Path(cloud.parent_dir) == Path(cloud.working_dir) / f"pycl-qemu-{cloud.tag}"


def test_key_pair_has_its_attributes() -> None:
    assert not missing_from(KeyPair("/keys/mine.pub"), KEY_PAIR_ATTRIBUTES)
    assert isinstance(KeyPair.public_key_content, property)


def test_result_has_its_attributes() -> None:
    missing = missing_from(Result("out", "err", 1), RESULT_ATTRIBUTES)

    assert not missing, f"Result lacks {', '.join(missing)}"


def test_instance_has_its_attributes() -> None:
    # The rest is set by the constructor, whose arguments are no business of clients.
    source = inspect.getsource(QemuInstance) + inspect.getsource(BaseInstance)
    missing = [
        name
        for name in INSTANCE_ATTRIBUTES
        if not hasattr(QemuInstance, name)
        and f"self.{name} = " not in source
        and f"self.{name}: " not in source
    ]
    missing += missing_from(QemuInstance, INSTANCE_PROPERTIES)

    assert not missing, f"QemuInstance lacks {', '.join(missing)}"


def test_version_is_one_that_clients_accept() -> None:
    version = Version(importlib.metadata.version("pycloudlib"))

    assert version >= Version("1!11.2.0")
    assert all(version in SpecifierSet(pin) for pin in CLIENTS_PINS)
    assert Version(pycloudlib.__version__) == version
