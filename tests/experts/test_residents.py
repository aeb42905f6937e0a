"""The experts that a GPU holds, beside a naive model."""

import itertools
import math
from collections.abc import Iterable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixchat.experts.cache import ExpertKey
from mixchat.experts.residents import HALF_LIFE_TOKENS, Exchange, Move, Residents

FIRST, LAYERS, EXPERTS, CHOICES = 3, 3, 4, 2
KEYS = [ExpertKey(layer, expert) for layer in range(FIRST, FIRST + LAYERS) for expert in range(4)]


def take(residents: Residents, count: int = 1) -> list[ExpertKey]:
    """Let experts arrive in free slots. Return them."""
    keys = []
    for _ in range(count):
        exchange = residents.next_exchange()
        assert exchange is not None
        assert exchange.evicted is None
        residents.begin(exchange)
        residents.end(exchange.key, arrived=True)
        keys.append(exchange.key)
    return keys


def tokens(residents: Residents, *selected: Iterable[int]) -> np.ndarray:
    return residents.note_token(np.array(selected))


def of_one_layer(slots: int = 2, experts: int = 4) -> Residents:
    return Residents(0, [1], experts, [1] * slots)


class Naive:
    """The same by dictionaries: uses by key, slots by key, and the sizes of both."""

    def __init__(self, sizes: list[int], slots: list[int]) -> None:
        self.size_of = {key: sizes[key.layer - FIRST] for key in KEYS}
        self.sizes = dict(enumerate(slots))
        self.uses = {key: 1e-6 * (EXPERTS - key.expert) for key in KEYS}
        self.slots: dict[ExpertKey, int] = {}
        self.arriving: set[ExpertKey] = set()
        self.free = set(self.sizes)
        self.given_up: set[int] = set()

    def give_up(
        self, gone: set[int], lost: Iterable[ExpertKey], moved: Mapping[ExpertKey, Move]
    ) -> None:
        for key in lost:
            del self.slots[key]
            self.arriving.discard(key)
        for key, (before, after) in moved.items():
            assert self.slots[key] == before
            assert key not in self.arriving
            self.slots[key] = after
        assert not gone & {*self.slots.values()}
        self.given_up |= gone
        self.free -= gone

    def best(self) -> list[tuple[ExpertKey, int | None, ExpertKey | None]]:
        """Return the exchanges that are as good as any."""
        found = []
        for key in KEYS:
            if key in self.slots or self.uses[key] == -math.inf:
                continue
            alike = [other for other in self.slots if self.size_of[other] == self.size_of[key]]
            for slot in self.free:
                if self.sizes[slot] == self.size_of[key]:
                    found.append((math.inf, self.uses[key], key, slot, None))
            for other in set(alike) - self.arriving:
                more, less = self.uses[key], self.uses[other]
                lead = more - less - 1 - math.sqrt(more + less)
                if lead > 0:
                    found.append((lead, more, key, self.slots[other], other))
        # A free slot is taken at once, although another size's expert might gain more.
        if any(lead == math.inf for lead, *_ in found):
            return [(key, slot, None) for lead, _, key, slot, _ in found if lead == math.inf]
        most = max((lead for lead, *_ in found), default=0)
        return [rest for lead, _, *rest in found if lead > most - 1e-9]  # type: ignore[misc]


events = st.lists(
    st.one_of(
        st.tuples(
            st.just("token"),
            st.lists(st.permutations(range(EXPERTS)), min_size=LAYERS, max_size=LAYERS),
        ),
        st.tuples(st.just("rows"), st.sampled_from(KEYS), st.floats(0, 40)),
        st.tuples(st.just("begin")),
        st.tuples(st.just("end"), st.booleans(), st.integers(0, 100)),
        st.tuples(st.just("give up"), st.integers(1, 4)),
        st.tuples(st.just("add"), st.integers(0, 100)),
    ),
    max_size=80,
)


