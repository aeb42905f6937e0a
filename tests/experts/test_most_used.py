"""The policy of a GPU's experts, beside a naive model."""

import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixchat.experts.cache import ExpertCache, ExpertKey
from mixchat.experts.most_used import HALF_LIFE_TOKENS, Exchange, MostUsed

FIRST, LAYERS, EXPERTS, CHOICES = 3, 3, 4, 2
KEYS = [ExpertKey(layer, expert) for layer in range(FIRST, FIRST + LAYERS) for expert in range(4)]


class Held:
    """A cache by this policy, where experts come at once. The first layer has number `first`."""

    def __init__(self, sizes: list[int], slots: list[int], experts: int, first: int = 0) -> None:
        self.policy = MostUsed(first, sizes, experts)
        self.cache = ExpertCache(slots, self.policy, lambda layer: sizes[layer - first])

    def next(self) -> Exchange | None:
        return self.policy.next_exchange(self.cache.free_sizes)

    def carry_out(self, exchange: Exchange) -> None:
        if exchange.evicted is not None:
            self.cache.discard(exchange.evicted)
        assert self.cache.admit(exchange.key) is not None

    def take(self, count: int = 1) -> list[ExpertKey]:
        """Fill free slots. Return the experts that came."""
        keys = []
        for _ in range(count):
            exchange = self.next()
            assert exchange is not None
            assert exchange.evicted is None
            self.carry_out(exchange)
            keys.append(exchange.key)
        return keys

    def tokens(self, *selected: Iterable[int]) -> None:
        self.policy.note_token(np.array(selected))


def of_one_layer(slots: int = 2, experts: int = 4) -> Held:
    return Held([1], [1] * slots, experts)


class Naive:
    """The same by a dictionary of uses, and the experts that are held."""

    def __init__(self, sizes: list[int], slots: list[int]) -> None:
        self.size_of = {key: sizes[key.layer - FIRST] for key in KEYS}
        self.free = list(slots)
        self.uses = {key: 1e-6 * (EXPERTS - key.expert) for key in KEYS}
        self.held: set[ExpertKey] = set()

    def best(self) -> list[Exchange]:
        """Return the exchanges that are as good as any."""
        leads = []
        for key in KEYS:
            if key in self.held or self.uses[key] == -math.inf:
                continue
            if self.size_of[key] in self.free:
                leads.append((math.inf, Exchange(key, None)))
            for other in self.held:
                if self.size_of[other] == self.size_of[key]:
                    more = self.uses[key]
                    less = self.uses[other]
                    leads.append((more - less - 1 - math.sqrt(more + less), Exchange(key, other)))
        most = max((lead for lead, _ in leads), default=0)
        return [exchange for lead, exchange in leads if lead > 0 and lead >= most - 1e-4]


sizes = st.sampled_from([10, 20])
events = st.lists(
    st.one_of(
        st.lists(st.permutations(range(EXPERTS)), min_size=LAYERS, max_size=LAYERS),
        st.tuples(st.sampled_from(KEYS), st.floats(0, 40)),
        st.just("exchange"),
        st.just("exclude"),
    ),
    max_size=80,
)


@given(st.lists(sizes, min_size=LAYERS, max_size=LAYERS), st.lists(sizes, max_size=8), events)
def test_it_does_what_a_naive_model_does(sizes, slots, events):
    held, naive = Held(sizes, slots, EXPERTS, FIRST), Naive(sizes, slots)
    for event in events:
        match event:
            case list(orders):
                held.tokens(*[order[:CHOICES] for order in orders])
                for key in KEYS:
                    naive.uses[key] *= 0.5 ** (1 / HALF_LIFE_TOKENS)
                    naive.uses[key] += key.expert in orders[key.layer - FIRST][:CHOICES]
            case (key, share):
                held.policy.note_rows(key, share)
                naive.uses[key] += share
            case "exclude":
                missing = [key for key in KEYS if key not in naive.held]
                held.policy.exclude([*missing[:1], ExpertKey(FIRST - 1, 0)])  # of another GPU, too
                naive.uses |= dict.fromkeys(missing[:1], -math.inf)
            case _:
                exchange = held.next()
                best = naive.best()
                if exchange is None:
                    assert not best
                    continue
                assert exchange in best
                held.carry_out(exchange)
                naive.held.add(exchange.key)
                if exchange.evicted is None:
                    naive.free.remove(naive.size_of[exchange.key])
                else:
                    naive.held.remove(exchange.evicted)
        assert held.cache.keys == naive.held
        victims = list(held.policy.victims())
        assert set(victims) == naive.held
        assert victims == sorted(victims, key=lambda key: round(naive.uses[key], 3))


def test_without_uses_each_layer_gets_the_same_number_of_experts():
    held = Held([1] * LAYERS, [1] * 7, EXPERTS, FIRST)
    assert held.take(7) == [*KEYS[::4], *KEYS[1::4], KEYS[2]]
    assert held.next() is None


def test_the_most_used_experts_of_earlier_runs_come_first():
    held = Held([1] * LAYERS, [1] * 3, EXPERTS, FIRST)
    uses = {KEYS[6]: 30, KEYS[11]: 40, ExpertKey(0, 0): 10**6, ExpertKey(FIRST + LAYERS, 1): 10**6}
    held.policy.expect(uses)
    assert held.take(3) == [KEYS[11], KEYS[6], KEYS[0]]
    every = sum(map(held.policy.uses_of, KEYS))
    assert every == pytest.approx(LAYERS * HALF_LIFE_TOKENS, rel=1e-4)


def test_an_expert_comes_once_it_leads_by_more_than_counts_of_equals_differ():
    held = of_one_layer()
    held.take(2)
    for _ in range(3):
        held.tokens([0, 1])
    uses, exchange = 0, None
    while exchange is None:
        held.tokens([2])
        uses, exchange = uses + 1, held.next()
    # 8 and 3 uses differ by 1 more than their root, 3.3; 7 and 3 by less than the root and 1.
    assert uses == 8
    assert exchange == Exchange(ExpertKey(0, 2), ExpertKey(0, 1))
    held.carry_out(exchange)
    assert held.next() is None


def test_experts_that_are_used_alike_do_not_take_turns():
    held, generator = of_one_layer(4, 8), np.random.default_rng(0)
    held.take(4)
    exchanges = 0
    for _ in range(2000):
        held.tokens(generator.permutation(8)[:2])
        if (exchange := held.next()) is not None:
            held.carry_out(exchange)
            exchanges += 1
    assert exchanges < 20
