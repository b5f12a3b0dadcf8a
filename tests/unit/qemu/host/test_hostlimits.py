from __future__ import annotations

import os
from pathlib import Path

import pytest

from pycloudlib.qemu.host.budget import Capacity
from pycloudlib.qemu.host.resources import HostLimits
from pycloudlib.qemu.state.settings import QemuSettings

MIB = 1 << 20
MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n"
WHOLE = HostLimits(8, 16384 * MIB, 8192 * MIB)
ONE = HostLimits(1, WHOLE.memory, WHOLE.available)

V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw\n"
V1 = (
    "30 23 0:27 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n"
    "31 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
NO_LIMIT = "9223372036854771712"

Tree = dict[str, str]


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))


def read(root: Path, mounts: str, cgroup: str, groups: Tree, meminfo: str = MEMINFO) -> HostLimits:
    """Read the limits of a host whose files are these, those of groups below /sys/fs/cgroup."""
    files = {
        "proc/meminfo": meminfo,
        "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts,
        "proc/self/cgroup": cgroup,
        **{f"sys/fs/cgroup/{name}": text for name, text in groups.items()},
    }
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return HostLimits.read(root)


def v2(group: str, **files: str) -> Tree:
    return {f"{group}/{name.replace('_', '.', 1)}": text + "\n" for name, text in files.items()}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        pytest.param({}, WHOLE, id="nothing can be read"),
        pytest.param(
            v2(
                "a/b", memory_max="max", memory_high="max", memory_current="5", cpu_max="max 100000"
            ),
            WHOLE,
            id="no limits",
        ),
        pytest.param(
            v2(
                "a/b",
                memory_max=str(512 * MIB),
                memory_current=str(200 * MIB),
                cpu_max="200000 100000",
            ),
            HostLimits(2, 512 * MIB, 312 * MIB),
            id="its own",
        ),
        pytest.param(
            v2("a/b", memory_max="max", memory_current=str(MIB), cpu_max="max 100000")
            | v2(
                "a",
                memory_max=str(512 * MIB),
                memory_current=str(400 * MIB),
                cpu_max="300000 100000",
            ),
            HostLimits(3, 512 * MIB, 112 * MIB),
            id="a parent's",
        ),
        pytest.param(
            v2("a/b", memory_max=str(512 * MIB), memory_current=str(MIB))
            | v2("a", memory_max=str(1024 * MIB), memory_current=str(1000 * MIB)),
            HostLimits(8, 512 * MIB, 24 * MIB),
            id="others use what the parent has",
        ),
        pytest.param(
            v2("a/b", memory_max=str(512 * MIB), memory_high=str(256 * MIB), memory_current="0"),
            HostLimits(8, 256 * MIB, 256 * MIB),
            id="throttled before its end",
        ),
        pytest.param(
            v2("a/b", memory_max=str(512 * MIB), memory_current=str(500 * MIB))
            | {"a/b/memory.stat": f"anon 1\nactive_file 7\ninactive_file {300 * MIB}\n"},
            HostLimits(8, 512 * MIB, 312 * MIB),
            id="files' content can be dropped",
        ),
        pytest.param(
            v2("a/b", memory_max=str(100 * MIB), memory_current=str(101 * MIB)),
            HostLimits(8, 100 * MIB, 0),
            id="more in use than allowed",
        ),
        pytest.param(v2("a/b", cpu_max="50000 100000"), ONE, id="half a processor"),
        pytest.param(v2("a/b", cpu_max="150000 100000"), ONE, id="one and a half"),
        pytest.param(v2("a/b", cpu_max="6400000 100000"), WHOLE, id="a quota above the affinity"),
        pytest.param(
            v2("a/b", memory_max="", memory_high="-1", memory_current="x", cpu_max="0 0"),
            WHOLE,
            id="odd words",
        ),
        pytest.param(
            v2("a", memory_max=str(512 * MIB), memory_current="0"),
            HostLimits(8, 512 * MIB, 512 * MIB),
            id="its own group cannot be seen",
        ),
        pytest.param(
            v2(".", memory_max=str(512 * MIB), memory_current="0"),
            HostLimits(8, 512 * MIB, 512 * MIB),
            id="the topmost that is seen",
        ),
    ],
)
def test_limits_of_version_2(tmp_path: Path, groups: Tree, expected: HostLimits) -> None:
    assert read(tmp_path, V2, "0::/a/b\n", groups) == expected


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        pytest.param({}, WHOLE, id="nothing can be read"),
        pytest.param(
            {
                "memory/a/b/memory.limit_in_bytes": NO_LIMIT,
                "memory/a/b/memory.stat": f"hierarchical_memory_limit {NO_LIMIT}\n",
                "cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n",
            },
            WHOLE,
            id="no limits",
        ),
        pytest.param(
            {
                "memory/a/b/memory.limit_in_bytes": str(512 * MIB),
                "memory/a/b/memory.usage_in_bytes": str(500 * MIB),
                "memory/a/b/memory.stat": f"inactive_file 1\ntotal_inactive_file {100 * MIB}\n",
                "cpu,cpuacct/a/cpu.cfs_quota_us": "200000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "50000\n",
            },
            HostLimits(4, 512 * MIB, 112 * MIB),
            id="its own memory, a parent's time",
        ),
        pytest.param(
            {
                "memory/a/b/memory.limit_in_bytes": NO_LIMIT,
                "memory/a/b/memory.usage_in_bytes": str(100 * MIB),
                "memory/a/b/memory.stat": f"hierarchical_memory_limit {256 * MIB}\n",
            },
            HostLimits(8, 256 * MIB, 156 * MIB),
            id="of a group above that is not seen",
        ),
    ],
)
def test_limits_of_version_1(tmp_path: Path, groups: Tree, expected: HostLimits) -> None:
    cgroup = "4:memory:/a/b\n3:cpu,cpuacct:/a/b\n1:name=systemd:/a/b\n0::/\n"
    assert read(tmp_path, V1, cgroup, groups) == expected


