from __future__ import annotations

import gzip
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from pycloudlib.guest.runconfig import build_script


def run(script: str, tmp_path: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a script as a guest's root would, in a world where /run and cloud-init are ours."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    place = shlex.quote(str(tmp_path / "place"))
    make_program(programs / "mktemp", f"mkdir {place} && echo {place}")
    make_program(
        programs / "cloud-init",
        f'echo "$@" >>{shlex.quote(str(tmp_path / "called"))}\n'
        f"cp $2 {shlex.quote(str(tmp_path / 'given'))}\n"
        '[ "$5" != "$FAILING" ]',
    )
    path = f"{programs}:{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-s"],
        input=script.encode(),
        env={**os.environ, "PATH": path},
        check=False,
        capture_output=True,
        timeout=60,
    )


def make_program(file: Path, body: str) -> None:
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)


def modules_run(tmp_path: Path) -> list[str]:
    """List the modules that cloud-init was asked for, in order."""
    return [line.split()[4] for line in (tmp_path / "called").read_text().splitlines()]


def test_script_runs_as_it_is(tmp_path: Path) -> None:
    done = run(build_script("#!/bin/sh\necho 'it''s $HOME' \"\\$x\"\nexit 7\n"), tmp_path)
    assert done.stdout == b"its $HOME $x\n"
    assert done.returncode == 7


def test_script_reaches_the_guest_byte_for_byte(tmp_path: Path) -> None:
    text = '#!/bin/sh\ncat "$0"\n# grüße 🙂 \\n %s $(no) `no` \'q\' "q"\t\nexit\n'
    assert run(build_script(text), tmp_path).stdout == text.encode()


def test_script_may_be_of_another_language(tmp_path: Path) -> None:
    assert run(build_script("#!/usr/bin/env python3\nprint(6 * 7)\n"), tmp_path).stdout == b"42\n"


@pytest.mark.parametrize("kind", ["text", "bytes", "gzip"])
def test_text_bytes_and_gzip_are_the_same(kind: str) -> None:
    text = "#!/bin/sh\necho hello\n"
    given: dict[str, str | bytes] = {
        "text": text,
        "bytes": text.encode(),
        "gzip": gzip.compress(text.encode()),
    }
    assert build_script(given[kind]) == build_script(text)


def test_script_runs_where_nothing_on_run_can_be_executed() -> None:
    """Debian's and Ubuntu's initramfs mounts /run with noexec."""
    alone = ["unshare", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o noexec tmpfs /run"
    if subprocess.run([*alone, mount], check=False, capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own")
    done = subprocess.run(
        [*alone, f"{mount} && sh -s"],
        input=build_script("#!/bin/sh\necho ran\n").encode(),
        check=False,
        capture_output=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == (b"ran\n", 0), done.stderr


def test_cloud_config_runs_its_modules_in_the_order_of_a_boot(tmp_path: Path) -> None:
    config = "#cloud-config\npackages: [jq]\nusers: [default]\nwrite_files: []\nbootcmd: [ls]\n"
    done = run(build_script(config), tmp_path)
    assert done.returncode == 0
    assert modules_run(tmp_path) == [
        "bootcmd",
        "write_files",
        "users_groups",
        "package_update_upgrade_install",
    ]
    assert (tmp_path / "given").read_text() == config


def test_module_that_has_several_keys_runs_once(tmp_path: Path) -> None:
    run(build_script("#cloud-config\npassword: a\nchpasswd: {expire: false}\n"), tmp_path)
    assert modules_run(tmp_path) == ["set_passwords"]


def test_failing_module_is_told_and_does_not_keep_others_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILING", "bootcmd")
    done = run(build_script("#cloud-config\nbootcmd: [ls]\ntimezone: UTC\n"), tmp_path)
    assert done.returncode != 0
    assert b"bootcmd failed" in done.stderr
    assert modules_run(tmp_path) == ["bootcmd", "timezone"]


def test_runcmd_runs_after_the_packages() -> None:
    script = build_script("#cloud-config\nruncmd: [jq --version]\npackages: [jq]\n")
    written = script.index("--name runcmd")
    installed = script.index("--name package_update_upgrade_install")
    executed = script.index("sh /var/lib/cloud/instance/scripts/runcmd")
    assert written < installed < executed


@pytest.mark.parametrize("config", ["#cloud-config\n", "#cloud-config", "#cloud-config\n{}\n"])
def test_empty_cloud_config_does_nothing(config: str, tmp_path: Path) -> None:
    assert run(build_script(config), tmp_path).returncode == 0
    assert not (tmp_path / "called").exists()


def test_lines_that_end_as_on_windows_are_a_cloud_config(tmp_path: Path) -> None:
    run(build_script("#cloud-config\r\ntimezone: UTC\r\n"), tmp_path)
    assert modules_run(tmp_path) == ["timezone"]


def test_keys_that_take_a_boot_are_named() -> None:
    config = "#cloud-config\ndisk_setup: {}\nruncmd: [ls]\n7: x\nfs_setup: []\n"
    with pytest.raises(ValueError, match="has 7, disk_setup, fs_setup, which takes a boot") as told:
        build_script(config)
    assert "runcmd" in str(told.value)


@pytest.mark.parametrize(
    "beginning",
    ["#cloud-config-archive", "## template: jinja", "#include", "#cloud-boothook", "Content-Type"],
)
def test_other_kinds_are_refused_by_their_beginning(beginning: str) -> None:
    with pytest.raises(ValueError, match="must be a script") as told:
        build_script(f"{beginning}\nmore\n")
    assert beginning in str(told.value)


def test_empty_user_data_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a script"):
        build_script("")


@pytest.mark.parametrize("document", ["- a\n", "text\n", "7\n"])
def test_cloud_config_that_is_no_mapping_is_refused(document: str) -> None:
    with pytest.raises(ValueError, match="not a cloud-config mapping"):
        build_script(f"#cloud-config\n{document}")


@pytest.mark.parametrize("document", ["a: [", "a: \x01\n", "a: &x\n  *y\n"])
def test_broken_yaml_is_refused(document: str) -> None:
    with pytest.raises(ValueError, match="not valid YAML"):
        build_script(f"#cloud-config\n{document}")


def damage_middle(data: bytes) -> bytes:
    return data[:10] + b"\xff" * 8 + data[18:]


@pytest.mark.parametrize(
    "damaged",
    [
        gzip.compress(b"#!/bin/sh\n" * 100)[:-9],
        gzip.compress(b"#!/bin/sh\n" * 100)[:-8] + bytes(8),
        damage_middle(gzip.compress(b"#!/bin/sh\n" * 100)),
        b"\x1f\x8b",
    ],
    ids=["cut off", "wrong sum", "wrong content", "header alone"],
)
def test_damaged_gzip_is_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError, match="damaged gzip"):
        build_script(damaged)


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(ValueError, match="neither a script nor a cloud-config"):
        build_script(b"#!/bin/sh\n\xff\xfe")


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="not dict"):
        build_script({"runcmd": []})  # type: ignore[arg-type]
