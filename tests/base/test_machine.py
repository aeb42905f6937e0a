import os
import platform
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mixchat.base import cgroups, machine


@pytest.fixture
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing limits this process."""
    for name in ("memory_room", "memory_limit", "cores"):
        monkeypatch.setattr(cgroups, name, lambda: None)
    unlimited = (psutil.RLIM_INFINITY, 0)
    monkeypatch.setattr(psutil.Process, "rlimit", lambda process, kind: unlimited)


@pytest.mark.usefixtures("no_limits")
def test_free_memory_is_within_the_machine_and_its_control_group(monkeypatch):
    whole = machine.free_memory()
    assert whole > 10**8
    assert machine.tightest_memory_limit() is None
    monkeypatch.setattr(cgroups, "memory_room", lambda: 450)
    assert (machine.free_memory(), machine.tightest_memory_limit()) == (450, "control group")
    monkeypatch.setattr(cgroups, "memory_room", lambda: 10**18)
    assert machine.free_memory() > 10**8
    assert machine.tightest_memory_limit() is None


@pytest.mark.usefixtures("no_limits")
@pytest.mark.parametrize(
    ("kind", "name", "left"),
    [("RLIMIT_AS", "ulimit -v", 700), ("RLIMIT_DATA", "ulimit -d", 900)],
)
def test_a_ulimit_leaves_what_the_process_has_not_used(monkeypatch, kind, name, left):
    """Under `ulimit -v` mixchat planned with all of the machine's memory, and failed."""
    limits, unlimited = {getattr(psutil, kind): (1000, 2000)}, (psutil.RLIM_INFINITY, 0)
    used = SimpleNamespace(vms=300, data=100)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda process: used)
    monkeypatch.setattr(psutil.Process, "rlimit", lambda process, kind: limits.get(kind, unlimited))
    assert (machine.free_memory(), machine.tightest_memory_limit()) == (left, name)
    used.vms = used.data = 3000
    assert machine.free_memory() == 0
    monkeypatch.delattr(psutil, "RLIMIT_AS")  # as on macOS
    assert machine.tightest_memory_limit() is None


def test_a_missing_directory_is_on_the_disk_of_the_one_above(tmp_path):
    below = tmp_path / "not" / "yet"
    assert machine.nearest_existing(below) == tmp_path == machine.nearest_existing(tmp_path)
    assert machine.same_disk(below, tmp_path)
    assert machine.free_disk(below) > 0
    assert not machine.same_disk(below, Path("/proc"))


def test_the_disk_usage_of_files_excludes_holes(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "full").write_bytes(b"x" * 100_000)
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(10**9)
    (tmp_path / "link").symlink_to("/proc/self/exe")
    assert 100_000 <= machine.disk_usage(tmp_path) < 200_000
    assert machine.disk_usage(tmp_path / "nowhere") == 0


def test_the_processor_is_named_as_the_system_names_it(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU: 9000 @ 3 GHz\nprocessor\t: 1\n")
    monkeypatch.setattr(machine, "_CPU_INFO", info)
    assert machine.cpu_name() == "Some CPU: 9000 @ 3 GHz"


@pytest.mark.parametrize("text", [None, "", "model name\t:\n", "CPU part\t: 0xd0c\n"])
def test_a_processor_without_a_name_is_named_by_its_architecture(tmp_path, monkeypatch, text):
    info = tmp_path / "cpuinfo"
    if text is not None:
        info.write_text(text)
    monkeypatch.setattr(machine, "_CPU_INFO", info)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert machine.cpu_name() == "aarch64"


@pytest.mark.usefixtures("no_limits")
def test_cores_outside_of_affinity_and_quota_do_not_count(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert machine.usable_cores() == 3
    monkeypatch.setattr(cgroups, "cores", lambda: 2)
    assert machine.usable_cores() == 2
    monkeypatch.setattr(cgroups, "cores", lambda: 9)
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    assert machine.usable_cores() == 5


@pytest.mark.usefixtures("no_limits")
def test_total_memory_is_within_the_container(monkeypatch):
    whole = machine.total_memory()
    assert machine.free_memory() < whole
    monkeypatch.setattr(cgroups, "memory_limit", lambda: 10**18)
    assert machine.total_memory() == whole
    monkeypatch.setattr(cgroups, "memory_limit", lambda: 1000)
    assert machine.total_memory() == 1000


def test_the_cores_that_other_programs_take_are_told_from_our_own(monkeypatch):
    names = "user nice system idle iowait irq softirq steal guest guest_nice"
    LinuxTimes = namedtuple("LinuxTimes", names)  # as psutil has them
    counted, own = LinuxTimes(100, 0, 10, 1000, 20, 0, 0, 0, 60, 0), 5.0
    monkeypatch.setattr(psutil, "cpu_times", lambda: counted)
    monkeypatch.setattr(machine.time, "process_time", lambda: own)
    others = machine.OtherPrograms()
    counted, own = LinuxTimes(106, 0, 11, 1008, 22, 0, 0, 3, 66, 0), 9.0
    assert others.share() == pytest.approx(0.3)  # 10 of 20 s, of which 4 are ours


def test_the_cores_that_other_programs_take_are_seen_on_macos_too(monkeypatch):
    """A busy machine without /proc/stat counted as idle."""
    MacTimes = namedtuple("MacTimes", "user nice system idle")
    counted = MacTimes(100.0, 0.0, 10.0, 1000.0)
    monkeypatch.setattr(psutil, "cpu_times", lambda: counted)
    monkeypatch.setattr(machine.time, "process_time", lambda: 1.0)
    others = machine.OtherPrograms()
    counted = MacTimes(108.0, 0.0, 11.0, 1001.0)
    assert others.share() == pytest.approx(0.9)


def test_a_system_without_counts_of_its_cores_counts_as_idle(monkeypatch):
    def refuse():
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr(psutil, "cpu_times", refuse)
    assert machine.OtherPrograms().share() == 0


@pytest.mark.usefixtures("no_limits")
def test_free_memory_is_asked_of_the_system_also_without_proc(monkeypatch):
    """On macOS half of all memory counted as free, whatever else ran."""
    Memory = namedtuple("Memory", "total available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(16 * 10**9, 11 * 10**9))
    assert machine.free_memory() == 11 * 10**9
    assert machine.total_memory() == 16 * 10**9


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps as much")
def test_freed_memory_goes_back_to_the_system():
    """After a model was closed, 430 MB of it still counted as used."""

    def used():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 10**5  # bytes: too small to be mapped for itself
    blocks = [b"x" * size for _ in range(2000)]
    between = blocks[::20]
    del blocks
    before = used()
    machine.return_freed_memory()
    assert used() < before - 1000 * size
    assert len(between) == 100
