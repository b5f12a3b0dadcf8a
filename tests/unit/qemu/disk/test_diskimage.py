from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pycloudlib._base.tools import run_tool
from pycloudlib.errors import PycloudlibException, ToolError
from pycloudlib.progress import Progress, ignore_progress
from pycloudlib.qemu.disk import diskimage
from pycloudlib.qemu.disk.diskimage import (
    BaseImage,
    create_overlay,
    export,
    inspect_image,
    parse_size,
)

MakeImage = Callable[..., Path]

GIB = 1 << 30
SECTOR = 512


def qemu_img(*arguments: str | Path) -> str:
    command = ["qemu-img", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def image_info(path: Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads(qemu_img("info", "--output=json", path))
    return info


def boot_sector(*partitions: tuple[int, int, int]) -> bytes:
    """Make a partition table of (type, first sector, number of sectors)."""
    entries = b"".join(
        struct.pack("<B3sB3sII", 0x80, b"\0\0\0", kind, b"\0\0\0", first, count)
        for kind, first, count in partitions
    )
    return bytes(446) + entries.ljust(64, b"\0") + b"\x55\xaa"


def gpt(sectors: int) -> bytes:
    """Make the beginning of a disk with a GUID partition table of that many sectors."""
    header = struct.pack("<8sIIIIQQ", b"EFI PART", 0x10000, 92, 0, 0, 1, sectors - 1)
    return boot_sector((0xEE, 1, sectors - 1)) + header.ljust(SECTOR, b"\0")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        inspect_image(path)
    message = str(caught.value)
    assert str(path) in message, "the path is not told"
    return message


def test_qcow2_image_is_taken(tiny_image: Path) -> None:
    assert inspect_image(tiny_image) == BaseImage(tiny_image, "qcow2", 1 << 20)


@pytest.mark.parametrize("odd", [1, 511, 4096, 65535, 65536, 65537, 300000])
@pytest.mark.parametrize("options", [(), ("-c",), ("-o", "compat=0.10"), ("-o", "cluster_size=4k")])
def test_qcow2_image_of_any_make_is_taken(
    options: tuple[str, ...], odd: int, make_image: MakeImage
) -> None:
    # Published images are compressed: their last cluster ends anywhere.
    image = make_image(options=options, content=boot_sector() + os.urandom(odd), size=2 << 20)

    assert inspect_image(image).virtual_size == 2 << 20


def test_raw_image_with_a_partition_table_is_taken(make_image: MakeImage) -> None:
    image = make_image(
        image_format="raw", content=boot_sector((0x83, 2048, 2048)), size=4096 * SECTOR
    )

    assert inspect_image(image) == BaseImage(image, "raw", 4096 * SECTOR)


def test_raw_image_with_a_guid_partition_table_is_taken(make_image: MakeImage) -> None:
    image = make_image(image_format="raw", content=gpt(4096), size=4096 * SECTOR)

    assert inspect_image(image) == BaseImage(image, "raw", 4096 * SECTOR)


@pytest.mark.parametrize("missing", [SECTOR, 4095 * SECTOR // 2])
def test_truncated_raw_image_is_refused(missing: int, make_image: MakeImage) -> None:
    image = make_image(image_format="raw", content=gpt(4096), size=4096 * SECTOR - missing)

    message = refusal(image)
    assert "truncated" in message
    assert "again" in message, "what to do is not told"


def test_raw_image_with_a_partition_past_its_end_is_refused(make_image: MakeImage) -> None:
    image = make_image(
        image_format="raw", content=boot_sector((0x83, 2048, 20480)), size=4096 * SECTOR
    )

    assert "truncated" in refusal(image)


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.3])
def test_qcow2_image_truncated_in_its_data_is_refused(kept: float, make_image: MakeImage) -> None:
    image = make_image(content=boot_sector() + os.urandom(1 << 20), size=2 << 20)
    os.truncate(image, int(image.stat().st_size * kept))

    message = refusal(image)
    assert "truncated" in message
    assert "again" in message, "what to do is not told"


@pytest.mark.parametrize("kept", [4, 60, 104, 600, 70000, 140000])
def test_qcow2_image_truncated_in_its_tables_is_refused(kept: int, make_image: MakeImage) -> None:
    image = make_image(content=boot_sector() + os.urandom(1 << 20), size=2 << 20)
    os.truncate(image, kept)

    assert "truncated" in refusal(image)


def test_qcow2_image_with_damaged_tables_is_refused(tiny_image: Path) -> None:
    with tiny_image.open("r+b") as file:
        file.seek(40)  # the offset of the first table
        file.write(b"\xff" * 8)

    assert "damaged" in refusal(tiny_image)


def test_encrypted_image_says_that_it_is(tmp_path: Path) -> None:
    encrypted, volume = tmp_path / "secret.img", tmp_path / "secret.luks"
    # fmt: off
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=key,data=x",
         "-o", "encrypt.format=aes,encrypt.key-secret=key", encrypted, "1M"],
        check=True,
    )
    # fmt: on
    volume.write_bytes(b"LUKS\xba\xbe\0\1".ljust(1 << 20, b"\0"))
    for image in (encrypted, volume):
        message = refusal(image)
        assert "is encrypted" in message
        assert "Decrypt it" in message, "what to do is not told"
        assert "damaged" not in message


