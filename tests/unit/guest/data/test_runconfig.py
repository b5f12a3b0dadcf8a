from __future__ import annotations

import pickle
import re
import shlex
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pycloudlib.guest.data.runconfig import OUTPUT_LOG, build_script
from scripts.doc_blocks import ROOT
from tests.unit.userdataforms import (
    EVERYTHING,
    FORMS,
    HOOK,
    IN_ORDER,
    RECORD,
    Form,
    config,
    mime,
    script,
    text,
)

# What cloud-init does of its modules, as far as tests look at it.
CLOUD_INIT = """\
#!{python}
import os, sys, yaml
_, single, name, module, *often = sys.argv
assert [single, name, *often] == ["single", "--name", "--frequency", "always"]
file = "{root}/var/lib/cloud/instance/cloud-config.txt"
print("done by", module)
with open("{root}/called", "a") as called:
    called.write(module + "\\n")
with open(file) as given:
    config = yaml.safe_load(given)
scripts = os.path.dirname(file) + "/scripts"
if module == "bootcmd":
    for command in config["bootcmd"]:
        os.system(command)
if module == "runcmd" and config["runcmd"] is not None:
    os.makedirs(scripts, exist_ok=True)
    with open(scripts + "/runcmd", "w") as file:
        file.write("#!/bin/sh\\n" + "\\n".join(config["runcmd"]) + "\\n")
    os.chmod(scripts + "/runcmd", 0o700)
if os.path.exists("{root}/fails-" + module):
    exit("it is broken")
"""


