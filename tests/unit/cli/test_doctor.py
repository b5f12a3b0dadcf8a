"""What is judged of hosts that are made up, and what is seen of this one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import pycloudlib
from pycloudlib.cli import hostfacts
from pycloudlib.cli.doctor import Check, Outcome, judge
from pycloudlib.cli.hostfacts import (
    HostFacts,
    find_other_packages,
    parse_version,
)
from tests.unit.clirun import run

GIB = 1 << 30

HEALTHY = HostFacts(
    configuration="/home/me/.config/pycloudlib.toml",
    qemu="/usr/bin/qemu-system-x86_64",
    qemu_version=(8, 2, 2),
    tools={"to launch": ({"qemu-img": ""}, True), "to build images": ({"sfdisk": ""}, False)},
    free_space={"image_dir": ("/images", 100 * GIB), "working_dir": ("/work", 100 * GIB)},
    free_memory=8 * GIB,
    free_ports=100,
    server="https://cloud-images.ubuntu.com",
    own_package="1!11.0.0 in /usr/lib",
)


def judged(**changes: object) -> dict[str, Check]:
    facts = dataclasses.replace(HEALTHY, **changes)  # type: ignore[arg-type]
    return {check.name: check for check in judge(facts)}


def test_nothing_is_wrong_with_a_healthy_host() -> None:
    checks = judge(HEALTHY)

    assert {check.outcome for check in checks} == {Outcome.OK}
    assert {check.remedy for check in checks} == {""}
    assert [check.name for check in checks] == [
        "configuration",
        "QEMU",
        "accelerator",
        "tools to launch",
        "tools to build images",
        "disk of image_dir",
        "disk of working_dir",
        "memory",
        "ports",
        "image server",
        "leftover machines",
        "other pycloudlib",
    ]


@pytest.mark.parametrize(
    ("changes", "name", "outcome", "detail", "remedy"),
    [
        (
            {"configuration_problem": "x.toml is not valid TOML"},
            *("configuration", Outcome.PROBLEM, "not valid TOML", "correct that file"),
        ),
        ({"qemu": ""}, "QEMU", Outcome.PROBLEM, "was not found", "apt install qemu-system-x86"),
        ({"qemu_version": ()}, "QEMU", Outcome.PROBLEM, "prints no version", "--reinstall"),
        ({"qemu_version": (4, 2)}, "QEMU", Outcome.WARNING, "version 4.2", "6.2 and later"),
        (
            {"kvm_problem": "no such device", "kvm_exists": False, "kvm_allowed": False},
            *("accelerator", Outcome.WARNING, "emulation works", "modprobe kvm_intel"),
        ),
        (
            {"kvm_problem": "no permission", "kvm_allowed": False, "in_kvm_group": False},
            *("accelerator", Outcome.WARNING, "no permission", "usermod -aG kvm"),
        ),
        (
            {"kvm_problem": "no permission", "kvm_allowed": False},
            *("accelerator", Outcome.WARNING, "no permission", "ls -l /dev/kvm"),
        ),
        (
            {"kvm_problem": "a boot sector used up 1 s"},
            *("accelerator", Outcome.WARNING, "used up 1 s", "nothing on this host"),
        ),
        (
            {"kvm_problem": "no permission", "accelerator": "kvm"},
            *("accelerator", Outcome.PROBLEM, "KVM does not work", ""),
        ),
        (
            {"kvm_problem": "x", "tcg_problem": "QEMU ended with signal 4"},
            *("accelerator", Outcome.PROBLEM, "signal 4", "install QEMU"),
        ),
        (
            {"tools": {"to launch": ({"qemu-img": "qemu-utils"}, True)}},
            *("tools to launch", Outcome.PROBLEM, "missing: qemu-img", "apt install qemu-utils"),
        ),
        (
            {"tools": {"to build": ({"a": "p", "b": "", "c": "p"}, False)}},
            *("tools to build", Outcome.WARNING, "missing: a, c", "sudo apt install p"),
        ),
        (
            {"free_space": {"working_dir": ("/work", GIB - 1)}},
            *("disk of working_dir", Outcome.PROBLEM, "in /work", "free space"),
        ),
        (
            {"free_space": {"image_dir": ("/images", 5 * GIB)}},
            *("disk of image_dir", Outcome.WARNING, "5 GiB free", "image_dir in [qemu]"),
        ),
        ({"free_memory": GIB // 2}, "memory", Outcome.PROBLEM, "512 MiB", "--memory 512M"),
        ({"free_memory": GIB}, "memory", Outcome.WARNING, "1 GiB", "--memory 512M"),
        ({"free_ports": 1}, "ports", Outcome.PROBLEM, "1 of 101", "delete machines"),
        ({"free_ports": 8}, "ports", Outcome.WARNING, "8 of 101", "ss -tlnp"),
        (
            {"server_problem": "Name or service not known"},
            *("image server", Outcome.WARNING, "Name or service not known", "images build"),
        ),
        (
            {"leftovers": ("a", "b", "c", "d")},
            *("leftover machines", Outcome.WARNING, "4 left", "pycloudlib prune"),
        ),
        (
            {"other_packages": ("/usr/lib/python3/dist-packages/pycloudlib",)},
            *("other pycloudlib", Outcome.PROBLEM, "dist-packages", "pip uninstall"),
        ),
    ],
)
def test_what_is_wrong_is_told_with_how_to_mend_it(
    changes: dict[str, object], name: str, outcome: Outcome, detail: str, remedy: str
) -> None:
    check = judged(**changes)[name]

    assert check.outcome is outcome
    assert detail in check.detail
    assert check.remedy
    assert remedy in check.remedy


def test_emulation_that_is_configured_is_no_defect() -> None:
    check = judged(accelerator="tcg", kvm_problem="no such device")["accelerator"]

    assert check.outcome is Outcome.OK


def test_server_that_is_not_asked_is_no_defect() -> None:
    assert judged(server="")["image server"].detail == "not asked"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright", (7, 2, 22)),
        ("QEMU emulator version 10.1.0", (10, 1, 0)),
        ("something else", ()),
    ],
)
def test_version_is_read(text: str, version: tuple[int, ...]) -> None:
    assert parse_version(text) == version


def test_what_programs_may_use_here_is_told() -> None:
    facts = dataclasses.replace(HEALTHY, processors=2, memory=4 * GIB, free_memory=3 * GIB)
    told = {check.name: check.detail for check in judge(facts)}
    assert told["memory"] == "3 GiB available of 4 GiB that programs may use here"
    assert told["processors"].startswith("2 ")


def test_another_package_on_the_path_is_found(tmp_path: Path) -> None:
    own = Path(pycloudlib.__file__).parent
    other = tmp_path / "site-packages" / "pycloudlib"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    path = ["", str(own.parent), str(tmp_path / "nothing"), str(other.parent)]

    assert find_other_packages(own, path) == (str(other),)


def test_placeholders_of_other_clouds_are_no_other_package() -> None:
    own = Path(pycloudlib.__file__).parent

    assert find_other_packages(own, [str(own.parent)]) == ()


def test_another_package_that_was_installed_over_this_one_is_found(tmp_path: Path) -> None:
    own = tmp_path / "pycloudlib"
    (own / "ec2").mkdir(parents=True)
    (own / "__init__.py").touch()

    assert find_other_packages(own, [str(tmp_path)]) == (str(own / "ec2"),)
    for name in ("__init__", "cloud"):
        (own / "ec2" / f"{name}.py").write_text("from pycloudlib._otherclouds import OtherCloud\n")
    assert find_other_packages(own, [str(tmp_path)]) == ()
    (own / "ec2" / "more.py").touch()
    assert find_other_packages(own, [str(tmp_path)]) == (str(own / "ec2"),)


@pytest.mark.parametrize(("problem", "code"), [("", 0), ("x.toml is not valid TOML", 1)])
def test_doctor_tells_each_check_and_whether_all_is_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, problem: str, code: int
) -> None:
    facts = dataclasses.replace(HEALTHY, configuration_problem=problem, free_memory=GIB)
    monkeypatch.setattr(hostfacts, "collect", lambda *, ask_server: facts)

    told = run(capsys, "doctor")
    as_json = run(capsys, "doctor", "--json")

    assert told.code == as_json.code == code
    assert "warning  memory: 1 GiB available" in told.out
    assert "→ end other programs" in told.out
    checks = json.loads(as_json.out)
    assert len(checks) == len(judge(facts))
    assert checks[7] == {
        "name": "memory",
        "outcome": "warning",
        "detail": "1 GiB available",
        "remedy": "end other programs or machines, or launch smaller ones (--memory 512M)",
    }


def test_wrong_configuration_is_a_fact_not_an_error(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = home / "broken.toml"
    file.write_text('[qemu]\nqemu_binary = "/no/such/qemu"\norphans = "x"\n')
    monkeypatch.setenv("PYCLOUDLIB_CONFIG", str(file))

    facts = hostfacts.collect(ask_server=False)

    assert "orphans in [qemu]" in facts.configuration_problem
    assert facts.configuration == str(file)
    assert facts.qemu_name == "qemu-system-x86_64"
