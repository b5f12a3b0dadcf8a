"""Runs in a guest, as root: tells what it is like, as JSON.

What only this machine has (its names, its keys, its addresses) is replaced by a word; what no two
boots have alike (times, what comes and goes with them) is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
from pathlib import Path

Aspect = dict[str, str]


# systemctl gives up after 25 seconds, which a guest in emulation on a busy host may need.
ENVIRONMENT = {**os.environ, "SYSTEMD_BUS_TIMEOUT": "10min"}


def run(command: str) -> list[str]:
    told = subprocess.run(
        command, shell=True, stdout=subprocess.PIPE, text=True, check=True, env=ENVIRONMENT
    )
    return told.stdout.splitlines()


def read(path: str) -> str:
    return Path(path).read_text(errors="replace")


OWN = {
    "HOSTNAME": os.uname().nodename,
    "MACHINE-ID": read("/etc/machine-id").strip(),
    "INSTANCE-ID": read("/var/lib/cloud/data/instance-id").strip(),
    "MAC": "".join(run("cat /sys/class/net/e*/address")),
}
# Of which types it has some is its user's affair.
for key in Path("/etc/ssh").glob("ssh_host_*_key.pub"):
    OWN[key.name] = read(str(key)).split()[1]
# What no two boots have alike.
CHANCE = (
    re.compile(r"(?<=systemd-private-)[0-9a-f]{32}"),
    re.compile(r"(?<=\.service)-\w{6}\b"),
    re.compile(r"={10,}\d+=="),  # between the parts of a MIME document
    re.compile(r"\b\w{3}, \d{2} \w{3} \d{4} \d\d:\d\d:\d\d"),
)
# Their content is told by a digest.
TOLD = ("/etc/", "/home/", "/root/", "/var/lib/cloud/", "/var/tmp/")
# Unless they tell of moments, or hold what only this machine has.
UNTOLD = re.compile(
    r"/var/lib/cloud/(data|sem|instances/[^/]+/(sem|obj\.pkl|vendor|boot-finished))"
    r"|/etc/(shadow|machine-id|ssh/ssh_host_.*)|-$"
)
NOT_LOOKED_INTO = ("/dev", "/proc", "/run", "/sys", "/tmp")
# Their files are the image's.
LOOKED_INTO_ONCE = ("/usr", "/boot", "/var/cache")
PASSING_UNITS = re.compile(r"\.(scope|slice|device|mount|swap)$|^(session|user|run-)|@|fsckd")


def neutral(text: str) -> str:
    for word, own in OWN.items():
        # YAML quotes a MAC address that has no letter: it could be a number to the base of 60.
        text = text.replace(f"'{own}'", word).replace(own, word)
    for pattern in CHANCE:
        text = pattern.sub("CHANCE", text)
    return text


def describe(path: str) -> str:
    facts = Path(path).lstat()
    words = [stat.filemode(facts.st_mode), str(facts.st_uid), str(facts.st_gid)]
    if stat.S_ISLNK(facts.st_mode):
        words.append(neutral(str(Path(path).readlink())))
    elif stat.S_ISREG(facts.st_mode) and path.startswith(TOLD) and not UNTOLD.search(path):
        # cloud-init writes authorized_keys in the order of a set.
        lines = sorted(neutral(read(path)).splitlines())
        words.append(hashlib.sha256("\n".join(lines).encode()).hexdigest())
    return " ".join(words)


def files() -> Aspect:
    found = {}
    for top, directories, names in os.walk("/"):
        if top == "/":
            directories[:] = [name for name in directories if f"/{name}" not in NOT_LOOKED_INTO]
        if top.startswith(LOOKED_INTO_ONCE):
            directories[:] = []
        for name in (*directories, *names):
            path = f"{top.rstrip('/')}/{name}"
            # Empty where the vendor-data has no cloud-config, as that of a first boot that begins
            # at cloud-init; without vendor-data there is none.
            if name == "vendor-cloud-config.txt" and not Path(path).stat().st_size:
                continue
            found[neutral(path)] = describe(path)
    return found


def units() -> Aspect:
    found = {}
    for line in run("systemctl list-units --all --plain --no-legend"):
        name, load, active = line.split()[:3]
        if not PASSING_UNITS.search(name):
            found[name] = f"{load} failed" if active == "failed" else load
    return found


def cloud_init() -> Aspect:
    result = json.loads(read("/run/cloud-init/result.json"))["v1"]
    status = json.loads(read("/run/cloud-init/status.json"))["v1"]
    stages = {name: stage for name, stage in status.items() if isinstance(stage, dict)}
    return {
        "datasource": result["datasource"],
        "errors": json.dumps(result["errors"]),
        **{
            name: json.dumps([stage["errors"], stage.get("recoverable_errors")])
            for name, stage in stages.items()
        },
    }


def by_word(number: int, command: str, passing: str = r"(?!)") -> Aspect:
    """Name each line of a command by one of its words."""
    return {line.split()[number]: neutral(re.sub(passing, "", line)) for line in run(command)}


def by_user(command: str, passing: str = r"(?!)") -> Aspect:
    return {line.split(":")[0]: re.sub(passing, "", line) for line in run(command)}


if __name__ == "__main__":
    aspects = {
        "files": files(),
        "units": units(),
        "enabled units": by_word(0, "systemctl list-unit-files --no-legend"),
        "users": by_user("getent passwd"),
        "groups": by_user("getent group"),
        "passwords": by_user("cat /etc/shadow", r"(?<=:)\$[^:]*|(?<=:)\d+(?=:)"),
        "cloud-init": cloud_init(),
        "disks": by_word(0, "lsblk -nlo NAME,SIZE,FSTYPE,MOUNTPOINTS"),
        "addresses": by_word(1, "ip -o -4 address", r"valid_lft.*"),
        "routes": by_word(0, "ip route", r"metric.*"),
        "modules": by_word(0, "lsmod", r" .*"),
        "kernel": {"release": os.uname().release, "command line": read("/proc/cmdline")},
        "locale": {"locale": "\n".join(run("locale")), "zone": "".join(run("date +%Z"))},
    }
    print(json.dumps(aspects))