def test_both_versions_at_once(tmp_path: Path) -> None:
    mounts = V1 + "41 30 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    groups = {
        "memory/a/memory.limit_in_bytes": str(512 * MIB),
        "memory/a/memory.usage_in_bytes": "0",
        "unified/b/cpu.max": "200000 100000\n",
    }
    expected = HostLimits(2, 512 * MIB, 512 * MIB)
    assert read(tmp_path, mounts, "4:memory:/a\n0::/b\n", groups) == expected


@pytest.mark.parametrize(
    ("top", "path"),
    [
        pytest.param("/docker/c0ffee", "/docker/c0ffee", id="the host's names"),
        pytest.param("/", "/", id="a namespace"),
        pytest.param("/..", "/", id="a namespace, mounted outside"),
        pytest.param("/", "/../other", id="a process from outside the namespace"),
        pytest.param("/docker/c0ffee", "/", id="names of different namespaces"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_container_sees_its_own_group_at_the_top(
    tmp_path: Path, top: str, path: str, version: int
) -> None:
    if version == 2:
        mounts = V2.replace(" / /sys", f" {top} /sys")
        cgroup, groups = f"0::{path}\n", v2(".", memory_max=str(256 * MIB), memory_current="0")
    else:
        mounts = V1.replace(" / /sys", f" {top} /sys")
        cgroup, groups = f"4:memory:{path}\n", {"memory/memory.limit_in_bytes": str(256 * MIB)}
    assert read(tmp_path, mounts, cgroup, groups) == HostLimits(8, 256 * MIB, 256 * MIB)


@pytest.mark.parametrize("version", [1, 2])
def test_other_mounts_of_other_groups_are_no_limit(tmp_path: Path, version: int) -> None:
    if version == 2:
        other = "41 23 0:28 /docker/c0ffee /srv/c0ffee rw - cgroup2 cgroup2 rw\n"
        mounts, cgroup = other + V2 + other, "0::/user\n"
        groups = v2("user", memory_max=str(512 * MIB), memory_current="0")
    else:
        other = "41 23 0:29 /docker/c0ffee /srv/c0ffee rw - cgroup cgroup rw,memory\n"
        mounts, cgroup = other + V1 + other, "4:memory:/user\n"
        groups = {"memory/user/memory.limit_in_bytes": str(512 * MIB)}
    for name in ("memory.max", "memory.limit_in_bytes"):
        groups[f"../../../srv/c0ffee/{name}"] = str(64 * MIB)
    limits = read(tmp_path, mounts, cgroup, groups)
    assert limits == HostLimits(8, 512 * MIB, 512 * MIB)


def test_files_that_cannot_be_read_limit_nothing(tmp_path: Path) -> None:
    (tmp_path / "sys/fs/cgroup/memory.max").mkdir(parents=True)
    assert read(tmp_path, V2, "0::/\n", {}) == WHOLE
    assert read(tmp_path, "damaged\n\n1 2 3 - cgroup2\n", "damaged\n:\n", {}) == WHOLE


def test_mount_points_with_spaces_are_read(tmp_path: Path) -> None:
    mounts = "31 23 0:28 / /sys/fs/cgroup/a\\040b rw - cgroup2 cgroup2 rw\n"
    groups = v2("a b/c", memory_max=str(256 * MIB), memory_current="0")
    assert read(tmp_path, mounts, "0::/c\n", groups).memory == 256 * MIB


def test_affinity_limits_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 5})
    groups = v2("a", cpu_max="400000 100000")
    assert read(tmp_path, V2, "0::/a\n", groups).processors == 2


def test_host_without_these_files_has_what_it_has(tmp_path: Path) -> None:
    limits = HostLimits.read(tmp_path)
    assert limits.processors == 8
    assert limits.memory == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert limits.available == 0


def test_budget_is_that_of_the_container(tmp_path: Path) -> None:
    limits = read(
        tmp_path, V2, "0::/a\n", v2("a", memory_max=str(1024 * MIB), cpu_max="200000 100000")
    )
    assert Capacity.of_host(limits) == Capacity(2, 768)


def test_budget_is_that_of_the_configuration(tmp_path: Path) -> None:
    host = Capacity.of_host()
    for section, whole in (
        ({}, host),
        ({"budget_processors": 3}, Capacity(3, host.memory_mib)),
        ({"budget_memory_mib": 77}, Capacity(host.processors, 77)),
    ):
        assert QemuSettings.parse(section, "my.toml").capacity == whole
    for wrong in (0, -1, True, "2", 1.5):
        with pytest.raises(ValueError, match=r"budget_processors in .qemu. of my.toml is"):
            QemuSettings.parse({"budget_processors": wrong}, "my.toml")


def test_this_host_has_room() -> None:
    limits = HostLimits.read()
    assert limits.processors >= 1
    assert limits.memory >= limits.available > 0
