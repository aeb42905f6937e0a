"""Measuring a disk: how much is written and read, in the faster way, and nothing stays behind."""

import errno
import math
import os
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from other_system import F_NOCACHE
from patience import PATIENCE_S

from mixchat.base import machine, system
from mixchat.planning import disk_speed
from mixchat.planning.disk_speed import DiskRates, measure_disk

BLOCK, SIZE, SECONDS = 12_288, 1_000_000, 0.01


def work() -> None:
    """Compute nothing for a moment, while the disk is read."""
    time.sleep(0.0001)


def measured(directory: Path) -> DiskRates | None:
    return measure_disk(directory, BLOCK, SIZE, work, SECONDS)


def open_below(directory: Path) -> list[str]:
    """Files below the directory, named or not, that this process has open."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:  # the listing's own
            continue
    return [link for link in links if link.startswith(str(directory))]


def test_a_disk_is_measured_and_nothing_stays_behind(tmp_path):
    result = measured(tmp_path / "not there yet")
    assert result is not None
    assert all(1e5 < bandwidth < 1e12 for bandwidth in result)
    assert list(tmp_path.iterdir()) == open_below(tmp_path) == []


def test_the_disk_is_read_while_the_main_thread_computes_and_while_it_does_not(
    tmp_path, monkeypatch
):
    preadv, readers, workers = os.preadv, set(), set()
    working = threading.Event()

    def read(fd, buffers, offset):
        wait_in_a_thread(working)
        readers.add(threading.get_ident())
        return preadv(fd, buffers, offset)

    def compute():
        workers.add(threading.get_ident())
        working.set()

    monkeypatch.setattr(os, "preadv", read)
    measure_disk(tmp_path, BLOCK, SIZE, compute, SECONDS)
    assert workers == {threading.get_ident()}
    assert len(readers) > 1
    assert readers > workers


def wait_in_a_thread(event: threading.Event) -> None:
    """Wait for it, unless this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        assert event.wait(PATIENCE_S)


def spy_on_writing(monkeypatch: pytest.MonkeyPatch, largest: int = 2**30) -> list[int]:
    written: list[int] = []
    write = os.write

    def spy(fd: int, data: memoryview) -> int:
        written.append(write(fd, data[:largest]))
        return written[-1]

    monkeypatch.setattr(os, "write", spy)
    return written


@pytest.mark.parametrize(
    ("free", "size"),
    [(10**12, SIZE), (3_000_000, 300_000), (10 * BLOCK, BLOCK), (10 * BLOCK - 1, 0)],
)
def test_the_file_takes_a_tenth_of_the_free_disk_at_most(tmp_path, monkeypatch, free, size):
    """Where that has no room for an expert, nothing is written and nothing is measured."""
    monkeypatch.setattr(machine, "free_disk", lambda directory: free)
    written = spy_on_writing(monkeypatch)
    assert (measured(tmp_path) is not None) == bool(size)
    assert sum(written) == size


def test_a_place_that_cannot_be_written_to_is_not_measured(monkeypatch):
    monkeypatch.setattr(machine, "free_disk", lambda directory: 10**12)
    assert measured(Path("/proc")) is None


def use_macos(monkeypatch, control):
    monkeypatch.setattr(system, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(system, "fcntl", SimpleNamespace(F_NOCACHE=F_NOCACHE, fcntl=control))


def test_on_macos_the_disk_is_written_and_read_past_the_page_cache(tmp_path, monkeypatch):
    """A disk on macOS was never measured, because it has no posix_fadvise."""
    uncached = set[int]()
    monkeypatch.delattr(os, "posix_fadvise")

    def control(fd, command, value):
        assert (command, value) == (F_NOCACHE, 1)
        uncached.add(fd)
        return 0

    touched: list[int] = []
    preadv, write = os.preadv, os.write
    use_macos(monkeypatch, control)
    monkeypatch.setattr(os, "preadv", lambda fd, *rest: (touched.append(fd), preadv(fd, *rest))[1])
    monkeypatch.setattr(os, "write", lambda fd, data: (touched.append(fd), write(fd, data))[1])
    result = measured(tmp_path)
    assert result is not None
    assert all(1e5 < bandwidth < 1e12 for bandwidth in result)
    assert touched
    assert set(touched) <= uncached


def test_a_system_on_which_the_page_cache_cannot_be_passed_is_not_measured(tmp_path, monkeypatch):
    def control(fd, command, value):
        raise OSError(errno.EINVAL, "Invalid argument")

    use_macos(monkeypatch, control)
    assert measured(tmp_path) is None


@pytest.mark.parametrize(("until", "reads"), [(0.0, 2), (10.0, 4), (math.inf, 6)])
def test_a_busy_disk_is_read_no_longer_than_it_may_take(tmp_path, monkeypatch, until, reads):
    """A disk that other programs read, too, was tried in all ways, however long a block took."""
    clock = SimpleNamespace(now=0.0)

    def perf_counter():
        clock.now += 1e-6
        return float(clock.now)

    def read_in_3_s(fd, start, target):
        clock.now += 3
        return len(target)

    clock.perf_counter = perf_counter
    monkeypatch.setattr(disk_speed, "time", clock)
    monkeypatch.setattr(disk_speed, "read_all", read_in_3_s)
    result = measure_disk(tmp_path, BLOCK, SIZE, work, 1.0, until)
    assert result.idle == pytest.approx(BLOCK / 3)
    assert round(clock.now) == 3 * reads


def test_a_slow_disk_is_measured_with_less_than_an_expert(tmp_path, monkeypatch):
    written = spy_on_writing(monkeypatch, largest=4096)
    monkeypatch.setattr(os, "fsync", lambda fd: time.sleep(0.05))
    assert measured(tmp_path) is not None
    assert sum(written) == 4096 < BLOCK


def test_experts_of_an_installed_model_are_read_each_before_one_is_again(tmp_path, monkeypatch):
    """Bytes just written are still in the cache of a machine's host: a disk seemed as fast."""
    for layer in range(2):
        (tmp_path / f"experts-{layer:03d}.safetensors").write_bytes(os.urandom(20 * BLOCK))
    written, preadv = spy_on_writing(monkeypatch), os.preadv
    read: list[tuple[str, int]] = []

    def spy(fd, buffers, offset):
        read.append((os.readlink(f"/proc/self/fd/{fd}"), offset))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", spy)
    assert measured(tmp_path) is not None
    assert written == []
    whole = [place for place in read if place[1] % BLOCK == 0][1:]  # first a try past the cache
    # Blocks that are read together may be read in any order.
    counts = Counter(whole)
    assert len(counts) == 40
    assert max(counts.values()) - min(counts.values()) <= 1
    assert {Path(name).name for name, _ in whole} == {
        "experts-000.safetensors",
        "experts-001.safetensors",
    }


def test_ctrl_c_while_the_disk_is_read_leaves_nothing(tmp_path, monkeypatch):
    preadv, threads = os.preadv, set(threading.enumerate())
    computing = threading.Event()
    found: list[str] = []

    def read(fd, buffers, offset):
        wait_in_a_thread(computing)  # or all is read before anything is computed
        return preadv(fd, buffers, offset)

    def interrupted():
        computing.set()
        found.extend(open_below(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "preadv", read)
    with pytest.raises(KeyboardInterrupt):
        measure_disk(tmp_path, BLOCK, SIZE, interrupted, SECONDS)
    assert len(found) == 1
    assert list(tmp_path.iterdir()) == open_below(tmp_path) == []
    assert not set(threading.enumerate()) - threads
