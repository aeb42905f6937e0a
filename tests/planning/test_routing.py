"""Hit rates of synthetic routing."""

from types import SimpleNamespace
from typing import Any

import pytest
from routing_simulation import Trace, replay, synthetic_trace

from mixchat.planning.routing import expected_hit_rate

TOKENS = 4000


@pytest.fixture(scope="module")
def synthetic() -> Trace:
    return synthetic_trace(tokens=TOKENS, seed=1)


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


@pytest.mark.parametrize("slots", [20, 100, 200])
def test_an_expected_hit_rate_is_that_of_a_simulated_cache(synthetic, slots):
    short = Trace("synthetic", 32, 8, 2, synthetic.forwards[:1000])
    rate = replay(short, slots, "layered").decode.hit_rate
    assert expected_hit_rate(config(32, 8, 2), slots) == pytest.approx(rate, abs=0.015)


def config(layers: int, experts: int, chosen: int) -> Any:
    return SimpleNamespace(
        num_moe_layers=layers, num_local_experts=experts, num_experts_per_tok=chosen
    )
