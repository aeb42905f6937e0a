"""Limits of control groups, read out of trees that look as those of Linux do."""

from collections.abc import Callable
from pathlib import Path

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


def test_the_limit_of_a_container_counts_and_cached_files_do_not(tree):
    process = tree("0::/\n", {"v2": "cgroup2 cgroup2 rw"}, version_2("v2", "1000", 700, 150))
    assert cgroups.memory_room(process) == 450
    assert cgroups.memory_limit(process) == 1000


def test_more_memory_used_than_allowed_leaves_none(tree):
    process = tree("0::/\n", {"v2": "cgroup2 cgroup2 rw"}, version_2("v2", "500", 700, 150))
    assert cgroups.memory_room(process) == 0


def test_no_limit_is_none(tree, tmp_path):
    process = tree("0::/a\n", {"v2": "cgroup2 cgroup2 rw"}, version_2("v2/a", "max", 700))
    assert cgroups.memory_room(process) is None
    assert cgroups.memory_limit(process) is None
    assert cgroups.memory_room(tmp_path / "no such process") is None


def test_the_tightest_limit_of_all_levels_wins(tree):
    """systemd-run and SLURM limit a group above, or below, the one that is mounted: a program that
    looked at the mounted one alone was killed."""
    files = {
        **version_2("v2/slice", "10000", 9900, 100),  # 200 left
        **version_2("v2/slice/job", "5000", 4000),  # 1000 left
        **version_2("v2/slice/job/step", "max", 3000),
    }
    process = tree("0::/slice/job/step\n", {"v2": "cgroup2 cgroup2 rw"}, files)
    assert cgroups.memory_room(process) == 200
    assert cgroups.memory_limit(process) == 5000


def test_a_limit_that_only_slows_a_process_down_counts(tree):
    files = {**version_2("v2/a", "5000", 1000), "v2/a/memory.high": "3000"}
    process = tree("0::/a\n", {"v2": "cgroup2 cgroup2 rw"}, files)
    assert (cgroups.memory_room(process), cgroups.memory_limit(process)) == (2000, 3000)


def test_version_1_counts_the_groups_below_too(tree):
    files = {
        **version_1("memory", UNLIMITED, 10**9),
        **version_1("memory/job", 5000, 4000, 300),
        **version_1("memory/job/step", UNLIMITED, 3000),
    }
    process = tree(
        "4:memory:/job/step\n3:cpu,cpuacct:/elsewhere\n1:name=systemd:/x\n",
        {"memory": "cgroup cgroup rw,memory", "cpu": "cgroup cgroup rw,cpu,cpuacct"},
        files,
    )
    assert (cgroups.memory_room(process), cgroups.memory_limit(process)) == (1300, 5000)


def test_both_versions_at_once_count_together(tree):
    files = {**version_1("memory/a", 5000, 4000), **version_2("unified/b", "900", 100)}
    process = tree(
        "4:memory:/a\n0::/b\n",
        {"memory": "cgroup cgroup rw,memory", "unified": "cgroup2 cgroup2 rw"},
        files,
    )
    assert (cgroups.memory_room(process), cgroups.memory_limit(process)) == (800, 900)


def test_a_container_sees_its_own_group_where_the_host_s_path_leads_nowhere(tree):
    process = tree(
        "4:memory:/docker/1234\n",
        {"/docker/1234 memory": "cgroup cgroup rw,memory"},
        version_1("memory", 5000, 4000),
    )
    assert cgroups.memory_room(process) == 1000


@pytest.mark.parametrize("path", ["/not/there", "/../other", "/"])
def test_a_path_that_is_not_mounted_falls_back_to_what_is(tree, path):
    process = tree(f"0::{path}\n", {"v2": "cgroup2 cgroup2 rw"}, version_2("v2", "1000", 700))
    assert cgroups.memory_room(process) == 300


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


def test_missing_mounts_are_no_limit(tree):
    process = tree("4:memory:/a\n0::/a\n", {}, {})
    assert cgroups.memory_room(process) is None
    (process / "mountinfo").write_text("garbage\n\n")
    assert cgroups.memory_room(process) is None


@pytest.mark.parametrize(
    ("content", "cores"),
    [
        ("max 100000", None),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("5000 100000", 1),
        ("", None),
        ("x y", None),
        ("1 0", None),
    ],
)
def test_a_share_of_time_counts_as_cores(tree, content, cores):
    process = tree("0::/\n", {"v2": "cgroup2 cgroup2 rw"}, {"v2/cpu.max": content})
    assert cgroups.cores(process) == cores


def test_the_tightest_share_of_all_levels_wins(tree):
    files = {"v2/cpu.max": "max 100000", "v2/a/cpu.max": "100000 100000"}
    files["v2/a/b/cpu.max"] = "300000 100000"
    process = tree("0::/a/b\n", {"v2": "cgroup2 cgroup2 rw"}, files)
    assert cgroups.cores(process) == 1


@pytest.mark.parametrize(("quota", "cores"), [("150000", 2), ("-1", None)])
def test_version_1_has_quota_and_period_each_in_a_file(tree, quota, cores):
    files = {"cpu/a/cpu.cfs_quota_us": quota, "cpu/a/cpu.cfs_period_us": "100000"}
    process = tree("3:cpu,cpuacct:/a\n", {"cpu": "cgroup cgroup rw,cpu,cpuacct"}, files)
    assert cgroups.cores(process) == cores


def test_this_machine_can_be_asked():
    for number in (cgroups.memory_limit(), cgroups.memory_room(), cgroups.cores()):
        assert number is None or number > 0
