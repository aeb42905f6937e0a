from pathlib import Path

import pytest
import torch

from mixchat.experts import memory


def cgroup(directory: Path, limit: str) -> Path:
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text("700\n")
    (directory / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    return directory


def test_a_containers_limit_counts_and_files_read_before_do_not(tmp_path: Path) -> None:
    assert memory.cgroup_room(cgroup(tmp_path, "1000")) == 450
    assert memory.cgroup_room(cgroup(tmp_path, "500")) == 0


def test_no_limit_is_none(tmp_path: Path) -> None:
    assert memory.cgroup_room(cgroup(tmp_path, "max")) is None
    assert memory.cgroup_room(tmp_path / "elsewhere") is None


def test_free_memory_is_what_both_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    whole = memory.free_memory(torch.device("cpu"))
    assert whole > 10**8
    cgroup(tmp_path, "1000")
    assert memory.free_memory(torch.device("cpu")) == 450
