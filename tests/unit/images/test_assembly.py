import shutil
import subprocess
from pathlib import Path

import pytest

from pycloudlib.images import assembly


class TestLayout:
    def test_partitions_are_where_ubuntus_images_have_them(self) -> None:
        layout = assembly.build_layout(3)

        places = [
            (each.number, each.start, each.sectors)
            for each in (layout.bios_boot, layout.efi_system, layout.root)
        ]
        assert layout.size == 3 * 1024**3
        assert places == [(14, 2048, 8192), (15, 10240, 217088), (1, 227328, 6062080)]

    @pytest.mark.parametrize("gib", [2, 3, 2048])
    def test_partitions_follow_each_other_and_leave_room_for_the_second_table(
        self, gib: int
    ) -> None:
        layout = assembly.build_layout(gib)

        assert layout.bios_boot.start + layout.bios_boot.sectors == layout.efi_system.start
        assert layout.efi_system.start + layout.efi_system.sectors == layout.root.start
        end = layout.root.offset + layout.root.size
        assert layout.size - end == 1024**2

    def test_sfdisk_is_told_numbers_places_and_types(self) -> None:
        assert assembly.build_sfdisk_script(assembly.build_layout(3)) == (
            "label: gpt\n"
            "1 : start=227328, size=6062080, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4\n"
            "14 : start=2048, size=8192, type=21686148-6449-6E6F-744E-656564454649\n"
            "15 : start=10240, size=217088, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B\n"
        )


class TestBootLoader:
    def test_the_boot_sector_keeps_the_partition_table(self) -> None:
        first_sector = bytes(440) + b"T" * 72
        boot_image = b"B" * 512

        patched = assembly.patch_boot_sector(first_sector, boot_image, core_sector=0x0102)

        assert len(patched) == 512
        assert patched[:0x5C] == b"B" * 0x5C
        assert patched[0x5C:0x64] == b"\x02\x01\0\0\0\0\0\0"
        assert patched[0x64:440] == b"B" * (440 - 0x64)
        assert patched[440:] == b"T" * 72

    def test_the_core_image_knows_where_its_second_sector_is(self) -> None:
        patched = assembly.patch_core_image(b"C" * 1024, core_sector=2048)

        assert len(patched) == 1024
        assert patched[0x1F4:0x1FC] == (2049).to_bytes(8, "little")
        assert patched[:0x1F4] == b"C" * 0x1F4
        assert patched[0x1FC:] == b"C" * (1024 - 0x1FC)


@pytest.mark.skipif(
    shutil.which("sfdisk", path="/usr/sbin:/sbin:/usr/bin") is None
    or shutil.which("mkfs.vfat", path="/usr/sbin:/sbin:/usr/bin") is None
    or not (assembly.GRUB_DIRECTORY / "boot.img").exists(),
    reason="needs sfdisk, mkfs.vfat and GRUB's files",
)
def test_a_disk_is_partitioned_and_made_bootable_without_root(tmp_path: Path) -> None:
    disk = tmp_path / "disk" / "disk.raw"
    disk.parent.mkdir()
    layout = assembly.build_layout(2)

    assembly.write_partition_table("partitioning", disk, layout)
    assembly.format_efi_partition("formatting", disk, layout.efi_system)
    assembly.write_boot_loader("booting", disk, layout)

    assert disk.stat().st_size == layout.size
    with disk.open("rb") as file:
        first_sector = file.read(512)
        file.seek(layout.bios_boot.offset + 0x1F4)
        core_pointer = file.read(8)
        file.seek(layout.efi_system.offset)
        efi_sector = file.read(512)
    assert first_sector[0x5C:0x64] == (2048).to_bytes(8, "little")
    assert first_sector[510:] == b"\x55\xaa"
    assert first_sector[450] == 0xEE  # the protective partition of a GPT
    assert core_pointer == (2049).to_bytes(8, "little")
    assert efi_sector[71:79] == b"UEFI    "
    assert list(disk.parent.iterdir()) == [disk]
    listed = subprocess.run(
        ["/usr/sbin/sfdisk", "--list", "--quiet", "-o", "Device,Type", disk],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    assert [line.split(maxsplit=1)[1] for line in listed.splitlines()[1:]] == [
        "Linux filesystem",
        "BIOS boot",
        "EFI System",
    ]
