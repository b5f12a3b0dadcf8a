"""What programs write, as a type checker reads it: `make lint` checks it, and nothing runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pycloudlib import (
    EC2,
    GCE,
    IBM,
    LXD,
    OCI,
    Azure,
    IBMClassic,
    LXDContainer,
    LXDVirtualMachine,
    Openstack,
    Qemu,
    VMWare,
)
from pycloudlib.azure.util import AzureCreateParams, AzureParams
from pycloudlib.cloud import BaseCloud, ImageType
from pycloudlib.ec2.instance import EC2Instance
from pycloudlib.gce.instance import GceInstance
from pycloudlib.instance import BaseInstance
from pycloudlib.lxd.cloud import _BaseLXD
from pycloudlib.lxd.instance import LXDInstance
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.result import Result

if TYPE_CHECKING:
    from typing_extensions import assert_type

CLOUDS: dict[str, type[BaseCloud]] = {
    "azure": Azure,
    "ec2": EC2,
    "gce": GCE,
    "ibm": IBM,
    "ibm_classic": IBMClassic,
    "lxd": LXD,
    "lxd_container": LXDContainer,
    "lxd_vm": LXDVirtualMachine,
    "oci": OCI,
    "openstack": Openstack,
    "qemu": Qemu,
    "vmware": VMWare,
}


def make_any_cloud(name: str) -> BaseCloud:
    made: list[BaseCloud] = [
        EC2(tag="t", region="r"),
        Azure("t", timestamp_suffix=False),
        IBM(tag="t", resource_group="g"),
        Qemu("t"),
    ]
    return CLOUDS[name](tag=name, timestamp_suffix=False) if name else made[0]


def use_another_cloud(ec2: EC2, lxd: _BaseLXD, azure: Azure) -> None:
    """The base classes' methods have their types; what only that cloud has is `Any`."""
    assert_type(ec2.tag, str)
    assert_type(ec2.daily_image("noble", arch="arm64", image_type=ImageType.PRO), str)
    assert_type(ec2.create_key_pair(), tuple[str, str])
    assert_type(ec2.clean(), list[Exception])
    assert_type(ec2.get_or_create_vpc(name="v"), Any)
    assert_type(lxd.init("name", profile_list=[]), Any)
    azure.resource_group = "g"
    AzureParams(vm=1).anything = AzureCreateParams(vm=AzureParams())


def use_any_instance(instance: BaseInstance) -> str:
    if isinstance(instance, LXDInstance):
        instance.execute_via_ssh = False
        assert_type(instance.state, Any)
    elif isinstance(instance, (EC2Instance, GceInstance)):
        assert_type(instance.execute("true", use_sudo=True), Result)
        assert_type(instance.zone, Any)
    elif isinstance(instance, QemuInstance):
        assert_type(instance.telnet_port, str)
    return instance.id


def gather(instance: BaseInstance) -> str:
    """Append to a text and to a result, which is a text."""
    text = ""
    text += instance.execute("one").stdout
    keys = instance.execute("one")
    assert_type(keys.stdout, str)
    keys += instance.execute("two").stdout
    return text + keys
