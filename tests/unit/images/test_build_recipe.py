import dataclasses
import io
import tarfile
from typing import Any

import pytest
import yaml

from pycloudlib.images import recipe as recipes
from pycloudlib.images.assembly import build_mmdebstrap_command, find_detail, pack
from pycloudlib.images.recipe import BuildRecipe


class TestValidation:
    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"release": "noble"}, "'noble'.*bookworm, trixie"),
            ({"release": ""}, "bookworm, trixie"),
            ({"packages": "curl"}, "'curl'"),
            ({"packages": ("curl", "-oDebug=1")}, "'-oDebug=1'"),
            ({"packages": ("curl,wget",)}, "'curl,wget'"),
            ({"packages": ("Curl",)}, "'Curl'"),
            ({"packages": (None,)}, "None"),
            ({"kernel": "linux image"}, "'linux image'"),
            ({"default_user": "root"}, "'root'"),
            ({"default_user": "me: x"}, "'me: x'"),
            ({"default_user": ""}, "''"),
            ({"default_user": "u" * 33}, "1 to 32"),
            ({"disk_size_gib": 1}, "1.*from 2"),
            ({"disk_size_gib": 2.5}, "2.5"),
            ({"disk_size_gib": True}, "True"),
            ({"disk_size_gib": 10_000}, "10000"),
            ({"mirror": "deb.debian.org"}, "'deb.debian.org'"),
            ({"mirror": "http://x/debian main\ndeb http://evil"}, "mirror"),
        ],
    )
    def test_a_value_that_nothing_can_be_built_from_is_named(
        self, fields: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(ValueError, match=named):
            BuildRecipe(**fields)

    def test_packages_may_be_any_sequence_in_any_order(self) -> None:
        listed: Any = ["zsh", "curl", "zsh"]

        assert BuildRecipe(packages=listed) == BuildRecipe(packages=("curl", "zsh"))


class TestKey:
    def test_every_field_changes_it(self) -> None:
        plain = BuildRecipe()
        changes: dict[str, Any] = {
            "release": "trixie",
            "packages": ("htop",),
            "default_user": "debian",
            "kernel": "linux-image-amd64",
            "disk_size_gib": 4,
            "mirror": "http://mirror.example/debian",
        }

        keys = [dataclasses.replace(plain, **{name: changes[name]}).key for name in changes]

        assert set(changes) == {field.name for field in dataclasses.fields(plain)}
        assert len({plain.key, *keys}) == len(changes) + 1

    def test_equal_recipes_have_equal_keys(self) -> None:
        assert BuildRecipe(packages=("b2", "a2")).key == BuildRecipe(packages=("a2", "b2")).key

    def test_the_guests_files_change_it(self) -> None:
        recipe = BuildRecipe()
        files = recipes.list_guest_files(recipe, serial="")
        changed = [
            dataclasses.replace(file, content="set timeout=5\n")
            if file.path == "/boot/grub/grub.cfg"
            else file
            for file in files
        ]

        assert recipes.compute_key(recipe, files) == recipe.key
        assert recipes.compute_key(recipe, changed) != recipe.key


class TestGuestFiles:
    @pytest.fixture
    def files(self) -> dict[str, recipes.GuestFile]:
        recipe = BuildRecipe(default_user="tester")
        return {file.path: file for file in recipes.list_guest_files(recipe, "20240101.2")}

    def test_they_say_which_build_they_are_of(self, files: dict[str, recipes.GuestFile]) -> None:
        assert files["/etc/cloud/build.info"] == recipes.GuestFile(
            "/etc/cloud/build.info", "build_name: server\nserial: 20240101.2\n"
        )

    def test_cloud_init_looks_for_nocloud_only_and_makes_the_user(
        self, files: dict[str, recipes.GuestFile]
    ) -> None:
        config = yaml.safe_load(files["/etc/cloud/cloud.cfg.d/91_pycloudlib.cfg"].content)

        assert config["datasource_list"] == ["NoCloud", "None"]
        assert config["locale"] == "C.UTF-8"
        user = config["system_info"]["default_user"]
        assert user["name"] == "tester"
        assert user["sudo"] == ["ALL=(ALL) NOPASSWD:ALL"]
        assert user["shell"] == "/bin/bash"

    def test_the_kernel_finds_the_root_disk_by_label_and_talks_on_both_consoles(
        self, files: dict[str, recipes.GuestFile]
    ) -> None:
        config = files["/boot/grub/grub.cfg"].content

        assert "root=LABEL=cloudimg-rootfs ro console=tty1 console=ttyS0\n" in config
        assert "set timeout=0\n" in config

    def test_security_updates_come_from_beside_the_mirror(self) -> None:
        lines = recipes.list_apt_sources(BuildRecipe(mirror="http://mirror.example/debian/"))

        assert lines == (
            "deb http://mirror.example/debian bookworm main",
            "deb http://mirror.example/debian bookworm-updates main",
            "deb http://mirror.example/debian-security bookworm-security main",
        )

    def test_a_mirror_at_an_unusual_place_leaves_security_to_debians_own(self) -> None:
        lines = recipes.list_apt_sources(BuildRecipe(mirror="http://mirror.example/d12"))

        assert lines[-1] == "deb http://deb.debian.org/debian-security bookworm-security main"

    def test_they_are_packed_as_roots(self) -> None:
        files = (
            recipes.GuestFile("/etc/motd", "hé\n", mode=0o600),
            recipes.GuestFile("/etc/link", link="/dev/null"),
        )

        with tarfile.open(fileobj=io.BytesIO(pack(files, 7))) as archive:
            motd, link = archive.getmembers()
            content = archive.extractfile(motd)
            assert content is not None
            assert content.read() == "hé\n".encode()
        assert (motd.name, motd.uid, motd.gid, motd.mode, motd.mtime) == (
            *("etc/motd", 0, 0, 0o600, 7),
        )
        assert (link.name, link.linkname, link.issym()) == ("etc/link", "/dev/null", True)


class TestMmdebstrap:
    def test_the_command_line(self, tmp_path: Any) -> None:
        recipe = BuildRecipe(release="trixie", packages=("htop",))

        command = build_mmdebstrap_command(
            recipe, tmp_path, tmp_path / "keys.gpg", inside_user_namespace=True
        )

        packages = ",".join((recipe.kernel, *recipes.BASE_PACKAGES, "htop"))
        assert command == [
            "mmdebstrap",
            "--mode=unshare",
            "--format=directory",
            "--variant=apt",
            "--verbose",
            f"--keyring={tmp_path}/keys.gpg",
            "--dpkgopt=force-unsafe-io",
            f"--include={packages}",
            "trixie",
            tmp_path,
            "deb http://deb.debian.org/debian trixie main",
            "deb http://deb.debian.org/debian trixie-updates main",
            "deb http://deb.debian.org/debian-security trixie-security main",
        ]

    @pytest.mark.parametrize(
        ("line", "detail"),
        [
            ("I: running apt-get update...", "running apt-get update"),
            (
                "Get:2 http://deb.debian.org/debian bookworm/main amd64 libc6 amd64 2.36 [2 kB]",
                "Downloading libc6",
            ),
            ("Unpacking libc6:amd64 (2.36-9) ...", "Unpacking libc6:amd64"),
            ("Setting up udev (252.39-1~deb12u1) ...", "Setting up udev"),
            ("update-initramfs: Generating /boot/initrd.img-6.1.0", "Generating the initrd"),
            ("Get:1 http://deb.debian.org/debian bookworm InRelease [151 kB]", None),
            ("Reading package lists...", None),
        ],
    )
    def test_its_output_tells_what_happens(self, line: str, detail: str | None) -> None:
        assert find_detail(line) == detail
