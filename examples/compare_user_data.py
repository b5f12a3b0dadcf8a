"""Tell what two user-datas make different in a machine: files, users, packages and units.

python examples/compare_user_data.py ONE OTHER [IMAGE]
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pycloudlib import Qemu

# What makes up a machine, a line for each thing.
FACTS = r"""
find /etc /usr/local /var/tmp -xdev -type f ! -name '*.pyc' \
    ! -path '/etc/ssh/ssh_host_*' ! -path /etc/machine-id -exec md5sum {} +
sed 's/^/user /; s/:/ /' /etc/passwd
dpkg-query -W -f 'package ${Package} ${Version}\n'
systemctl list-unit-files --no-legend --plain | sed 's/^/unit /'
timedatectl show | grep Timezone
"""


def describe(cloud: Qemu, image: str, user_data: Path) -> set[str]:
    """Boot a machine with a user-data, and list what it is made of."""
    content = user_data.read_bytes()
    with cloud.launch(image, user_data=content, fast_boot=True) as machine:
        machine.wait()
        result = machine.execute(["sh", "-c", FACTS], use_sudo=True)
        # Each has a name of its own.
        return {line.replace(machine.name, "NAME") for line in result.splitlines()}


def main() -> int:
    """Boot two machines side by side, and print what one has and the other has not."""
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    files = [Path(argument) for argument in sys.argv[1:3]]
    with Qemu(tag="compare") as cloud:
        image = sys.argv[3] if len(sys.argv) > 3 else cloud.build_image("bookworm")
        with ThreadPoolExecutor(2) as threads:
            one, other = threads.map(lambda file: describe(cloud, image, file), files)
    for line in sorted(one ^ other, key=lambda line: (line.split()[1:], line)):
        print("<" if line in one else ">", line)
    return int(one != other)


if __name__ == "__main__":
    sys.exit(main())
