"""States of layers: passes, interruptions, checkpoints, and texts that part from each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import paper_gpu
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv_cache import CPU, PLAIN

from mixchat.engine.caches import sequence_cache
from mixchat.engine.caches.layer_cache import Extent
from mixchat.engine.caches.sequence_cache import SequenceCache, cache_bytes
from mixchat.engine.caches.state_cache import StateCache
from mixchat.engine.passes import CachedPrefix

CAPACITY = 64
DEVICES = [CPU, torch.device(paper_gpu.KIND, 0)]


@pytest.fixture(autouse=True)
def paper() -> Iterator[None]:
    with paper_gpu.in_place_of_cuda():
        yield


def new(layers: int = 2, checkpoints: int = 8, device: torch.device = CPU) -> SequenceCache:
    states = [StateCache({"sum": (2,)}, device, has_steps=True) for _ in range(layers)]
    return SequenceCache(PLAIN, CAPACITY, states, checkpoints)


def add(cache: SequenceCache, ids: Iterable[int], layers: int | None = None) -> None:
    """Add tokens to some layers, whose states become 3 * state + token, and 1 more than that."""
    ids = list(ids)
    for number, layer in enumerate(cache.layers[:layers]):
        assert isinstance(layer, StateCache)
        for rows, before, after in layer.segments(len(ids)):
            state = before["sum"].cpu()
            for token in ids[rows]:
                state = (3 * state + token + torch.tensor([0, number])) % 1009
            after["sum"].copy_(state)


def sums(cache: SequenceCache) -> list[list[float]]:
    return [layer.state["sum"].cpu().tolist() for layer in cache.layers]


def of(ids: list[int]) -> list[list[float]]:
    cache = new()
    if ids:
        add(cache, ids)
        cache.advance(len(ids))
    return sums(cache)


class Text(CachedPrefix):
    """A prefix that computes prompts as a batch does, in passes of any size."""

    def prompt(self, ids: list[int], sizes: Iterable[int], places: Iterable[int] = ()) -> int:
        """Return how many tokens were computed."""
        reused = self.shared_with(ids)
        self.cut(reused)
        self.cache.begin({*places, reused, len(ids)})
        sizes = iter(sizes)
        while self.cache.length < len(ids):
            chunk = ids[self.cache.length :][: next(sizes, 7)]
            add(self.cache, chunk)
            self.cache.advance(len(chunk))
            self.add(chunk)
        return len(ids) - reused


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_an_interrupted_pass_changes_nothing(device):
    cache = new(device=device)
    add(cache, [5, 6])
    cache.advance(2)
    add(cache, [1, 2, 3], layers=1)  # Ctrl-C before the second layer
    add(cache, [4, 5])  # and before the tokens count
    assert sums(cache) == of([5, 6])
    add(cache, [9])
    cache.advance(1)
    assert sums(cache) == of([5, 6, 9])


TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=40)
SIZES = st.lists(st.integers(1, 9), max_size=9)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@settings(max_examples=100)
@given(prompts=st.lists(st.tuples(st.integers(0, 40), TEXTS, SIZES), min_size=1, max_size=8))
def test_any_sequence_of_prompts_has_the_states_of_a_new_cache(device, prompts):
    text, other = Text(new(device=device)), Text(new(device=device))
    ids: list[int] = []
    for kept, more, sizes in prompts:
        ids = [*ids[:kept], *more][:CAPACITY]
        text.prompt(ids, sizes)
        assert sums(text.cache) == of(ids)
        extent = text.cache.extent
        assert extent.tokens == len(ids)
        assert len(extent.checkpoints) <= 8
        # What one cache took from another stays right, whatever the other does next.
        if other.cache.length:
            before = of(other.ids)
            assert sums(other.cache) == before
        if not (length := text.cache.usable(kept)):
            continue
        other.copy_from(text, length)
        assert sums(other.cache) == of(ids[:length])
        add(other.cache, [7, 8])
        other.cache.advance(2)
        other.add([7, 8])


def test_a_text_that_parts_anywhere_is_computed_from_at_most_n_tokens_before():
    """With 8 checkpoints and a capacity of 64, N is 16."""
    text, ids = Text(new()), [number % 5 for number in range(60)]
    for length in range(60, 2, -1):
        text.prompt(ids, [])
        assert text.prompt([*ids[:length], 9], []) <= 16 + 1


def test_the_latest_places_stay_and_crowded_ones_go_first():
    cache = new()
    for length in (3, 5, 6, 20, 22, 40, 41, 43):
        cache.begin({length})
        tokens = length - cache.length
        add(cache, [1] * tokens)
        cache.advance(tokens)
    # Beside the multiples of 16. The last one is the present state.
    assert cache.extent.checkpoints == (16, 22, 32, 40, 41)


def test_undo_and_regenerate_compute_nothing_anew():
    """A turn is a prompt and an answer. The cache goes back to where each of them began."""
    text, turn = Text(new()), [1, 2, 3, 4, 5]
    text.prompt(turn, [])
    answer = [6, 7, 8]
    add(text.cache, answer)
    text.cache.advance(3)
    text.add(answer)
    second = [*turn, *answer, 1, 1]
    assert text.prompt(second, []) == 2
    assert text.prompt([*second, 9], []) == 1  # as after /regen: the prompt was a place
    assert text.prompt([*turn, *answer, 2], []) == 1  # as after /undo


def test_a_place_can_be_added_while_a_prompt_is_computed():
    """Another prompt waits for the beginning that it shares with this one."""
    cache = new()
    cache.begin({30})
    add(cache, [1] * 10)
    cache.advance(10)
    cache.add_places({21})
    add(cache, [1] * 20)
    cache.advance(20)
    assert cache.extent.checkpoints == (16, 21)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_content_comes_back_with_its_checkpoints(device):
    text, ids = Text(new(device=device)), [number % 7 for number in range(20)]
    text.prompt(ids, [], places=(5, 9))
    extent, restored = text.cache.extent, new(device=device)
    assert extent == Extent(20, 0, (5, 9, 16))
    for layer, target in zip(text.cache.layers, restored.layers, strict=True):
        target.restore(layer.content(extent), extent, 16)
    restored.set_extent(extent.until(16))
    assert sums(restored) == of(ids[:16])
    restored.cut(9)
    assert sums(restored) == of(ids[:9])


@pytest.mark.parametrize(("count", "expected"), [(1, 8), (4, 4)])
def test_checkpoints_are_counted_by_their_bytes(monkeypatch, count, expected):
    """Of 60 MB each, 512 MB hold eight. Four sequences share them, and have four at least."""
    shapes = {"state": (15, 10**6)}
    monkeypatch.setattr(sequence_cache, "state_shapes", lambda config, n: {} if n else shapes)
    half = cache_bytes(PLAIN, 100, torch.bfloat16, count=count) // count - 60_000_000 * (
        2 + expected
    )
    monkeypatch.undo()
    assert half == cache_bytes(PLAIN, 100, torch.bfloat16) // 2
