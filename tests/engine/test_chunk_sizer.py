"""Pieces of prompts: as long as others can wait, but not so short that a prompt takes for ever."""

import random
from collections.abc import Callable

import pytest

from mixchat.engine.chunk_sizer import ChunkSizer


def passes(
    prompt: int, patience: float, took: Callable[[int], float], first: int = 32
) -> list[tuple[int, float]]:
    """Return the tokens and seconds of each pass of some prompts, one after the other."""
    size = ChunkSizer(first, 16, 2048)
    done = []
    for _ in range(3):
        left = prompt
        while left:
            tokens = min(size.choose(patience), left)
            done.append((tokens, took(tokens)))
            size.add(*done[-1])
            left -= tokens
    return done


@pytest.mark.parametrize(("each", "fixed"), [(0.001, 0.2), (0.01, 0.0), (0.04, 0.2)])
def test_where_experts_are_in_memory_nobody_waits_longer_than_asked(fixed, each):
    noise = random.Random(1)
    done = passes(3000, 0.7, lambda n: (fixed + n * each) * noise.uniform(0.9, 1.1))
    later = [seconds for _, seconds in done[10:]]
    assert max(later) < 1.0
    assert len(done) < 3.5 * 3 * max(3000 * each / 0.7, 3000 / 2048) + 30


@pytest.mark.parametrize("first", [32, 2048])
@pytest.mark.parametrize("fixed", [4.0, 12.0, 20.0])
def test_where_a_pass_reads_all_experts_from_disk_a_prompt_takes_few_passes(fixed, first):
    """Pieces shrank to 16 tokens here, since each was as slow: a prompt took an hour."""
    noise = random.Random(2)
    done = passes(7000, 0.7, lambda n: (fixed + n * 0.02) * noise.uniform(0.95, 1.05), first)
    assert len(done) < 3 * 7000 / (fixed / 0.02 / 4) + 15


def test_pieces_grow_again_when_the_machine_is_less_busy():
    size = ChunkSizer(32, 16, 2048)
    for _ in range(10):
        tokens = size.choose(0.7)
        size.add(tokens, tokens * 0.05)
    slow = size.choose(0.7)
    for _ in range(20):
        tokens = size.choose(0.7)
        size.add(tokens, tokens * 0.005)
    assert slow < 20
    assert size.choose(0.7) > 80
