"""Experts on several holders give the bits that one holder gives, also where a worker fails."""

import time
from itertools import combinations, product
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from expert_doubles import FakeWorker, routing, runner

from mixchat.experts.cache import ExpertKey
from mixchat.experts.tier import MISSING
from mixchat.weights.format.installed_model import InstalledModel

EVERYTHING = [ExpertKey(*key) for key in product(range(2), range(4))]
SPLITS = [frozenset(keys) for size in (1, 2, 4) for keys in combinations(EVERYTHING[:4], size)]


@pytest.fixture
def installed(tiny_model: Path) -> InstalledModel:
    return InstalledModel(tiny_model)


@pytest.mark.parametrize("held", SPLITS)
def test_what_a_worker_computes_has_the_bits_that_it_has_at_home(installed, held):
    worker = FakeWorker(installed, held)
    spread, alone = runner(installed, 2, workers=[worker]), runner(installed, 8)
    for tokens, seed in product((1, 2, 17), range(3)):
        inputs = routing(tokens, seed=seed)
        assert torch.equal(spread.run(0, *inputs), alone.run(0, *inputs))
    assert {key for keys in worker.sent for key in keys} == held
    assert not any(spread.ram.holds(key) for key in held)


def test_three_workers_share_the_work_of_experts_that_all_hold(installed):
    workers = [FakeWorker(installed, EVERYTHING) for _ in range(3)]
    spread, alone = runner(installed, 2, workers=workers), runner(installed, 8)
    inputs = routing(30, choices=3)
    assert torch.equal(spread.run(0, *inputs), alone.run(0, *inputs))
    assert [len(worker.sent[0]) for worker in workers] in ([2, 1, 1], [1, 2, 1], [1, 1, 2])


def test_what_a_worker_computes_is_a_hit_and_what_it_fails_to_compute_a_miss(installed):
    worker = FakeWorker(installed, EVERYTHING)
    spread = runner(installed, 8, workers=[worker])
    spread.run(0, *routing(1))
    used = set(worker.sent[0])
    assert (set(spread.stats.hits), spread.stats.misses.total()) == (used, 0)
    worker.fails_at = "finish"
    spread.run(0, *routing(1))
    assert spread.stats.hits.total() == len(used)
    assert set(spread.stats.misses) == used
    assert spread.stats.misses.total() == len(used)


@pytest.mark.parametrize("where", ["begin", "finish"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_what_a_worker_fails_to_compute_is_computed_at_home(installed, where, tokens):
    worker = FakeWorker(installed, EVERYTHING)
    spread, alone = runner(installed, 2, workers=[worker]), runner(installed, 8)
    inputs = routing(tokens)
    spread.run(0, *inputs)
    worker.fails_at = where
    assert torch.equal(spread.run(1, *inputs), alone.run(1, *inputs))
    assert len(worker.sent) == 2
    assert torch.equal(spread.run(0, *inputs), alone.run(0, *inputs))
    assert len(worker.sent) == 2  # it is not asked again in this turn
    worker.fails_at = None
    spread.begin_turn()
    assert torch.equal(spread.run(0, *inputs), alone.run(0, *inputs))
    assert len(worker.sent) == 3


def test_a_copy_is_loaded_while_the_worker_computes_and_takes_half_of_the_work_then(installed):
    worker = FakeWorker(installed, EVERYTHING)
    copies = [ExpertKey(0, expert) for expert in range(4)]
    spread, alone = runner(installed, 8, workers=[worker], copies=copies), runner(installed, 8)
    inputs = routing(64)
    for key in copies:
        spread.ram.request([key])
        spread.ram.ready(key)
    assert torch.equal(spread.run(0, *inputs), alone.run(0, *inputs))
    assert len(worker.sent[0]) == 2


def test_the_tier_of_an_expert_is_that_of_its_nearest_copy(installed):
    worker = FakeWorker(installed, EVERYTHING[:4])
    spread = runner(installed, 4, workers=[worker], copies=EVERYTHING[:1])
    assert spread.slots_by_tier == {"host": 4, "worker": 4}
    assert {spread.tier(key) for key in EVERYTHING[:4]} == {"worker"}
    assert {spread.tier(key) for key in EVERYTHING[4:]} == {"disk"}
    spread.ram.request(EVERYTHING[:1])
    spread.ram.ready(EVERYTHING[0])
    assert spread.tier(EVERYTHING[0]) == "host"
    worker.works = False
    assert spread.tier(EVERYTHING[1]) == "disk"
    assert spread.slots_by_tier == {"host": 4, "worker": 0}


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_experts_of_several_layers_are_predicted_for_a_token_and_of_one_for_a_prompt(
    installed, tokens
):
    next_routers = Mock(return_value=torch.tensor([[3]]))
    looking_ahead = runner(installed, 8, next_routers=next_routers)
    looking_ahead.run(0, *routing(tokens))
    (layer, _, depth), _ = next_routers.call_args
    assert (layer, depth) == (0, 3 if tokens == 1 else 1)
    assert looking_ahead.ram.state(ExpertKey(1, 3)) != MISSING


def test_counts_that_were_read_stay_and_the_next_ones_have_all_later_uses(installed):
    """A benchmark kept the counts, of which late ones were missing: it told 0% hits."""
    holder = runner(installed, 8)
    before = holder.stats
    holder.note_hits(0, [[3, 1], [2, 0]])
    since = holder.stats.since(before)
    assert not before.hits
    assert since.hits == dict.fromkeys([(0, 3), (0, 1), (1, 2), (1, 0)], 1)


def test_nothing_is_predicted_while_all_experts_are_in_memory(installed):
    next_routers = Mock()
    holder = runner(installed, 8, next_routers=next_routers)
    for key in EVERYTHING:
        holder.load(key, [])
    holder.run(0, *routing(1))
    next_routers.assert_not_called()


def test_with_little_memory_a_layer_is_computed_after_a_read_that_failed(installed):
    """Experts that came meanwhile had more slots than were left, and the pass ended."""
    failed = list[ExpertKey]()

    def read(key: ExpertKey, block: torch.Tensor, start: int) -> None:
        if key == EVERYTHING[0] and not failed:
            failed.append(key)
            raise OSError("no bytes")
        installed.read_expert(*key, block, start)

    few, alone = runner(installed, 8, read), runner(installed, 8)
    ram = few.ram
    ram.request(EVERYTHING[:4])
    for key in EVERYTHING[1:4]:
        ram.wait(key)
    while not ram.has_ended(EVERYTHING[0]):  # a wait for it would take it out of the cache
        time.sleep(0.001)
    assert failed
    ram.resize(2)
    inputs = routing(9, choices=3)
    assert torch.equal(few.run(0, *inputs), alone.run(0, *inputs))


def test_a_layer_is_in_memory_whose_experts_came_after_a_pass_was_interrupted(installed):
    """They counted as on their way until each was chosen again, and tokens took longer."""
    both, layer = runner(installed, 8), EVERYTHING[:4]
    ram = both.ram
    ram.request(layer)
    for key in layer:
        ram.wait(key)
    both.run(0, *routing(1))
    assert len(both.resident([layer])) == 1
