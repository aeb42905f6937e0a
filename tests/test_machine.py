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


def test_the_processor_is_called_what_it_calls_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU: 9000 @ 3 GHz\nprocessor\t: 1\n")
    monkeypatch.setattr(machine, "_CPU_INFO", info)
    assert machine.cpu_name() == "Some CPU: 9000 @ 3 GHz"


@pytest.mark.parametrize("text", [None, "", "model name\t:\n", "CPU part\t: 0xd0c\n"])
def test_a_processor_without_a_name_is_called_by_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    info = tmp_path / "cpuinfo"
    if text is not None:
        info.write_text(text)
    monkeypatch.setattr(machine, "_CPU_INFO", info)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert machine.cpu_name() == "aarch64"


def test_cores_that_are_taken_away_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cgroup_cores", lambda directory: None)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert machine.usable_cores() == 3
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    assert machine.usable_cores() == 5


def test_memory_in_all_is_what_a_container_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    whole = machine.total_memory()
    assert machine.free_memory() < whole
    cgroup(tmp_path, "max")
    assert machine.total_memory() == whole
    cgroup(tmp_path, "1000")
    assert machine.total_memory() == 1000


@pytest.mark.parametrize(
    ("content", "cores"),
    [("max 100000\n", None), ("200000 100000\n", 2), ("150000 100000\n", 2), ("5000 100000", 1)],
)
def test_a_container_s_share_of_time_counts_as_cores(
    tmp_path: Path, content: str, cores: int | None
) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert machine.cgroup_cores(tmp_path) == cores


@pytest.mark.parametrize("content", [None, "", "x y", "1 0"])
def test_a_share_that_cannot_be_read_is_no_limit(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "cpu.max").write_text(content)
    assert machine.cgroup_cores(tmp_path) is None
