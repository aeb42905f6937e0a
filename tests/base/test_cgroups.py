"""Limits of control groups, read out of trees that look as those of Linux do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixchat.base import cgroups

UNLIMITED = 9223372036854771712  # as version 1 says it
Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Make a process's directory: its groups, what is mounted, and the files of the groups."""

    def make(groups: str, mounts: dict[str, str], files: dict[str, str]) -> Path:
        process = tmp_path / "proc"
        process.mkdir()
        (process / "cgroup").write_text(groups)
        lines = ["22 27 0:21 / /proc rw,relatime shared:5 - proc proc rw"]
        for place, what in mounts.items():
            root, _, point = place.rpartition(" ")
            point = f"{tmp_path}/{point}".replace(" ", r"\040")
            (tmp_path / place.rpartition(" ")[2]).mkdir(parents=True)
            lines.append(f"35 31 0:32 {root or '/'} {point} rw,relatime shared:9 - {what}")
        (process / "mountinfo").write_text("\n".join(lines) + "\n")
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return process

    return make


def version_1(group: str, limit: int, used: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"{group}/memory.limit_in_bytes": str(limit),
        f"{group}/memory.usage_in_bytes": str(used),
        f"{group}/memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}",
    }


def version_2(group: str, limit: str, used: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"{group}/memory.max": limit,
        f"{group}/memory.current": str(used),
        f"{group}/memory.stat": f"anon 5\ninactive_file {inactive}",
    }


V2 = {"v2": "cgroup2 cgroup2 rw"}
V1 = {"memory": "cgroup cgroup rw,memory"}
# The groups of a process, what is mounted, and files of groups; the room and the limit of memory.
TREES: dict[str, Any] = {
    "cached files do not count": ("0::/", V2, version_2("v2", "1000", 700, 150), 450, 1000),
    "more is used than allowed": ("0::/", V2, version_2("v2", "500", 700, 150), 0, 500),
    "no limit": ("0::/a", V2, version_2("v2/a", "max", 700), None, None),
    # systemd-run and SLURM limit a group above, or below, the one that is mounted: a program that
    # looked at the mounted one alone was killed.
    "the tightest of all levels": (
        "0::/slice/job/step",
        V2,
        {
            **version_2("v2/slice", "10000", 9900, 100),  # 200 left
            **version_2("v2/slice/job", "5000", 4000),  # 1000 left
            **version_2("v2/slice/job/step", "max", 3000),
        },
        200,
        5000,
    ),
    "a limit that only slows a process down": (
        "0::/a",
        V2,
        {**version_2("v2/a", "5000", 1000), "v2/a/memory.high": "3000"},
        2000,
        3000,
    ),
    "version 1 with groups below": (
        "4:memory:/job/step\n3:cpu,cpuacct:/elsewhere\n1:name=systemd:/x",
        V1 | {"cpu": "cgroup cgroup rw,cpu,cpuacct"},
        {
            **version_1("memory", UNLIMITED, 10**9),
            **version_1("memory/job", 5000, 4000, 300),
            **version_1("memory/job/step", UNLIMITED, 3000),
        },
        1300,
        5000,
    ),
    "both versions at once": (
        "4:memory:/a\n0::/b",
        V1 | {"unified": "cgroup2 cgroup2 rw"},
        {**version_1("memory/a", 5000, 4000), **version_2("unified/b", "900", 100)},
        800,
        900,
    ),
    "a container in which the host's path leads nowhere": (
        "4:memory:/docker/1234",
        {"/docker/1234 memory": "cgroup cgroup rw,memory"},
        version_1("memory", 5000, 4000),
        1000,
        5000,
    ),
    **{
        f"{path} is not mounted": (f"0::{path}", V2, version_2("v2", "1000", 700), 300, 1000)
        for path in ("/not/there", "/../other", "/")
    },
    "nothing is mounted": ("4:memory:/a\n0::/a", {}, {}, None, None),
}


@pytest.mark.parametrize(("groups", "mounts", "files", "room", "limit"), TREES.values(), ids=TREES)
def test_memory_has_the_tightest_limit_of_its_groups(tree, groups, mounts, files, room, limit):
    process = tree(f"{groups}\n", mounts, files)
    assert (cgroups.memory_room(process), cgroups.memory_limit(process)) == (room, limit)


def test_a_group_of_another_name_with_the_same_beginning_is_not_below(tree):
    process = tree(
        "0::/job10\n", {"/job1 v2": "cgroup2 cgroup2 rw"}, version_2("v2/0", "1000", 700)
    )
    assert next(iter(cgroups.groups(process, cgroups.VERSION_2))).name == "v2"


def test_a_mount_point_may_have_a_space_in_its_name(tree, tmp_path):
    process = tree("0::/\n", {}, version_2("the groups", "1000", 700))
    point = f"{tmp_path}/the\\040groups"
    (process / "mountinfo").write_text(f"35 31 0:32 / {point} rw - cgroup2 cgroup2 rw\n")
    assert cgroups.memory_room(process) == 300


def test_what_cannot_be_read_is_no_limit(tree, tmp_path):
    process = tree("4:memory:/a\n0::/a\n", {}, {})
    (process / "mountinfo").write_text("garbage\n\n")
    assert cgroups.memory_room(process) is None
    assert cgroups.memory_room(tmp_path / "no such process") is None


SHARES: list[Any] = [
    *(
        ("0::/", V2, {"v2/cpu.max": content}, cores)
        for content, cores in (
            *(("max 100000", None), ("200000 100000", 2), ("150000 100000", 2)),
            *(("5000 100000", 1), ("", None), ("x y", None), ("1 0", None)),
        )
    ),
    (  # the tightest of all levels
        "0::/a/b",
        V2,
        {
            "v2/cpu.max": "max 100000",
            "v2/a/cpu.max": "100000 100000",
            "v2/a/b/cpu.max": "300000 100000",
        },
        1,
    ),
    *(  # version 1
        (
            "3:cpu,cpuacct:/a",
            {"cpu": "cgroup cgroup rw,cpu,cpuacct"},
            {"cpu/a/cpu.cfs_quota_us": quota, "cpu/a/cpu.cfs_period_us": "100000"},
            cores,
        )
        for quota, cores in (("150000", 2), ("-1", None))
    ),
]


@pytest.mark.parametrize(("groups", "mounts", "files", "cores"), SHARES)
def test_a_share_of_time_counts_as_cores(tree, groups, mounts, files, cores):
    assert cgroups.cores(tree(f"{groups}\n", mounts, files)) == cores


def test_this_machine_can_be_asked():
    for number in (cgroups.memory_limit(), cgroups.memory_room(), cgroups.cores()):
        assert number is None or number > 0
