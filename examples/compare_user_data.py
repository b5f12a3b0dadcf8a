"""Compare what two user-datas make of a machine: files, users, packages and units.

python examples/compare_user_data.py ONE OTHER [IMAGE]
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pycloudlib import Qemu

# Prints the parts of a machine: a line for each, with its kind, its name and its value. Dates, and
# names and addresses that are unique to each machine, make no difference.
PROGRAM = r"""
import hashlib, os, pathlib, re, socket, subprocess
identities = [pathlib.Path("/etc/machine-id"), *pathlib.Path("/sys/class/net").glob("*/address")]
own = [socket.gethostname(), *(file.read_text().strip() for file in identities)]
skipped = re.compile("/etc/ssh/ssh_host_|/etc/machine-id|/etc/shadow|.*/__pycache__/")
odd = re.compile("|".join(map(re.escape, own)) + r"|on \w{3}, \d\d \w{3} \d{4} .*")
for top in ("/etc", "/usr/local", "/var/tmp"):
    for directory, _, files in os.walk(top):
        for path in (pathlib.Path(directory, name) for name in files):
            if path.is_file() and not path.is_symlink() and not skipped.match(str(path)):
                content = odd.sub("ITS-OWN", path.read_bytes().decode(errors="replace"))
                print("file", path, hashlib.md5(content.encode()).hexdigest())
for command in (
    "sed 's/:/ /; s/^/user /' /etc/passwd",
    "dpkg-query --show --showformat 'package ${Package} ${Version}\\n'",
    "systemctl list-unit-files --no-legend --plain | sed 's/^/unit /'",
    "timedatectl show --property Timezone | sed 's/=/ /; s/^/setting /'",
):
    print(subprocess.run(command, shell=True, capture_output=True, text=True).stdout)
"""

Facts = dict[tuple[str, str], str]


def describe(cloud: Qemu, image: str, user_data: Path) -> Facts:
    """Boot a machine with a user-data, and return its parts."""
    content = user_data.read_bytes()
    with cloud.launch(image, user_data=content, fast_boot=True) as machine:
        machine.wait()
        result = machine.execute("python3 -", stdin=PROGRAM, use_sudo=True)
    if result.failed:
        raise RuntimeError(result.stderr)
    facts = {}
    for line in filter(None, result.splitlines()):
        kind, name, value = [*line.split(maxsplit=2), ""][:3]
        facts[kind, name] = value
    return facts


def compare(one: Facts, other: Facts) -> list[str]:
    """List what only one has (-), what only the other has (+), and what differs (~)."""
    lines = []
    for kind, name in sorted({*one, *other}):
        before, after = one.get((kind, name)), other.get((kind, name))
        if before != after:
            sign = "+" if before is None else "-" if after is None else "~"
            lines.append(f"{sign} {kind} {name}")
    return lines


def main() -> int:
    """Boot two machines side by side, and print their differences."""
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    files = [Path(argument) for argument in sys.argv[1:3]]
    with Qemu(tag="compare") as cloud:
        image = sys.argv[3] if len(sys.argv) > 3 else cloud.build_image("bookworm")
        with ThreadPoolExecutor(2) as threads:
            one, other = threads.map(lambda file: describe(cloud, image, file), files)
    differences = compare(one, other)
    print("\n".join(differences))
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
