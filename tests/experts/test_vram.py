"""Experts in the memory of a GPU on paper: their order on streams, failures, and memory."""

import gc
import threading
from collections.abc import Iterator

import paper_gpu
import pytest
import torch
from paper_runtime import PaperRuntime
from patience import wait_until
from vram_doubles import GPU, KEYS, SIZE, STAGE, Memories, bytes_of, content, filled, quiet, settle

from mixchat.base.errors import ResourceError
from mixchat.experts import vram as vram_module

A, B, C, D = KEYS[:4]
E, F = KEYS[4:6]


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[PaperRuntime]:
    monkeypatch.setattr(vram_module, "_STAGE_BYTES", STAGE)
    with paper_gpu.in_place_of_cuda() as runtime:
        yield runtime


@pytest.fixture
def memories() -> Iterator[Memories]:
    memories = Memories()
    yield memories
    memories.go.set()


def test_the_first_guests_do_not_wait_for_what_the_gpu_is_given_meanwhile(paper, memories):
    """They waited for all experts that the GPU held, so the bus rested while it computed."""
    vram = filled(memories, *[SIZE] * 2)
    resident, main = vram.expert(A), paper.current_stream(GPU)
    before = main.done
    with vram.invite([B, C]):
        for _ in range(10):
            resident ^ 0
        for load in vram._guests._loads.values():
            load._ended.wait()
        seen = vram._uploader._side.seen[main]
    assert main.done >= before + 10
    assert seen <= before + 2


def test_an_eighth_of_the_slots_gives_way_and_those_of_guests_are_not_there_before(paper, memories):
    empty = quiet(paper)
    vram = filled(memories, *[SIZE] * 8)
    table = vram.table.nbytes
    assert vram.holds_all
    for left in range(8, 0, -1):
        assert quiet(paper) - empty == left * SIZE + table
        assert vram.give_way()
    assert not vram.give_way()
    with vram.invite(KEYS):
        assert paper.memory(GPU).taken - empty == 2 * SIZE + table


def test_slots_that_gave_way_come_back_as_far_as_memory_has_room(paper, memories):
    vram, memory = memories.slots(*[SIZE] * 6, reserve=5 * SIZE), paper.memory(GPU)
    for _ in range(3):
        vram.give_way()
    assert vram.slots == 3
    memory.total = memory.allocator.reserved + 7 * SIZE + SIZE // 2
    vram.grow()
    assert vram.slots == len(vram.keys) == 5
    memory.total = memory.taken
    vram.grow()
    assert vram.slots == 5
    paper.allocations, paper.fail_at = 0, 1
    memory.total = 10**9
    vram.grow()  # another program was faster
    assert vram.slots == 5
    vram.grow()
    assert vram.slots == 6


def test_experts_of_several_sizes_take_slots_of_their_size(paper):
    memories = Memories((SIZE, SIZE // 2))
    vram = filled(memories, SIZE, SIZE // 2, SIZE, SIZE // 2, SIZE)
    assert vram.keys == {A, B, C, E, F}
    for key in (A, B, C, E, F):
        assert torch.equal(content(vram, key), bytes_of(key, memories.sizes[key.layer]))
    with vram.invite([D, KEYS[6], KEYS[7]]) as guests:
        for key, expert in guests:
            assert torch.equal((expert ^ 0).cpu(), bytes_of(key, memories.sizes[key.layer]))


def test_page_locked_ram_is_four_stages_in_all_and_unlocked_in_the_end(paper, memories):
    """The lock hung on a tensor of which only views were kept, so it went at once."""
    quiet(paper)
    before = dict(paper.locked)
    vram = filled(memories, *[SIZE] * 4)
    assert sum(size for at, size in paper.locked.items() if at not in before) == 4 * STAGE
    with vram.invite(KEYS) as guests:
        for _ in guests:
            pass
    assert len(paper.locked) == len(before) + 1
    del guests
    vram.close()
    del vram
    quiet(paper)
    assert paper.locked == before


def test_stages_have_32_mb():
    assert vram_module._STAGES * vram_module._STAGE_BYTES == 32 << 20


def test_ram_that_cannot_be_page_locked_is_slower_and_no_fault(paper, memories):
    """CUDA reports the refusal again at the next kernel."""
    paper.refuses_locks = True
    vram = filled(memories, *[SIZE] * 4)
    assert all(torch.equal(content(vram, key), bytes_of(key)) for key in vram.keys)


def test_closing_frees_the_memory_although_experts_are_on_their_way(paper, memories):
    """Loads that waited for their turn held their slots until the thread came to them."""
    memories.held = {A}
    before = quiet(paper)
    vram = memories.slots(*[SIZE] * 7)
    vram.fill_slots()
    memories.reached.wait()
    assert paper.memory(GPU).taken >= before + 9 * SIZE
    vram.close()
    gc.collect()
    table = vram.table.nbytes
    assert paper.memory(GPU).taken <= before + SIZE + table
    memories.go.set()
    wait_until(lambda: paper.memory(GPU).taken <= before + table)
    assert {*memories.begun} == {A}


def test_without_a_thread_nothing_comes_and_nobody_waits(paper, memories, monkeypatch):
    vram = memories.slots(SIZE, SIZE)

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        vram.fill_slots()
        vram.publish()
        with pytest.raises(ResourceError, match="thread"), vram.invite([C]):
            pass
    vram.fill_slots()
    settle(vram)
    vram.publish()
    assert vram.keys == {A, E}
    assert all(torch.equal(content(vram, key), bytes_of(key)) for key in (A, E))
