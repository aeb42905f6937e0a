"""The memory of slots, by what torch's allocator takes for it."""

import paper_gpu
import pytest
import torch
from paper_allocator import MB, Allocator
from paper_runtime import GB, PaperRuntime

from mixchat.base.options import ExpertSize
from mixchat.experts.arena import Arena
from mixchat.install.make.outline import known_blueprints
from mixchat.planning.fitting import expected_mix

GPU = torch.device("paper", 0)


@pytest.fixture
def paper():
    with paper_gpu.in_place_of_cuda() as runtime:
        runtime.empty_cache()
        yield runtime


@pytest.mark.parametrize("name", ["qwen3", "lfm2", "gpt-oss", "instruct"])
def test_slots_lose_less_than_half_a_percent_to_the_allocator(name, monkeypatch):
    """As tensors of their own they lost 4.6% (Qwen3) to 19.5% (LFM2)."""
    blueprint = next(known for names, known in known_blueprints().items() if name in names)
    if name != "gpt-oss":
        blueprint = expected_mix(blueprint, ExpertSize.parse("4"))
    size = blueprint.expert.stride
    allocator, apart = Allocator(), Allocator()
    monkeypatch.setattr(torch, "empty", lambda size, **_: allocator.take(size, 99 * GB))
    monkeypatch.setattr(torch, "split", lambda block, sizes: sizes)
    slots = 8 * GB // size
    arena = Arena(GPU, [size] * slots)
    for _ in range(slots):
        apart.take(size, 99 * GB)
    assert len(arena.blocks) == slots
    assert slots * size <= allocator.reserved < 1.005 * slots * size
    assert allocator.reserved <= apart.reserved


def test_an_eighth_of_a_few_slots_can_be_given_back(paper: PaperRuntime):
    arena = Arena(GPU, [2 * MB] * 16)
    memory = paper.memory(GPU)
    assert [len(piece) for piece in arena.pieces] == [2] * 8
    before = memory.taken
    arena.give_back()
    assert sorted(arena.blocks) == [*range(14)]
    assert before - memory.taken == 4 * MB
    assert arena.next_size == 4 * MB
    assert arena.take() == range(14, 16)
    assert (arena.next_size, arena.nbytes) == (None, 32 * MB)


def test_slots_of_several_sizes_lie_one_after_the_other(paper: PaperRuntime):
    sizes = [3 * MB, 4 * MB, 3 * MB, 4 * MB]
    arena = Arena(GPU, sizes)
    assert [arena.blocks[slot].nbytes for slot in range(4)] == sizes
    assert [*map(len, arena.pieces)] == [1] * 4


def test_whoever_has_a_block_keeps_its_memory(paper: PaperRuntime):
    arena, memory = Arena(GPU, [MB]), paper.memory(GPU)
    block, before = arena.blocks[0], memory.taken
    arena.give_back()
    assert memory.taken == before
    assert not arena.pieces
    del block
    assert memory.taken == before - MB


def test_no_slots_take_no_memory(paper: PaperRuntime):
    arena = Arena(GPU, [])
    assert (arena.blocks, arena.next_size, arena.nbytes) == ({}, None, 0)
