"""What a process reads and opens although strangers' connections take all descriptors."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixchat.base import held_files
from mixchat.base.held_files import read_text


@pytest.fixture
def holding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files are held open, until the end of the test."""
    monkeypatch.setattr(held_files, "_held", {})
    monkeypatch.setattr(held_files, "_holds", True)
    yield
    held_files._forget()


def without_descriptors(before: str, after: str) -> str:
    """Run lines of a program before and after all its 64 descriptors are taken."""
    program = """
        import os, resource
        from pathlib import Path
        from mixchat.base import cgroups, files, machine, system
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        {}
        try:
            while True:
                os.open(os.devnull, os.O_RDONLY)
        except OSError:
            pass
        {}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program).format(before, after)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_free_memory_can_be_asked_without_a_descriptor():
    """`mixchat worker` ended with "/proc/meminfo: Too many open files"."""
    before = "machine.survive_without_descriptors(); whole = machine.total_memory()"
    after = "print(0 < machine.free_memory() <= whole == machine.total_memory())"
    assert without_descriptors(before, after) == "True"


def test_the_limits_of_control_groups_hold_without_a_descriptor(tmp_path):
    """They were taken for none, so that a worker might have outgrown its group."""
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "v2").mkdir()
    mount = f"35 31 0:32 / {tmp_path}/v2 rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
    (tmp_path / "mountinfo").write_text(mount)
    for name, text in (("max", "1000"), ("current", "700"), ("stat", "inactive_file 150")):
        (tmp_path / "v2" / f"memory.{name}").write_text(f"{text}\n")
    ask = f"cgroups.memory_room(Path({str(tmp_path)!r}))"
    before = f"machine.survive_without_descriptors(); first = {ask}"
    assert without_descriptors(before, f"print(first, {ask})") == "450 450"


def test_files_that_are_held_back_can_be_opened_when_all_others_are_taken(tmp_path):
    (tmp_path / "experts").write_text("bytes")
    read = f"files.read_bytes(Path({str(tmp_path / 'experts')!r}))"
    after = f"print(*[{read} for _ in range(3)], resource.getrlimit(resource.RLIMIT_NOFILE))"
    said = without_descriptors("system.hold_back_open_files(1000)", after)
    assert said == "b'bytes' b'bytes' b'bytes' (48, 64)"  # a quarter is held back


def test_a_descriptor_that_a_stranger_took_is_waited_for(tmp_path):
    """The limit is raised for a moment, in which connections are accepted, too."""
    (tmp_path / "experts").write_text("bytes")
    before = "system.hold_back_open_files(1000)"
    after = f"""
import threading, time
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(16)]
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 64))
threading.Timer(0.5, lambda: os.close(taken.pop())).start()
print(files.read_bytes(Path({str(tmp_path / "experts")!r})))
"""
    assert without_descriptors(before, after) == "b'bytes'"


def test_the_files_that_may_still_be_opened_are_counted():
    """One more is open while they are listed."""
    count = "64 - len(os.listdir('/dev/fd'))"
    after = f"os.closerange(40, 50); print(system.open_files_left() == {count})"
    assert without_descriptors("", after) == "True"


@pytest.mark.usefixtures("holding")
def test_a_held_file_is_read_as_it_is_now(tmp_path):
    path = tmp_path / "memory.current"
    for text in ("1\n", "", "200\n", "x" * 200_000, "3\n"):
        path.write_text(text)
        assert read_text(path) == text
    assert len(held_files._held) == 1


@pytest.mark.usefixtures("holding")
def test_a_file_that_took_the_place_of_a_held_one_is_read(tmp_path):
    path, other = tmp_path / "memory.max", tmp_path / "other"
    path.write_text("old")
    assert read_text(path) == "old"
    other.write_text("new")
    other.replace(path)
    assert read_text(path) == "new"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_text(path)


@pytest.mark.usefixtures("holding")
def test_a_forked_process_reads_its_own_files():
    path = Path("/proc/self/stat")
    if not path.exists():
        pytest.skip("only Linux has files of a process")
    assert read_text(path).startswith(f"{os.getpid()} ")
    held_files._forget()  # which a fork calls in the child
    assert read_text(path).startswith(f"{os.getpid()} ")
