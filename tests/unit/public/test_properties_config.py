"""Whatever a user configures or asks for by name is taken, or refused with the value named."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pycloudlib import Qemu
from pycloudlib._base.documents import safe_repr
from pycloudlib._base.files import expand_user, is_file
from pycloudlib.config import Config, parse_config
from pycloudlib.errors import (
    ImageNotFoundError,
    InvalidKeyError,
    InvalidTagNameError,
    MissingPrerequisiteError,
)
from pycloudlib.guest.access import loginkey
from pycloudlib.images import store
from pycloudlib.images.catalog import check_release_form
from pycloudlib.images.download import shown_url
from pycloudlib.images.source import ImageSource
from pycloudlib.key import generate_key_pair
from pycloudlib.qemu.launching.request import find_kernel_boot, parse_launch_args
from pycloudlib.qemu.parts.standard import InstanceType
from pycloudlib.qemu.state.settings import QemuSettings
from tests.unit.hostile import NAMES, PLAIN, STRANGE, TOO_DEEP, damaged, put

KEYS = (
    "accelerator",
    "budget_memory_mib",
    "budget_processors",
    "fast_boot",
    "image_dir",
    "image_keyring",
    "image_lock",
    "image_mirror",
    "image_verification",
    "key_name",
    "offline",
    "qemu_binary",
    "warm_cache_mib",
    "working_dir",
)
TOML = b"""[qemu]
image_dir = '/tmp'
warm_cache_mib = 0x10
offline = true
[ec2]
dates = [1979-05-27T07:32:00Z, 07:32:00, 1e5]
"""
ANY = st.text(st.characters(exclude_categories=()), max_size=30)


@given(damaged(TOML) | st.sampled_from(STRANGE))
@example(b"a = " + b"[" * TOO_DEEP)
@example(b"a = " + b"1" * 5000)
@example(b"a = 2021-13-40")
def test_configuration_is_read_or_told_with_its_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.toml"
    put(file, content)
    try:
        config = parse_config(file)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        assert config.source == str(file)


@given(ANY | st.sampled_from(["a = " + "{a=" * TOO_DEEP, "[" * TOO_DEEP]))
def test_configuration_given_as_text_is_read_or_told(text: str) -> None:
    try:
        assert isinstance(parse_config(io.StringIO(text)), Config)
    except ValueError as error:
        assert "the config_file given as text" in str(error)


@given(NAMES.filter(bool))
@example("~nobody-of-that-name/config.toml")
@example("x" * 300)
@example("a\0b")
def test_file_that_cannot_be_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"config_file|is not valid TOML"):
        parse_config(f"/no-such-directory/{name}" if name[0] not in "~$" else name)


@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=10), PLAIN | NAMES, max_size=4))
@example({"image_dir": "~nobody-of-that-name"})
@example({"image_dir": "x" * 300})
@example({"working_dir": "a\0b"})
@example({"image_keyring": "x" * 300})
@example({"image_mirror": ["http://me:secret@host"]})
@example({"image_dir": 16**6000})
def test_settings_are_values_or_refused_with_key_and_file(section: dict[str, Any]) -> None:
    try:
        settings = QemuSettings.parse(section, "my.toml")
    except ValueError as error:
        match = re.match(r"(\w+) in \[qemu\] of my\.toml is ", str(error))
        assert match is not None, error
        told = safe_repr(section[match[1]])
        assert (shown_url(told) if match[1] == "image_mirror" else told) in str(error)
    else:
        assert settings.image_dir.is_absolute()
        assert settings.warm_cache_mib >= 0
        assert min(settings.capacity.processors, settings.capacity.memory_mib) >= 1
        assert isinstance(settings.offline, bool)


@given(st.sampled_from([*KEYS, "public_key_path", "private_key_path"]), NAMES)
@example("public_key_path", "~nobody-of-that-name/key.pub")
@example("private_key_path", "a\0b")
@example("qemu_binary", "a\0b")
def test_cloud_says_what_is_wrong_with_its_configuration(key: str, value: str) -> None:
    # Without a program, so that none gets any further.
    config = {"qemu": {"qemu_binary": "/no/qemu", key: value}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pycloudlib.cloud.parse_config", lambda _: Config(config))
        with pytest.raises((ValueError, MissingPrerequisiteError)) as caught:
            Qemu("t", timestamp_suffix=False)
    assert (
        key in str(caught.value)
        or "/no/qemu" in str(caught.value)
        or repr(value) in str(caught.value)
    )


@given(NAMES | ANY)
@example("http://[")
@example("http://[::1")
@example("http://h:99999")
@example("http://h:port")
@example("http://u:p@[/")
def test_mirror_is_one_or_is_named(mirror: str) -> None:
    try:
        assert ImageSource(mirror).mirror == mirror
    except ValueError as error:
        assert "Invalid image mirror" in str(error)


@given(st.integers(1, 999), st.integers(1, 10**8 - 1))
def test_instance_type_is_read_back_as_it_is_written(cpus: int, memory: int) -> None:
    instance_type = InstanceType(cpus, memory)
    assert InstanceType.parse(str(instance_type)) == instance_type


@given(ANY | st.from_regex(r"c\d{0,9}m\d{0,9}") | PLAIN)
@example("c1m1500\n")
@example("c" + "1" * 5000 + "m1")
def test_instance_type_is_one_or_is_named(text: Any) -> None:
    try:
        parsed = InstanceType.parse(text)
    except ValueError as error:
        assert f"instance_type is {text!r}" in str(error)
    else:
        assert parsed.cpus > 0
        assert parsed.memory_mib > 0


@given(ANY | st.from_regex(r"[a-z0-9-]{1,70}"))
def test_tag_is_one_or_its_faults_are_listed(tag: str) -> None:
    allowed = re.fullmatch(r"(?!-)[a-z0-9-]{1,63}(?<!-)", tag)
    try:
        Qemu._validate_tag(tag)
    except InvalidTagNameError as error:
        assert allowed is None
        assert error.rules_failed
        assert repr(tag) in str(error)
    else:
        assert allowed is not None


@given(ANY | PLAIN)
@example("٢٤.٠٤")
@example("noble\n")
def test_release_is_a_name_in_letters_and_digits_or_refused(release: Any) -> None:
    try:
        check_release_form(release)
    except ValueError as error:
        assert repr(release) in str(error)
    else:
        assert release.isascii()


@given(NAMES | ANY)
@example("~nobody-of-that-name/image.img")
@example("x" * 300)
@example("a\0b")
@example("\ud800")
def test_what_is_no_image_is_told_of(tmp_path: Path, image_id: str) -> None:
    # Texts of this package are among those that are tried, and some are names of files.
    assume(not is_file(tmp_path / expand_user(image_id)))
    with pytest.raises(ImageNotFoundError) as caught:
        store.resolve(image_id, tmp_path)
    assert repr(image_id) in str(caught.value)


@given(NAMES | ANY)
@example("x" * 300)
@example("x" * 250)
def test_deleting_what_is_no_image_is_no_error(make_cloud: Callable[[], Qemu], name: str) -> None:
    # Below an image: whatever the name is, nothing can be there.
    make_cloud().delete_image(f"image.img/{name}")


@pytest.fixture
def make_cloud(tmp_path: Path) -> Callable[[], Qemu]:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "image.img").touch()
    (tmp_path / "qemu").touch(mode=0o755)
    text = f"[qemu]\nqemu_binary = '{tmp_path}/qemu'\nimage_dir = '{tmp_path}/images'\n"
    cloud = Qemu("t", timestamp_suffix=False, config_file=io.StringIO(text))
    return lambda: cloud


@given(st.lists(ANY, max_size=4).map(tuple) | PLAIN)
@example(5)
@example(("a\0b",))
@example(("\ud800",))
def test_arguments_are_such_that_a_program_can_be_given_them(arguments: Any) -> None:
    try:
        parsed = parse_launch_args(arguments)
    except (TypeError, ValueError) as error:
        assert "launch_args" in str(error)
    else:
        assert not any("\0" in argument for argument in parsed)


@given(ANY | PLAIN, st.none() | NAMES | PLAIN)
@example("root=\0", None)
@example("", "~nobody-of-that-name/vmlinuz")
@example("", "x" * 300)
@example(b"quiet", None)
def test_kernel_is_there_or_named(cmdline: Any, kernel: Any) -> None:
    image = Path("/no-such-directory/image.img")
    expected = (TypeError, ValueError, FileNotFoundError)
    if not cmdline and kernel is None:
        assert find_kernel_boot(image, cmdline, kernel) is None
        return
    if isinstance(kernel, str):
        kernel = kernel if kernel.startswith("~") else f"/no-such-directory/{kernel}"
    with pytest.raises(expected, match="kernel_"):
        find_kernel_boot(image, cmdline, kernel)


KEY_FILES = st.tuples(
    st.sampled_from(["id_ed25519", "id_ed25519.pub"]),
    st.none() | st.integers(0, 500) | st.sampled_from(STRANGE),
)


@given(KEY_FILES)
def test_damaged_key_is_told_of(tmp_path: Path, broken: tuple[str, bytes | int | None]) -> None:
    for file in tmp_path.glob("id_*"):
        put(file, b"")
    pair = generate_key_pair(tmp_path, "name")
    name, damage = broken
    file = tmp_path / name
    put(file, file.read_bytes()[:damage] if isinstance(damage, int) else damage)
    for look in (loginkey.check, loginkey.prove):
        try:
            look(pair, "here")
        except InvalidKeyError as error:
            assert str(error).startswith("here: ")
            assert str(file) in str(error)