@pytest.mark.parametrize("program", ["gzip", "xz", "bzip2"])
def test_packed_image_says_by_what(tiny_image: Path, program: str) -> None:
    packed = tiny_image.with_suffix(".packed")
    module = importlib.import_module({"gzip": "gzip", "xz": "lzma", "bzip2": "bz2"}[program])
    packed.write_bytes(module.compress(tiny_image.read_bytes()))
    assert f"packed by {program}" in refusal(packed)


def test_image_with_features_of_a_later_qemu_is_not_called_damaged(tiny_image: Path) -> None:
    with tiny_image.open("r+b") as file:
        file.seek(72)  # incompatible features
        file.write((1 << 40).to_bytes(8, "big"))
    message = refusal(tiny_image)
    assert "damaged" not in message
    assert "eature" in message


def test_qcow2_image_with_clusters_that_nobody_uses_is_taken(tiny_image: Path) -> None:
    """A machine that was killed leaves such an image; nothing in it is lost."""
    with tiny_image.open("r+b") as file:
        header = file.read(64)
        (table,) = struct.unpack_from(">Q", header, 48)
        file.seek(table)
        (block,) = struct.unpack(">Q", file.read(8))
        cluster = 1 << struct.unpack_from(">I", header, 20)[0]
        unused = tiny_image.stat().st_size // cluster + 1
        file.seek(block + 2 * unused)
        file.write(b"\0\1")

    assert inspect_image(tiny_image).format == "qcow2"


def test_image_with_a_backing_file_outside_is_refused(tiny_image: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.img"
    qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", tiny_image, overlay)

    message = refusal(overlay)
    assert str(tiny_image) in message
    assert "qemu-img convert" in message, "what to do is not told"


def test_image_that_would_read_a_file_of_the_host_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 4096)
    image = tmp_path / "thief.img"
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", secret, image)

    assert str(secret) in refusal(image)


def test_image_with_an_external_data_file_is_refused(tmp_path: Path) -> None:
    image, data = tmp_path / "image.img", tmp_path / "data.raw"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", image, "1M")

    assert str(data) in refusal(image)


def test_image_may_not_ask_for_all_memory(
    tmp_path: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, real = make_image(), shutil.which("qemu-img")
    script = tmp_path / "programs" / "qemu-img"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nulimit -v >>{tmp_path}/limits\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    inspect_image(image)
    assert (tmp_path / "limits").read_text().split() == [str(4 << 20)] * 2, "in KiB"


def test_program_that_takes_too_much_memory_is_an_error() -> None:
    greedy = ["python3", "-c", "bytearray(5 << 30)"]
    with pytest.raises(ToolError, match="MemoryError"):
        run_tool("reading it", greedy, bounded=True)


@pytest.mark.parametrize("image_format", ["vmdk", "vdi", "vhdx", "qed", "qcow"])
def test_image_of_another_format_is_refused(image_format: str, make_image: MakeImage) -> None:
    image = make_image(image_format=image_format)

    assert "qemu-img convert" in refusal(image), "what to do is not told"


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"just text\n" * 200, bytes(SECTOR), bytes(1 << 20), b"QFI\xfb", b"\x7fELF" * 500],
    ids=["empty", "one byte", "text", "one sector", "zeros", "magic alone", "program"],
)
def test_file_that_is_no_image_is_refused(content: bytes, tmp_path: Path) -> None:
    image = tmp_path / "not-an-image.img"
    image.write_bytes(content)

    refusal(image)


def test_looking_at_an_image_changes_nothing(tiny_image: Path) -> None:
    before = digest(tiny_image)

    inspect_image(tiny_image)

    assert digest(tiny_image) == before


@pytest.mark.parametrize(
    ("base_size", "overlay_size"),
    [
        (1 << 20, 10 * GIB),
        (10 * GIB, 10 * GIB),
        (10 * GIB + 65536, 10 * GIB + 65536),
        (20 * GIB, 20 * GIB),
    ],
)
@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_overlay_has_ten_gib_and_never_less_than_its_base(
    image_format: str, base_size: int, overlay_size: int, tmp_path: Path, make_image: MakeImage
) -> None:
    base = make_image(image_format=image_format, size=base_size)
    overlay = tmp_path / "overlay.qcow2"

    create_overlay(inspect_image(base), overlay)

    info = image_info(overlay)
    assert info["virtual-size"] == overlay_size
    assert info["format"] == "qcow2"
    assert info["full-backing-filename"] == str(base)
    assert info["backing-filename-format"] == image_format


