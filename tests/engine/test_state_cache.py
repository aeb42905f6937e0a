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
SPACING = 4
DEVICES = [CPU, torch.device(paper_gpu.KIND, 0)]


@pytest.fixture(autouse=True)
def paper() -> Iterator[None]:
    with paper_gpu.in_place_of_cuda():
        yield


@pytest.fixture(autouse=True)
def close_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many checkpoints fit into 64 tokens as into a large context."""
    monkeypatch.setattr(sequence_cache, "spacing_of", lambda capacity: SPACING)


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
        self.cache.begin((len(ids) - 1, len(ids)), (*places, reused))
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


def test_a_text_that_parts_anywhere_computes_a_part_of_it_again():
    """With 16 checkpoints, half of what followed the change, as `kept_checkpoints` promises."""
    ids = [number % 5 for number in range(60)]
    for length in range(60, 2, -1):
        text = Text(new(checkpoints=16))
        text.prompt(ids, [])
        assert text.prompt([*ids[:length], 9], []) <= (60 + SPACING) // 2 + 1


def test_a_pass_holds_no_more_states_than_stay():
    """A prompt may have the ends of many turns, and a state of each would not fit into memory."""
    text, written = Text(new(layers=1, checkpoints=4)), 0
    layer, ids = text.cache.layers[0], [1] * 60
    assert isinstance(layer, StateCache)
    text.cache.begin((44, 60), range(60))
    for _ in layer.segments(len(ids)):
        written += 1
    assert written == 4


@pytest.mark.parametrize("checkpoints", [4, 8])
@pytest.mark.parametrize("back_to", [8, 10])
def test_undo_and_regenerate_compute_nothing_anew(checkpoints, back_to):
    """A turn is a prompt and an answer. The cache goes back to where either of them began.

    With 4 checkpoints, the newest two alone stayed, and an undo computed the whole last turn.
    """
    text, turns = Text(new(checkpoints=checkpoints)), [([1] * 5, [6] * 3), ([1] * 2, [0] * 30)]
    ids: list[int] = []
    for question, answer in turns:
        ids += question
        assert text.prompt(ids, []) == len(question)
        add(text.cache, answer)
        text.cache.advance(len(answer))
        text.add(answer)
        ids += answer
    assert text.prompt([*ids[:back_to], 9], []) == 1


def test_a_place_can_be_added_while_a_prompt_is_computed():
    """Another prompt waits for the beginning that it shares with this one."""
    cache = new()
    cache.begin((30,))
    add(cache, [1] * 10)
    cache.advance(10)
    cache.add_checkpoint(21)
    add(cache, [1] * 20)
    cache.advance(20)
    assert 21 in cache.extent.checkpoints


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_content_comes_back_with_its_checkpoints(device):
    text, ids = Text(new(device=device)), [number % 7 for number in range(20)]
    text.prompt(ids, [], places=(5, 9))
    extent, restored = text.cache.extent, new(device=device)
    assert extent == Extent(20, 0, (4, 5, 8, 9, 12, 16, 19))
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
    sizes = [
        cache_bytes(PLAIN, 100, torch.bfloat16, count=count, checkpoints=more) // count
        for more in (None, expected, 32)
    ]
    assert sizes[0] == sizes[1] == sizes[2] - (32 - expected) * 60_000_000
    monkeypatch.undo()
    assert sizes[0] - (2 + expected) * 60_000_000 == cache_bytes(PLAIN, 100, torch.bfloat16) // 2
