"""Further disks of machines, as they are asked for: `launch(disks=[...])`, `add_disk(...)`."""

from pycloudlib.qemu.parts.furtherdisk import Disk

__all__ = ["Disk"]