@pytest.mark.parametrize("gib", [1, 9, 30])
def test_overlay_has_the_size_that_is_asked_for(gib: int, tiny_image: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    base = inspect_image(tiny_image)

    create_overlay(base, overlay, size=parse_size(gib, base))

    assert image_info(overlay)["virtual-size"] == gib * GIB


@pytest.mark.parametrize("gib", [-1, 0, 3, 64 * 1024 + 1])
def test_disk_that_cannot_hold_the_image_is_refused(gib: int, tmp_path: Path) -> None:
    base = BaseImage(tmp_path / "some.img", "qcow2", 3 * GIB + 1)

    with pytest.raises(ValueError, match=rf"disk_size_gib is {gib}, expected 4 .*some\.img"):
        parse_size(gib, base)


@pytest.mark.parametrize("size", ["20G", 2.5, True])
def test_disk_size_that_is_no_whole_number_is_refused(size: object, tmp_path: Path) -> None:
    base = BaseImage(tmp_path / "some.img", "qcow2", GIB)

    with pytest.raises(TypeError, match="disk_size_gib must be a whole number"):
        parse_size(size, base)  # type: ignore[arg-type]


def test_overlay_is_readable_by_its_owner_alone_at_every_moment(
    tiny_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = tmp_path / "overlay.qcow2"
    modes: list[int] = []

    def look_and_run(step: str, argv: Any) -> Any:
        modes.append(stat.S_IMODE(overlay.stat().st_mode))
        return run_tool(step, argv)

    monkeypatch.setattr(diskimage, "run_tool", look_and_run)
    base = BaseImage(tiny_image, "qcow2", GIB)
    create_overlay(base, overlay)

    assert [*modes, stat.S_IMODE(overlay.stat().st_mode)] == [0o600, 0o600]


@pytest.mark.parametrize("name", ["with space.img", "a,b,,c.img", "a:b.img", "grüß.img", "-x.img"])
def test_names_of_any_kind_are_no_obstacle(
    name: str, tmp_path: Path, make_image: MakeImage
) -> None:
    base = make_image(name)
    overlay = tmp_path / f"overlay of {name}"

    create_overlay(inspect_image(base), overlay)

    assert image_info(overlay)["full-backing-filename"] == str(base)


def test_base_is_never_written_to(tiny_image: Path, tmp_path: Path) -> None:
    before = digest(tiny_image)
    overlay = tmp_path / "overlay.qcow2"
    create_overlay(inspect_image(tiny_image), overlay)

    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", str(overlay)],
        check=True,
        capture_output=True,
    )

    assert digest(tiny_image) == before


def test_overlay_that_fails_leaves_nothing(tiny_image: Path, tmp_path: Path) -> None:
    base = inspect_image(tiny_image)
    tiny_image.unlink()
    overlay = tmp_path / "overlay.qcow2"

    with pytest.raises(PycloudlibException, match="overlay") as caught:
        create_overlay(base, overlay)

    assert "tiny.img" in str(caught.value), "qemu-img's own words are not told"
    assert not overlay.exists()


@pytest.mark.parametrize("compress", [True, False])
def test_exported_image_needs_no_other_file(
    tiny_image: Path, tmp_path: Path, compress: bool
) -> None:
    overlay, copy = tmp_path / "overlay.qcow2", tmp_path / "copy.img"
    create_overlay(inspect_image(tiny_image), overlay)
    reports: list[Progress] = []

    export(overlay, copy, compress=compress, on_progress=reports.append)
    overlay.unlink()
    tiny_image.unlink()

    assert inspect_image(copy).virtual_size == 10 * GIB
    assert "backing-filename" not in image_info(copy)
    content = tmp_path / "content"
    qemu_img("dd", "-f", "qcow2", "-O", "raw", "bs=512", "count=1", f"if={copy}", f"of={content}")
    assert content.read_bytes()[510:512] == b"\x55\xaa"
    assert (reports[-1].done, reports[-1].total) == (100, 100)


def test_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source, directory = tmp_path / "source", tmp_path / "exports"
    source.write_bytes(b"QFI\xfb and no more")
    directory.mkdir()

    with pytest.raises(PycloudlibException):
        export(source, directory / "copy.img", compress=True, on_progress=ignore_progress)

    assert list(directory.iterdir()) == []


def test_export_never_replaces_a_file(tiny_image: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.img"
    there.write_text("mine")

    with pytest.raises(FileExistsError, match="there"):
        export(tiny_image, there, compress=True, on_progress=ignore_progress)

    assert there.read_text() == "mine"