@dataclass
class FakeGuest:
    """A guest whose files are in a directory, and whose cloud-init is ours."""

    root: Path

    def __post_init__(self) -> None:
        for directory in ("bin", "var/log", "var/lib/cloud/data", "var/lib/cloud/instances/IID"):
            (self.root / directory).mkdir(parents=True)
        (self.cloud / "data/instance-id").write_text("IID\n")
        (self.cloud / "instance").symlink_to(self.cloud / "instances/IID")
        program = self.root / "bin/cloud-init"
        program.write_text(CLOUD_INIT.format(python=sys.executable, root=self.root))
        program.chmod(0o755)

    @property
    def cloud(self) -> Path:
        return self.root / "var/lib/cloud"

    @property
    def record(self) -> Path:
        return self.root / "var/tmp-record"

    @property
    def log(self) -> str:
        return (self.root / OUTPUT_LOG[1:]).read_text()

    @property
    def modules(self) -> list[str]:
        """The modules that cloud-init was asked for, in order."""
        called = self.root / "called"
        return called.read_text().split() if called.exists() else []

    def run(self, user_data: str | bytes) -> subprocess.CompletedProcess[str]:
        """Do what a copy does with user-data; what it would write to `RECORD` is in `record`."""
        program = build_script(user_data)
        for old, new in (
            ("/var/", f"{self.root}/var/"),
            ("PATH=", f"PATH={self.root}/bin:"),
            ("base64 -d >", f"base64 -d | sed s,{RECORD},{self.record}, >"),
        ):
            program = program.replace(old, shlex.quote(new) if " " not in old else new)
        return subprocess.run(
            ["sh", "-s"],
            input=program,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/somewhere", "SECRET": "x"},
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def recorded(self) -> tuple[str, ...]:
        return tuple(self.record.read_text().splitlines()) if self.record.exists() else ()


@pytest.fixture
def guest(tmp_path: Path) -> FakeGuest:
    return FakeGuest(tmp_path)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_each_form_is_taken_as_in_a_boot_or_refused(form: Form, guest: FakeGuest) -> None:
    if form.refused:
        with pytest.raises(ValueError, match=form.refused):
            build_script(form.document)
    else:
        guest.run(form.document)
        assert guest.recorded() == form.boot


def test_script_has_what_it_has_in_a_boot(guest: FakeGuest) -> None:
    asking = f"""\
#!/bin/sh
{{ echo $0; pwd; umask; cat; env | sort; }} >>{RECORD}
echo to stdout; echo to stderr >&2
"""
    done = guest.run(asking)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    assert guest.recorded() == (
        f"{guest.cloud}/instance/scripts/part-001",
        "/",
        "0022",
        "LANG=C.UTF-8",
        f"PATH={guest.root}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PWD=/",
        "TERM=vt220",
    )
    assert guest.log == "to stdout\nto stderr\n"
    kept = guest.cloud / "instances/IID/scripts/part-001"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert not list((guest.root / "var/lib").glob("pycloudlib-*"))


def test_output_is_added_to_the_log_while_a_script_runs(guest: FakeGuest) -> None:
    (guest.root / OUTPUT_LOG[1:]).write_text("of the boot\n")
    guest.run(f"#!/bin/sh\necho one; cp {guest.root}{OUTPUT_LOG} {RECORD}; echo two\n")
    assert guest.recorded() == ("of the boot", "one")
    assert guest.log == "of the boot\none\ntwo\n"


def test_what_a_script_leaves_running_is_not_waited_for(guest: FakeGuest) -> None:
    done = guest.run(f"#!/bin/sh\nsleep 50 & echo $! >>{RECORD}\n")
    (pid,) = guest.recorded()
    subprocess.run(["kill", pid], check=True)
    assert done.returncode == 0


def test_failing_script_is_told_with_the_end_of_its_output(guest: FakeGuest) -> None:
    (guest.root / OUTPUT_LOG[1:]).write_text("of the boot\n")
    failing = "#!/bin/sh\necho why >&2\nexit 7\n"
    done = guest.run(mime(*[text(content, "x-shellscript") for content in (failing, script())]))
    assert done.returncode == 7
    assert done.stderr == "part-001 ended with exit status 7\nwhy\n"
    assert guest.recorded() == ("script",)


def test_script_reaches_the_guest_byte_for_byte(guest: FakeGuest) -> None:
    content = "#!/bin/sh\n# grüße 🙂 \\n %s $(no) `no` 'q' \"q\"\t\x00\nexit\n"
    guest.run(content)
    assert (guest.cloud / "instance/scripts/part-001").read_bytes() == content.encode()


def test_guest_whose_cloud_init_has_no_state_runs_scripts_and_tells(guest: FakeGuest) -> None:
    (guest.cloud / "instance").unlink()
    done = guest.run(EVERYTHING)
    assert done.returncode == 1
    assert "bootcmd failed" in done.stderr
    assert guest.recorded() == tuple(line for line in IN_ORDER if "cmd" not in line)
    assert not (guest.cloud / "instance").exists()
    assert not list((guest.root / "var/lib").glob("pycloudlib-*"))


def test_guest_without_cloud_init_runs_scripts_and_tells(guest: FakeGuest) -> None:
    (guest.root / "bin/cloud-init").unlink()
    assert guest.run(script()).returncode == 0
    done = guest.run(config("x"))
    assert done.returncode == 1
    assert "bootcmd failed" in done.stderr
    assert "cloud-init" in done.stderr
    assert guest.recorded() == ("script",)


def test_secrets_of_a_cloud_config_are_for_root_alone(guest: FakeGuest) -> None:
    guest.run("#cloud-config\npassword: secret\n")
    kept = guest.cloud / "instance/cloud-config.txt"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert yaml.safe_load(kept.read_text()) == {"password": "secret"}


def test_cloud_config_runs_its_modules_in_the_order_of_a_boot(guest: FakeGuest) -> None:
    given = "#cloud-config\npackages: [jq]\nusers: [default]\nwrite_files: []\nbootcmd: [ls]\n"
    assert guest.run(given).returncode == 0
    assert guest.modules == [
        "bootcmd",
        "write_files",
        "users_groups",
        "package_update_upgrade_install",
    ]


def test_module_that_has_several_keys_runs_once(guest: FakeGuest) -> None:
    guest.run("#cloud-config\npassword: a\nchpasswd: {expire: false}\n")
    assert guest.modules == ["set_passwords"]


@pytest.mark.parametrize("deferred", [True, False])
def test_files_that_are_written_later_are_written_after_the_packages(
    deferred: bool, guest: FakeGuest
) -> None:
    entry = {"path": "/x", "defer": deferred}
    guest.run(f"#cloud-config\n{yaml.safe_dump({'write_files': [entry], 'packages': []})}")
    late = ["write_files_deferred"] if deferred else []
    assert guest.modules == ["write_files", "package_update_upgrade_install", *late]


def test_failing_module_is_told_and_does_not_keep_others_from_running(guest: FakeGuest) -> None:
    (guest.root / "fails-bootcmd").touch()
    done = guest.run("#cloud-config\nbootcmd: [ls]\ntimezone: UTC\n")
    assert done.returncode == 1
    assert "bootcmd failed" in done.stderr
    assert "it is broken" in done.stderr
    assert guest.modules == ["bootcmd", "timezone"]


def test_commands_of_the_saved_machine_are_not_run_again(guest: FakeGuest) -> None:
    scripts = guest.cloud / "instance/scripts"
    scripts.mkdir()
    for name in ("runcmd", "part-000"):
        (scripts / name).write_text(script("old").replace(RECORD, str(guest.record)))
        (scripts / name).chmod(0o700)
    guest.run("#cloud-config\nbootcmd: []\nruncmd:\n")
    guest.run(script())
    assert guest.recorded() == ("script",)


def test_modules_find_who_the_copy_is(guest: FakeGuest) -> None:
    kept = guest.cloud / "instance/obj.pkl"
    # A module that the guest's Python has, too.
    kept.write_bytes(pickle.dumps(make_source("another")))
    guest.run(config("x"))
    assert pickle.loads(kept.read_bytes()).metadata == {"instance-id": "IID"}


def make_source(instance_id: str) -> Any:
    from types import SimpleNamespace  # noqa: PLC0415 - next to its only use

    return SimpleNamespace(metadata={"instance-id": instance_id})


@pytest.mark.parametrize("key", ["merge_how", "merge_type"])
def test_manner_of_merging_of_the_first_cloud_config_has_no_meaning(
    key: str, guest: FakeGuest
) -> None:
    first = text(config("a", "b", more=f"{key}: [[dict, recurse_array]]\n"), "cloud-config")
    guest.run(mime(first, text(config("c"), "cloud-config")))
    assert guest.recorded() == ("c",)


def test_keys_that_take_a_boot_are_named_with_the_part() -> None:
    given = "#cloud-config\ndisk_setup: {}\nruncmd: [ls]\n7: x\nfs_setup: []\n"
    with pytest.raises(ValueError, match="has 7, disk_setup, fs_setup, which takes a boot") as told:
        build_script(given)
    assert "runcmd" in str(told.value)
    with pytest.raises(ValueError, match=r"^part-002 of user_data .* disk_setup"):
        build_script(mime(text(script(), "plain"), text(given, "cloud-config")))


@pytest.mark.parametrize("name", ["ü", "..", "."])
def test_file_names_of_which_cloud_init_leaves_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="of its file name"):
        build_script(mime(text(script(), "x-shellscript", name)))


