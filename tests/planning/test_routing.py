"""Hit rates of synthetic routing."""

import math
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from routing_simulation import Trace, replay, sharing, synthetic_trace

from mixchat.planning.routing import expected_hit_rate

TOKENS = 4000


@pytest.fixture(scope="module")
def synthetic() -> Trace:
    return synthetic_trace(tokens=TOKENS, seed=1)


def test_layers_share_as_the_paper_measured():
    assert [sharing(layer, 32) for layer in (0, 15, 31)] == pytest.approx([0.48, 0.645, 0.5])
    shares = [sharing(layer, 32) for layer in range(32)]
    assert shares[:16] == sorted(shares[:16])
    assert shares[15:] == sorted(shares[15:], reverse=True)
    assert [sharing(layer, 2) for layer in range(2)] == pytest.approx([0.48, 0.5])
    assert sharing(0, 1) == 0.48


def test_a_synthetic_trace_repeats_experts_as_often_as_it_should(synthetic):
    """Sharing is drawn independently at each step, so that the error is the binomial one."""
    for layer in range(32):
        chain = [set(forward[layer]) for forward in synthetic.forwards]
        shared = sum(not a.isdisjoint(b) for a, b in pairwise(chain))
        share, steps = sharing(layer, 32), TOKENS - 1
        error = math.sqrt(share * (1 - share) / steps)
        assert abs(shared / steps - share) < 4.5 * error


def test_in_a_synthetic_trace_every_pair_of_experts_is_as_likely(synthetic):
    pairs = Counter(
        tuple(sorted(selected)) for forward in synthetic.forwards for selected in forward
    )
    uses = 32 * TOKENS
    assert len(pairs) == 28
    # Repetition makes the variance larger, but by less than a third: the chain's second largest
    # eigenvalue is 5 * (share / 13 - (1 - share) / 15), 0.13 at most.
    error = math.sqrt(1.33 * (1 / 28) * (27 / 28) / uses)
    assert max(abs(count / uses - 1 / 28) for count in pairs.values()) < 4.5 * error


def test_a_little_more_room_is_a_little_better_with_the_layers_in_mind(synthetic):
    """By the clock, 64 slots hold the last token's experts and 112 those of the last two; what is
    between is of no use to LRU."""
    short = Trace("synthetic", 32, 8, 2, synthetic.forwards[:300])
    rates = {
        policy: [replay(short, slots, policy).decode.hit_rate for slots in (64, 88, 104)]
        for policy in ("lru", "layered")
    }
    assert rates["lru"][2] - rates["lru"][0] < 0.02
    assert rates["layered"][0] == pytest.approx(rates["lru"][0], abs=0.01)
    assert rates["layered"][1] > rates["lru"][1] + 0.05
    assert rates["layered"][2] > rates["lru"][2] + 0.1


def test_with_slots_for_the_last_token_lru_hits_what_two_tokens_share(synthetic):
    """64 slots hold what one token used. Of the 13 pairs that share, one is the same pair:

    a step that shares has 14/13 experts in common, of two.
    """
    expected = sum(sharing(layer, 32) for layer in range(32)) / 32 * 14 / 13 / 2
    assert replay(synthetic, 64, "lru").decode.hit_rate == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("slots", [20, 100, 200])
def test_an_expected_hit_rate_is_that_of_a_simulated_cache(synthetic, slots):
    short = Trace("synthetic", 32, 8, 2, synthetic.forwards[:1000])
    rate = replay(short, slots, "layered").decode.hit_rate
    assert expected_hit_rate(config(32, 8, 2), slots) == pytest.approx(rate, abs=0.015)


def config(layers: int, experts: int, chosen: int) -> Any:
    return SimpleNamespace(
        num_moe_layers=layers, num_local_experts=experts, num_experts_per_tok=chosen
    )
