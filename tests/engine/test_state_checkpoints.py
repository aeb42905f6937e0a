"""The choice of checkpoints: which stay, and how much of a text a change computes again."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from mixchat.engine.caches.checkpoints import (
    TURN_ENDS,
    checkpoint_counts,
    kept_checkpoints,
    spacing_of,
)

CONTEXT = 32_768
SPACING = spacing_of(CONTEXT)
CHECKPOINTS = st.sets(st.integers(1, CONTEXT), max_size=40)
# Of each turn, the tokens of the question and of the answer.
CHATS = st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 3000)), min_size=1, max_size=20)


def test_the_distances_to_the_end_are_halved():
    kept = kept_checkpoints(
        range(1000, 16_001, 1000), 16_000, 6, 1000, latest={15_000, 16_000}, turns={15_000, 16_000}
    )
    assert kept == [4000, 8000, 12_000, 14_000, 15_000, 16_000]


def test_the_end_of_a_turn_stays_rather_than_a_place_inside():
    turn = {7500}
    assert 7500 in kept_checkpoints(range(500, 12_000, 500), 12_000, 8, 512, turns=turn)
    assert 7500 not in kept_checkpoints(range(500, 12_000, 500), 12_000, 8, 512)


@given(CHECKPOINTS, CHECKPOINTS, CHECKPOINTS, st.integers(0, 64))
def test_the_most_stay_that_may_and_the_last_turn_first(checkpoints, latest, turns, limit):
    length = max(checkpoints, default=1)
    kept = kept_checkpoints(checkpoints, length, limit, SPACING, latest=latest, turns=turns)
    assert kept == sorted(set(kept) & checkpoints)
    assert len(kept) == min(limit, len(checkpoints))
    last = checkpoints & latest
    assert len(last.intersection(kept)) == min(len(last), limit)


@given(CHECKPOINTS, st.integers(1, 64), st.integers(1, 64))
def test_fewer_may_stay_later_as_if_at_once(checkpoints, one, other):
    """A file has fewer than memory."""
    low, high = sorted((one, other))

    def kept(numbers, limit):
        return kept_checkpoints(numbers, CONTEXT, limit, SPACING)

    assert kept(kept(checkpoints, high), low) == kept(checkpoints, low)


@settings(max_examples=100)
@given(CHATS, st.sampled_from([4, 8, 16, 32, 64]))
def test_no_change_computes_more_again_than_is_promised(chat, limit):
    """As a chat grows, as `SequenceCache` notes its checkpoints. A gap begins at a checkpoint."""
    kept: list[int] = []
    turns: set[int] = set()
    length = 0
    for question, answer in chat:
        start, prompt = length, length + question
        if prompt + answer > CONTEXT:
            break
        latest = {start, prompt - 16, prompt}
        turns |= latest
        regular = range(0, CONTEXT, SPACING)
        new = {n for n in (*latest, *regular) if max(start, 1) <= n <= prompt}
        length = prompt
        options = {"latest": latest, "turns": turns}
        kept = kept_checkpoints({*kept, *new}, length, limit, SPACING, **options)
        assert {n for n in latest if start <= n and n > 0} <= {*kept}
        for n in (n for n in regular if prompt < n <= prompt + answer):
            kept = kept_checkpoints([*kept, n], n, limit, SPACING, **options)
        length += answer
    removable = limit + 1 - TURN_ENDS
    most = 1 - (SPACING / (CONTEXT + SPACING)) ** (1 / (removable // 2))
    assert length - max(kept, default=0) <= SPACING
    for before, after in pairwise([0, *kept]):
        share = (after - before) / (length + SPACING - before)
        assert after - before <= SPACING or share <= max(min(1 / 2, 8 / limit), most) + 1e-9


def test_the_promised_part_of_the_context():
    """The page on chats says half with 16 checkpoints, and an eighth with 64."""
    for limit, promised in ((16, 0.5), (32, 0.25), (64, 0.13)):
        removable = limit + 1 - TURN_ENDS
        assert 1 - (1 / 65) ** (1 / (removable // 2)) <= promised


@given(st.integers(0, 10**9), st.integers(1, 16))
def test_counts_rise_from_those_of_a_turn(state_bytes, count):
    counts = checkpoint_counts(state_bytes, count)
    assert list(counts) == sorted(set(counts))
    assert counts[0] > TURN_ENDS if state_bytes else counts == (0,)
    assert counts[-1] <= 64
    assert state_bytes * count * counts[-1] <= max(2**32, state_bytes * count * counts[0])


def test_qwen_has_8_to_64_and_4_to_16_in_company():
    assert checkpoint_counts(65_863_680, 1) == (8, 16, 32, 64)
    assert checkpoint_counts(65_863_680, 4) == (4, 16)


@given(st.integers(2, 2**20))
def test_a_full_context_has_at_most_64_places_inside_turns(capacity):
    assert len(range(spacing_of(capacity), capacity, spacing_of(capacity))) <= 64