@given(
    st.lists(st.sampled_from([10, 20]), min_size=LAYERS, max_size=LAYERS),
    st.lists(st.sampled_from([10, 20]), max_size=8),
    events,
)
def test_it_does_what_a_naive_model_does(sizes, slots, events):
    residents, naive = Residents(FIRST, sizes, EXPERTS, slots), Naive(sizes, slots)
    for what, *arguments in events:
        match what, *arguments:
            case "token", orders:
                selected = [order[:CHOICES] for order in orders]
                hits = residents.note_token(np.array(selected))
                for key in KEYS:
                    naive.uses[key] *= 0.5 ** (1 / HALF_LIFE_TOKENS)
                for layer, chosen in enumerate(selected):
                    for number, expert in enumerate(chosen):
                        key = ExpertKey(FIRST + layer, expert)
                        naive.uses[key] += 1
                        assert hits[layer, number] == (residents.slot_of(key) is not None)
            case "rows", key, share:
                residents.note_rows(key, share)
                naive.uses[key] += share
            case "begin", *_:
                exchange, best = residents.next_exchange(), naive.best()
                if exchange is None:
                    assert not best
                    continue
                key, slot, evicted = exchange
                assert (key, slot, evicted) in map(tuple, best)
                residents.begin(exchange)
                if evicted is None:
                    naive.free.remove(slot)
                else:
                    del naive.slots[evicted]
                naive.slots[key] = slot
                naive.arriving.add(key)
            case "end", arrived, number if naive.arriving:
                key = sorted(naive.arriving)[number % len(naive.arriving)]
                assert residents.end(key, arrived=arrived) == naive.slots[key]
                naive.arriving.remove(key)
                if not arrived:
                    naive.free.add(naive.slots.pop(key))
                    naive.uses[key] = -math.inf
            case "give up", count:
                there = [slot for slot in naive.sizes if slot not in naive.given_up]
                gone = {*there[max(len(there) - count, 0) :]}
                before, arriving = dict(naive.slots), set(naive.arriving)
                lost, moved = residents.give_up(gone)
                naive.give_up(gone, lost, moved)
                assert len(lost) == sum(slot in gone for slot in before.values())
                assert {before[key] for key in lost} >= {after for _, after in moved.values()}
                stayed = naive.slots.keys() - naive.arriving
                for key, each in itertools.product({*lost} - arriving, stayed):
                    if naive.size_of[key] == naive.size_of[each]:
                        assert naive.uses[key] <= naive.uses[each] * (1 + 1e-4) + 1e-9
            case "add", number if naive.given_up:
                slot = sorted(naive.given_up)[number % len(naive.given_up)]
                residents.add_slot(slot, naive.sizes[slot])
                naive.given_up.remove(slot)
                naive.free.add(slot)
        assert residents.keys == naive.slots.keys()
        assert len(set(naive.slots.values())) == len(naive.slots)
        for key in KEYS:
            there = key in naive.slots and key not in naive.arriving
            assert residents.slot_of(key) == (naive.slots[key] if there else None)
            if there:
                assert naive.sizes[naive.slots[key]] == naive.size_of[key]


def test_without_uses_each_layer_gets_the_same_number_of_experts():
    residents = Residents(FIRST, [1] * LAYERS, EXPERTS, [1] * 7)
    assert take(residents, 7) == [*KEYS[::4], *KEYS[1::4], KEYS[2]]
    assert residents.next_exchange() is None


def test_the_most_used_experts_of_earlier_runs_come_first():
    residents = Residents(FIRST, [1] * LAYERS, EXPERTS, [1] * 3)
    uses = {KEYS[6]: 30, KEYS[11]: 40, ExpertKey(0, 0): 10**6, ExpertKey(FIRST + LAYERS, 1): 10**6}
    residents.expect(uses)
    assert take(residents, 3) == [KEYS[11], KEYS[6], KEYS[0]]
    assert residents._uses.sum() == pytest.approx(LAYERS * HALF_LIFE_TOKENS, rel=1e-4)