def test_file_names_are_no_way_out_of_the_directory(guest: FakeGuest) -> None:
    name = "../$(touch x);'a\" (b)"
    guest.run(mime(text(script(), "x-shellscript", name)))
    assert [file.name for file in (guest.cloud / "instance/scripts").iterdir()] == [
        ".._(touchx)a(b)"
    ]
    assert guest.recorded() == ("script",)


def test_boothooks_come_before_modules_in_their_own_order(guest: FakeGuest) -> None:
    other = "#cloud-boothook\n" + script("other")
    document = mime(
        text(config("bootcmd"), "cloud-config"),
        text(other, "cloud-boothook", "z"),
        text(HOOK, "cloud-boothook", "a"),
    )
    guest.run(document)
    assert guest.recorded() == ("other", "hook IID", "bootcmd")


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="not dict"):
        build_script({"runcmd": []})  # type: ignore[arg-type]


def test_documents_tell_of_each_form_what_a_copy_does_with_it() -> None:
    document = ROOT / "docs/how-to/save-a-running-machine.md"
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in document.read_text().splitlines()
        if line.startswith("|")
    ]
    told = {f"{row[0]} |": row[2] for row in rows if row[2] in ("the same", "refused")}
    seen = set()
    for form in FORMS:
        (row,) = [row for row in told if row.startswith(form.row)]
        assert told[row] == ("refused" if form.refused else "the same"), form.name
        seen.add(row)
    assert seen == {*told}


def test_documents_name_the_possible_keys() -> None:
    document = (ROOT / "docs/how-to/save-a-running-machine.md").read_text()
    named = document.partition("Possible keys are ")[2].partition(".")[0]
    with pytest.raises(ValueError, match="no-such-key") as told:
        build_script("#cloud-config\nno-such-key: x\n")
    possible = str(told.value).rpartition("possible are ")[2].split(", ")
    assert sorted(re.findall(r"`(\w+)`", named)) == [key for key in possible if "-" not in key]
