from pathlib import Path

import pytest

from mixchat import machine


def cgroup(directory: Path, limit: str) -> Path:
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text("700\n")
    (directory / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    return directory


def test_a_containers_limit_counts_and_files_read_before_do_not(tmp_path: Path) -> None:
    assert machine.cgroup_room(cgroup(tmp_path, "1000")) == 450
    assert machine.cgroup_room(cgroup(tmp_path, "500")) == 0


def test_no_limit_is_none(tmp_path: Path) -> None:
    assert machine.cgroup_room(cgroup(tmp_path, "max")) is None
    assert machine.cgroup_room(tmp_path / "elsewhere") is None


def test_free_memory_is_what_both_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    whole = machine.free_memory()
    assert whole > 10**8
    cgroup(tmp_path, "1000")
    assert machine.free_memory() == 450


def test_a_directory_that_is_not_there_yet_is_on_the_disk_of_the_one_above(tmp_path: Path) -> None:
    below = tmp_path / "not" / "yet"
    assert machine.existing(below) == tmp_path == machine.existing(tmp_path)
    assert machine.same_disk(below, tmp_path)
    assert machine.free_disk(below) > 0
    assert not machine.same_disk(below, Path("/proc"))


def test_the_disk_that_files_take_is_without_their_holes(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "full").write_bytes(b"x" * 100_000)
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(10**9)
    (tmp_path / "link").symlink_to("/proc/self/exe")
    assert 100_000 <= machine.disk_usage(tmp_path) < 200_000
    assert machine.disk_usage(tmp_path / "nowhere") == 0