def test_an_expert_comes_once_it_leads_by_more_than_counts_of_equals_differ():
    residents = of_one_layer()
    take(residents, 2)
    for _ in range(3):
        tokens(residents, [0, 1])
    uses, exchange = 0, None
    while exchange is None:
        tokens(residents, [2])
        uses, exchange = uses + 1, residents.next_exchange()
    # 8 and 3 uses differ by 1 more than their root, 3.3; 7 and 3 by less than the root and 1.
    assert uses == 8
    assert exchange == Exchange(ExpertKey(0, 2), 1, ExpertKey(0, 1))
    residents.begin(exchange)
    assert residents.keys == {(0, 0), (0, 2)}
    assert residents.slot_of(ExpertKey(0, 2)) is None  # it is on its way
    assert residents.next_exchange() is None
    assert residents.end(ExpertKey(0, 2), arrived=True) == 1
    assert residents.slot_of(ExpertKey(0, 2)) == 1
    assert residents.slot_of(ExpertKey(0, 1)) is None
    assert residents.next_exchange() is None


def test_experts_that_are_used_alike_do_not_take_turns():
    residents, generator = of_one_layer(4, 8), np.random.default_rng(0)
    take(residents, 4)
    exchanges = 0
    for _ in range(2000):
        tokens(residents, generator.permutation(8)[:2])
        if (exchange := residents.next_exchange()) is not None:
            residents.begin(exchange)
            residents.end(exchange.key, arrived=True)
            exchanges += 1
    assert exchanges < 20


def test_uses_count_half_after_a_half_life():
    residents = of_one_layer(1, 3)
    take(residents)
    for _ in range(60):
        tokens(residents, [0])
    for _ in range(HALF_LIFE_TOKENS):
        tokens(residents, [2])
        if (exchange := residents.next_exchange()) is not None:
            break
    assert exchange == Exchange(ExpertKey(0, 2), 0, ExpertKey(0, 0))
    assert residents._uses[0, 0] < 50


def test_an_expert_that_could_not_be_read_is_not_tried_again_and_its_slot_is_used():
    residents = of_one_layer(1)
    exchange = residents.next_exchange()
    assert exchange == Exchange(ExpertKey(0, 0), 0, None)
    residents.begin(exchange)
    assert residents.end(exchange.key, arrived=False) == 0
    for _ in range(100):
        tokens(residents, [0])
    assert take(residents) == [ExpertKey(0, 1)]
    assert residents.next_exchange() is None


def test_experts_of_workers_get_no_slots():
    residents = of_one_layer(4)
    residents.exclude([ExpertKey(0, 1), ExpertKey(5, 0)])
    assert take(residents, 3) == [ExpertKey(0, 0), ExpertKey(0, 2), ExpertKey(0, 3)]
    assert residents.next_exchange() is None


def test_the_experts_that_are_used_least_lose_their_slots_to_those_of_slots_given_up():
    residents = of_one_layer(4)
    assert take(residents, 3) == [ExpertKey(0, n) for n in range(3)]  # and slot 3 is free
    for expert in (1, 1, 0):
        tokens(residents, [expert])
    lost, moved = residents.give_up([1, 3])
    assert (lost, moved) == ([ExpertKey(0, 2)], {ExpertKey(0, 1): Move(1, 2)})
    assert residents.slot_of(ExpertKey(0, 1)) == 2
    residents.add_slot(1, 1)
    exchange = residents.next_exchange()
    assert exchange == Exchange(ExpertKey(0, 2), 1, None)
    residents.begin(exchange)
    assert residents.give_up([1]) == ([ExpertKey(0, 2)], {})  # it is on its way
    assert residents.give_up([0, 2]) == ([ExpertKey(0, 1), ExpertKey(0, 0)], {})
    assert residents.next_exchange() is None
