"""Where first boots begin: which launches share it, and which boot from their beginning."""

from __future__ import annotations

import dataclasses
import gzip
import os
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path

import pytest
import yaml

from pycloudlib.guest.data.seed import VOLUME_UNIT
from pycloudlib.qemu.disk.diskimage import BaseImage
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.launching import warmcache
from pycloudlib.qemu.launching.beginning import Host
from pycloudlib.qemu.launching.request import LaunchRequest, SeedRequest
from pycloudlib.qemu.launching.startingpoint import find_obstacle
from pycloudlib.qemu.launching.warmcache import build_start_key
from pycloudlib.qemu.parts.standard import InstanceType, KernelBoot
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.settings import QemuSettings

OTHERS_WORD = "#cloud-config\nvendor_data: {enabled: false}\n"


@pytest.fixture
def request_(tmp_path: Path) -> LaunchRequest:
    image = tmp_path / "some.img"
    image.write_bytes(bytes(1024))
    return LaunchRequest(
        name="vm-1",
        image=BaseImage(image, "raw", 1024),
        instance_type=InstanceType(1, 64),
        seed=SeedRequest("ssh-ed25519 AAAA me"),
        kernel_boot=None,
        launch_args=(),
    )


def with_seed(request: LaunchRequest, **changes: object) -> LaunchRequest:
    assert request.seed is not None
    seed = dataclasses.replace(request.seed, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(request, seed=seed)


def test_machines_with_other_data_share_it(request_: LaunchRequest, host: Host) -> None:
    key = build_start_key(request_, host)
    for other in (
        with_seed(request_, user_data="#!/bin/sh\n"),
        with_seed(request_, user_data=b"x" * (1 << 20)),
        with_seed(request_, meta_data={"instance-id": "i"}, network_config={"version": 2}),
        with_seed(request_, public_key="ssh-ed25519 BBBB you", vendor_data="#cloud-config\n"),
        dataclasses.replace(request_, name="vm-2", launch_args=("-S",)),
    ):
        assert build_start_key(other, host) == key


def test_disk_of_another_size_has_its_own(request_: LaunchRequest, host: Host) -> None:
    larger = dataclasses.replace(request_, disk_size=20 << 30)

    assert build_start_key(larger, host) != build_start_key(request_, host)


def test_seed_of_another_length_has_its_own(request_: LaunchRequest, host: Host) -> None:
    large = with_seed(request_, user_data=b"x" * VOLUME_UNIT)
    assert build_start_key(large, host) != build_start_key(request_, host)


@pytest.mark.parametrize("size", [InstanceType(2, 64), InstanceType(1, 65)])
def test_machine_of_another_size_has_its_own(
    size: InstanceType, request_: LaunchRequest, host: Host
) -> None:
    other = dataclasses.replace(request_, instance_type=size)
    assert build_start_key(other, host) != build_start_key(request_, host)


def test_what_it_is_made_with_changes_the_key(
    request_: LaunchRequest, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [build_start_key(request_, host)]
    keys.append(build_start_key(request_, dataclasses.replace(host, accelerator=Accelerator.KVM)))
    os.utime(request_.image.path, (2000, 2000))
    keys.append(build_start_key(request_, host))
    host.binary.write_text("another build")
    keys.append(build_start_key(request_, host))
    monkeypatch.setattr(savedmachine, "FORMAT", savedmachine.FORMAT + 1)
    keys.append(build_start_key(request_, host))
    monkeypatch.setattr(warmcache, "__version__", "99")
    keys.append(build_start_key(request_, host))
    monkeypatch.setattr(Accelerator, "slow_features", ("erms",))
    keys.append(build_start_key(request_, host))
    assert len(set(keys)) == len(keys)


def make_mime(content: str, kind: str = "cloud-config") -> str:
    document = MIMEMultipart()
    document.attach(MIMEText(content, kind))
    return document.as_string()


@pytest.mark.parametrize(
    "user_data",
    [
        OTHERS_WORD,
        OTHERS_WORD.encode(),
        gzip.compress(OTHERS_WORD.encode(), mtime=0),
        b"\x1f\x8bdamaged",
        make_mime(OTHERS_WORD),
        gzip.compress(
            make_mime(OTHERS_WORD + "# ünïcode, so that it is encoded\n").encode(), mtime=0
        ),
    ],
    ids=["text", "bytes", "gzip", "damaged", "MIME", "gzip of encoded MIME"],
)
def test_user_data_that_could_disable_the_correction_is_an_obstacle(
    user_data: str | bytes, request_: LaunchRequest
) -> None:
    for document in ("user_data", "vendor_data"):
        obstacle = find_obstacle(with_seed(request_, **{document: user_data}))
        assert obstacle is not None
        assert "vendor-data" in obstacle or "damaged gzip" in obstacle


HOOK = "#cloud-boothook\n#!/bin/sh\ndate >/root/date\n"


@pytest.mark.parametrize("document", ["user_data", "vendor_data"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (HOOK, "has a boothook"),
        ("## template: jinja\n" + HOOK, "has a boothook"),
        (make_mime("#!/bin/sh\n", "cloud-boothook"), "has a boothook"),
        ("#cloud-config-archive\n" + yaml.safe_dump([HOOK]), "has a boothook"),
        ("#cloud-config-archive\n" + yaml.safe_dump([HOOK.encode()]), "has a boothook"),
        (
            "#cloud-config-archive\n- {type: Text/Cloud-Boothook, content: '#!/bin/sh'}\n",
            "has a boothook",
        ),
        ("#part-handler\ndef list_types(): ...\n", "has a part handler"),
        (make_mime("def list_types(): ...\n", "part-handler"), "has a part handler"),
        ("#include\nhttp://127.0.0.1/\n", "includes other documents"),
        ("#include-once\nhttp://127.0.0.1/\n", "includes other documents"),
        (make_mime("http://127.0.0.1/\n", "x-include-url"), "includes other documents"),
        (make_mime("http://127.0.0.1/\n", "X-Include-Once-URL"), "includes other documents"),
        ("#cloud-config-archive\n- [", "cannot be read whole"),
    ],
)
def test_documents_that_act_before_the_correction_are_an_obstacle(
    document: str, content: str, reason: str, request_: LaunchRequest
) -> None:
    obstacle = find_obstacle(with_seed(request_, **{document: content}))
    assert obstacle is not None
    assert reason in obstacle


@pytest.mark.parametrize("meta_data", ["seedfrom: http://127.0.0.1/\n", {"seedfrom": "/seed/"}])
def test_another_seed_is_an_obstacle(
    meta_data: str | dict[str, str], request_: LaunchRequest
) -> None:
    obstacle = find_obstacle(with_seed(request_, meta_data=meta_data))
    assert obstacle is not None
    assert "seedfrom" in obstacle


def test_what_changes_the_way_to_the_seed_is_an_obstacle(request_: LaunchRequest) -> None:
    kernel = KernelBoot(Path("/vmlinuz"), None, "quiet")
    for change, reason in (
        ({"seed": None}, "seed"),
        ({"kernel_boot": kernel}, "kernel"),
        ({"launch_args": ("-S", "-device", "pvpanic")}, "launch_args"),
    ):
        obstacle = find_obstacle(dataclasses.replace(request_, **change))
        assert obstacle is not None
        assert reason in obstacle


@pytest.mark.parametrize("user_data", [None, "#cloud-config\n"])
def test_others_have_no_obstacle(user_data: str | None, request_: LaunchRequest) -> None:
    held = dataclasses.replace(with_seed(request_, user_data=user_data), launch_args=("-S",))
    assert find_obstacle(held) is None


@pytest.mark.parametrize(("section", "value"), [({}, False), ({"fast_boot": True}, True)])
def test_it_can_be_configured(section: dict[str, object], value: bool) -> None:
    assert QemuSettings.parse(section, "a file").fast_boot is value


@pytest.mark.parametrize("wrong", ["yes", 1, "true"])
def test_wrong_configuration_is_told(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"fast_boot in \[qemu\] of a file is .*expected true or"):
        QemuSettings.parse({"fast_boot": wrong}, "a file")
