"""The source of experts on disk: whatever is put off or cancelled, their bytes are right."""

import errno
import itertools
import math
import os
import shutil
import threading
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from source_tools import EXPERTS, KEYS, A, B, C, digest, load, whole

from mixchat.base.errors import CheckpointError, ResourceError
from mixchat.experts import disk_source
from mixchat.experts.cache import ExpertKey, ExpertStats
from mixchat.experts.disk_source import DiskSource
from mixchat.experts.store import new_block
from mixchat.weights.format.installed_model import InstalledModel

pytestmark = pytest.mark.usefixtures("small_steps")


def test_all_ways_from_disk_read_the_same_bytes(directory, truth, monkeypatch):
    ways: Counter[tuple[bool, bool]] = Counter()
    read = InstalledModel.read_expert

    def noted(self, *args, direct=False):
        ways[direct, any(args[2].data_ptr() == one.data_ptr() for one in source._stages)] += 1
        read(self, *args, direct=direct)

    monkeypatch.setattr(InstalledModel, "read_expert", noted)
    with InstalledModel(directory) as installed:
        source = DiskSource(installed, ExpertStats(), choose=True)
        for _ in range(4):
            for key in KEYS:
                assert load(source, key, installed.blueprint.expert.stride) == truth[key]
        # They take turns.
        assert ways[False, False] >= 4
        if installed.open_direct():
            assert ways[True, False] >= 4 <= ways[True, True]


def test_without_a_choice_it_reads_through_the_page_cache(installed, monkeypatch, truth):
    monkeypatch.setattr(installed, "open_direct", lambda: pytest.fail("not asked for"))
    source = DiskSource(installed, ExpertStats(), choose=False)
    assert load(source, B, installed.blueprint.expert.stride) == truth[B]


def test_where_the_system_cannot_read_past_the_page_cache_it_reads_through_it(
    directory, truth, monkeypatch
):
    opened = os.open

    def refused(path, flags, *args):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *args)

    monkeypatch.setattr(os, "open", refused)
    with InstalledModel(directory) as installed:
        source = DiskSource(installed, ExpertStats(), choose=True)
        for key in KEYS:
            assert load(source, key, installed.blueprint.expert.stride) == truth[key]


def test_bytes_that_are_read_and_the_time_are_counted(directory, monkeypatch):
    monkeypatch.setattr(disk_source, "STEP", 3 * 4096)  # an expert's last read is shorter
    times = itertools.count()
    monkeypatch.setattr(disk_source.time, "perf_counter", lambda: float(next(times)))
    for choose in (False, True):
        with InstalledModel(directory) as installed:
            stats, size = ExpertStats(), installed.blueprint.expert.stride
            source = DiskSource(installed, stats, choose=choose)
            for key in (A, B, C):
                load(source, key, size)
            assert stats.bytes_read == 3 * size
            assert stats.read_seconds == 3 * (1 + math.ceil(size / disk_source.STEP))


def test_it_reads_in_steps(installed, monkeypatch):
    monkeypatch.setattr(disk_source, "AT_ONCE", 1)
    right = whole(installed, C)
    block = torch.full_like(right, 0xEE)
    steps = DiskSource(installed, ExpertStats(), choose=False).load(C, block)
    assert len(block) >= 2 * 4096
    for done in range(4096, len(block) + 1, 4096):
        next(steps)
        assert torch.equal(block[:done], right[:done])
        assert bool((block[done:] == 0xEE).all())
    assert next(steps, "there") == "there"


def test_where_no_thread_can_be_started_reads_that_wait_for_one_end_too(
    installed, truth, monkeypatch
):
    """They were waited for without an end."""

    class Full:
        reads: ClassVar[list[Future[int]]] = []

        def submit(self, *_):
            if len(self.reads) == 2:
                raise RuntimeError("can't start new thread")
            self.reads.append(Future())
            return self.reads[-1]

        def shutdown(self, **_):
            for read in self.reads:
                read.cancel()

    source = DiskSource(installed, ExpertStats(), choose=False)
    readers: Any = Full()
    monkeypatch.setattr(source._readers, "_threads", readers)
    with pytest.raises(ResourceError, match="cannot start a thread"):
        load(source, A, installed.blueprint.expert.stride)
    assert load(source, B, installed.blueprint.expert.stride) == truth[B]


@pytest.mark.parametrize("resumes", [False, True])
def test_reads_of_a_load_that_was_put_off_never_fill_the_slot_of_another_expert(
    directory, truth, monkeypatch, resumes
):
    """A prefetch that is put off and cancelled leaves its slot to an expert that is requested,
    and that one is read first: the reads that were in flight must not come behind its own. They
    did where the prefetch had been put off before, and had resumed."""
    read = InstalledModel.read_expert

    def slow(self, *given, **how):
        layer, expert, _, start = given
        if (layer, expert) == A and start:
            threading.Event().wait(0.3)
        read(self, *given, **how)

    monkeypatch.setattr(InstalledModel, "read_expert", slow)
    with InstalledModel(directory) as installed:
        source = DiskSource(installed, ExpertStats(), choose=True)
        block, other = (new_block(installed.blueprint.expert.stride) for _ in range(2))
        put_off = source.load(A, block)
        next(put_off)
        if resumes:
            for _ in source.load(C, other):
                pass
            next(put_off)
        for _ in source.load(B, block):
            pass
        put_off.close()
        assert digest(block) == truth[B]


@pytest.mark.parametrize("choose", [True, False])
@pytest.mark.parametrize("missing", [1, 4096, 5000])
def test_a_file_cut_short_after_it_was_opened_is_named(directory, tmp_path, choose, missing):
    copy = Path(shutil.copytree(directory, tmp_path / "installed"))
    with InstalledModel(copy) as installed:
        size = installed.blueprint.expert.stride
        source = DiskSource(installed, ExpertStats(), choose=choose)
        file = copy / "experts-002.safetensors"
        os.truncate(file, file.stat().st_size - missing)
        load(source, ExpertKey(2, EXPERTS - 2), size)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"experts-002\.safetensors: cut short"):
                load(source, ExpertKey(2, EXPERTS - 1), size)
        load(source, A, size)


@pytest.mark.parametrize("choose", [True, False])
def test_a_read_error_is_raised_with_the_files_name(directory, choose, monkeypatch):
    def broken(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with InstalledModel(directory) as installed:
        size = installed.blueprint.expert.stride
        source = DiskSource(installed, ExpertStats(), choose=choose)
        monkeypatch.setattr(os, "preadv", broken)
        said = r"experts-001\.safetensors: cannot be read \(Input/output error\)"
        with pytest.raises(CheckpointError, match=said):
            load(source, ExpertKey(1, 0), size)
        monkeypatch.undo()
        load(source, ExpertKey(1, 0), size)
