"""Locks between processes, also when one of them is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import PATIENCE_S

from mixchat.base.lock import Busy, exclusive_lock, lock_file, lock_open_file

HOLD = """
import sys
from pathlib import Path
from mixchat.base.lock import exclusive_lock
with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / "tiny"


@pytest.fixture
def holder(target: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def lock_file_of(target: Path) -> Path:
    return target.parent / f".{target.name}.mixchat.lock"


def test_the_lock_is_a_file_beside_the_model_that_is_removed_afterwards(target):
    with exclusive_lock(target):
        assert lock_file_of(target).exists()
        assert not target.exists()
    assert list(target.parent.iterdir()) == []


def test_the_lock_is_released_after_an_error(target):
    with pytest.raises(KeyboardInterrupt), exclusive_lock(target):
        raise KeyboardInterrupt
    with exclusive_lock(target):
        pass


def test_a_second_process_is_busy_while_the_first_holds_the_lock(target, holder):
    with pytest.raises(Busy), exclusive_lock(target):
        pass
    assert lock_file_of(target).exists()


def test_a_process_that_waits_says_so_once_and_continues_when_the_other_has_finished(
    target, holder
):
    calls = []

    def wait():
        calls.append(True)
        assert holder.stdin
        holder.stdin.close()

    with exclusive_lock(target, on_wait=wait):
        assert holder.wait(PATIENCE_S) == 0
        assert lock_file_of(target).exists()
    assert calls == [True]
    assert not lock_file_of(target).exists()


def test_a_process_that_waits_continues_when_the_other_is_killed(target, holder):
    with exclusive_lock(target, on_wait=lambda: holder.send_signal(signal.SIGKILL)):
        assert holder.wait(PATIENCE_S) == -signal.SIGKILL
    assert not lock_file_of(target).exists()


def test_a_file_that_a_killed_process_left_locks_nothing(target):
    target.parent.mkdir(parents=True)
    lock_file_of(target).write_text("")
    with exclusive_lock(target):
        pass
    assert not lock_file_of(target).exists()


def test_a_lock_on_a_file_that_was_removed_is_not_a_lock(target, monkeypatch):
    """Opened before the holder removed it and locked afterwards: two would hold the lock."""
    target.parent.mkdir(parents=True)
    flock, raced = fcntl.flock, []

    def race(fd, how):
        if not raced:
            raced.append(True)
            lock_file_of(target).unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", race)
    with exclusive_lock(target, on_wait=lambda: None):
        assert lock_file_of(target).exists()
        with pytest.raises(Busy), exclusive_lock(target):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_can_still_be_written(target, monkeypatch, number):
    def refuse(fd, how):
        raise OSError(number, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive_lock(target):
        pass
    assert not lock_file_of(target).exists()
    with open(target, "wb") as file:
        assert lock_open_file(file.fileno())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_an_error_of_the_system(target):
    target.parent.mkdir(parents=True)
    target.parent.chmod(0o500)
    with pytest.raises(PermissionError), exclusive_lock(target):
        pass


def test_only_one_of_many_threads_holds_the_lock(target):
    inside, most, done = [0], [0], []

    def work():
        for _ in range(5):
            with exclusive_lock(target, on_wait=lambda: None):
                inside[0] += 1
                most.append(inside[0])
                time.sleep(0.001)
                inside[0] -= 1
        done.append(True)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert (len(done), max(most)) == (6, 1)
    assert list(target.parent.iterdir()) == []


def test_a_process_does_not_wait_longer_than_its_timeout(target, holder):
    """A session that was suspended while it saved made all others wait, without Ctrl-C."""
    with pytest.raises(Busy), lock_file(lock_file_of(target), timeout=0.1):
        pass
    holder.kill()
    holder.wait()
    with exclusive_lock(target):
        pass


def test_an_open_file_has_one_holder_until_it_is_closed(tmp_path):
    with open(tmp_path / "f", "wb") as first, open(tmp_path / "f", "rb") as second:
        assert lock_open_file(first.fileno())
        assert not lock_open_file(second.fileno())
        first.close()
        assert lock_open_file(second.fileno())
