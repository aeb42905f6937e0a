import contextlib
import threading
from itertools import product
from pathlib import Path

import pytest
import torch
from expert_doubles import routing, runner
from source_tools import disk

from mixchat.base.errors import ResourceError
from mixchat.experts import compute
from mixchat.experts.cache import ExpertKey
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.load_queue import ExpertLoad, LoadQueue
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.weights.format.expert import compute_together
from mixchat.weights.format.installed_model import InstalledModel

needs_kernels = pytest.mark.skipif(not kernels_available(), reason="the kernels need AVX2")


def slow(installed: InstalledModel, layer: int, *inputs: torch.Tensor) -> torch.Tensor:
    """Token by token, choice by choice, from freshly read experts."""
    hidden, selected, weights = inputs
    one = runner(installed, 8)
    rows = []
    for token in range(hidden.shape[0]):
        total = torch.zeros(64)
        for choice in range(selected.shape[1]):
            key = ExpertKey(layer, int(selected[token, choice]))
            one.ram.request([key])
            expert = one.ram.ready(key)
            total += expert(hidden[token : token + 1])[0].float() * weights[token, choice]
        rows.append(total)
    return torch.stack(rows).to(hidden.dtype)


@pytest.fixture
def installed(tiny_model: Path) -> InstalledModel:
    return InstalledModel(tiny_model)


@pytest.mark.parametrize(("choices", "slots"), [(1, 8), (2, 2), (3, 3)])
def test_grouping_by_expert_equals_going_token_by_token(installed, slots, choices):
    inputs = routing(17, choices)
    result = runner(installed, slots).run(1, *inputs)
    torch.testing.assert_close(result, slow(installed, 1, *inputs), rtol=0.01, atol=1e-3)


def test_the_size_of_the_cache_and_its_state_do_not_show_in_the_result(installed):
    runners = [runner(installed, slots) for slots in (2, 3, 5, 8)]
    for seed in range(20):
        inputs = routing(1 + seed % 5, seed=seed)
        results = [each.run(seed % 2, *inputs) for each in runners]
        assert all(torch.equal(results[0], other) for other in results[1:])
    assert runners[0].stats.misses.total() > runners[3].stats.misses.total() == 8


def test_experts_in_the_cache_are_used_before_others_evict_them(installed):
    """Walking 0, 1, 2, 3 with two slots in plain LRU order would never hit."""
    small = runner(installed, 2)
    inputs = routing(64)
    small.run(0, *inputs)
    assert (small.stats.misses.total(), small.stats.hits.total()) == (4, 0)  # each once
    small.run(0, *inputs)
    assert small.stats.hits.total() == 2
    assert small.stats.bytes_moved == 6 * installed.blueprint.expert.nbytes


@needs_kernels
@pytest.mark.parametrize("quant_type", ["nf4", "trellis3"])
@torch.inference_mode()
def test_rows_of_several_answers_have_the_bits_that_each_has_alone(
    make_checkpoint, install, quant_type
):
    """A program runs again and again, with other experts and other counts of rows for each."""
    installed = InstalledModel(
        install(make_checkpoint(intermediate_size=128), quant_type=quant_type)
    )
    whole, few = runner(installed, 8), runner(installed, 3)
    for layer, expert in product((0, 1), range(4)):
        whole.load(ExpertKey(layer, expert), [])
    for seed, tokens in enumerate((1, 5, 8, 5, 2, 8, 1)):
        inputs = routing(tokens, 1 + seed % 3, seed)
        rows = zip(*(torch.split(tensor, 1) for tensor in inputs), strict=True)
        expected = torch.cat([runner(installed, 8).run(seed % 2, *row) for row in rows])
        for each in (whole, few):
            assert torch.equal(each.run(seed % 2, *inputs, exact=True), expected)
    assert whole.stats.misses.total() == 8


@needs_kernels
@torch.inference_mode()
def test_a_layer_in_memory_counts_each_chosen_expert_once(make_checkpoint, install):
    installed = InstalledModel(install(make_checkpoint(intermediate_size=128)))
    one, inputs = runner(installed, 8), routing(6)
    for expert in range(4):
        one.load(ExpertKey(1, expert), [])
    before = one.stats
    one.run(1, *inputs, exact=True)
    hits = one.stats.since(before).hits
    assert hits == {ExpertKey(1, expert): 1 for expert in set(inputs[1].flatten().tolist())}


@needs_kernels
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("slots", [3, 8])  # for the four experts that are needed
def test_a_prompts_experts_are_computed_together_with_the_same_bits(
    make_checkpoint, install, slots, exact, monkeypatch
):
    installed = InstalledModel(install(make_checkpoint(intermediate_size=128)))
    inputs, together = routing(150), []

    def watched(experts, *rest, **how):
        together.append(len(experts))
        compute_together(experts, *rest, **how)

    monkeypatch.setattr(compute, "compute_together", watched)
    results = []
    for rows in (0, 150, 10**6):  # one expert has up to 110 rows
        monkeypatch.setattr(compute, "_MAX_X_NUMBERS", rows * 64)
        one = runner(installed, slots)
        results += [one.run(1, *inputs, exact=exact) for _ in range(2)]
    assert all(torch.equal(results[0], other) for other in results)
    assert (max(together) == 4) == (slots == 8)


def test_the_outputs_of_a_layer_take_the_memory_of_the_layer_before(installed):
    one, inputs = runner(installed, 8), [routing(17, seed=seed) for seed in (1, 2)]
    expected = [runner(installed, 8).run(1, *each) for each in inputs]
    with torch.inference_mode():
        first = one.run(1, *inputs[0])
        memory = one._memory
    second = one.run(1, *inputs[1])
    assert memory is one._memory is not None
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])
    one.run(1, *routing(16))
    assert one._memory is not memory
    one.resident([])
    assert one._memory is None  # while an answer is decoded


def test_outputs_are_in_the_order_of_a_tokens_choices():
    selected = torch.tensor([[3, 1], [1, 0], [3, 2], [1, 3]])
    rows = LayerRows(7, torch.arange(4.0)[:, None].expand(4, 8), selected)
    assert [(key.expert, count) for key, count in rows.counts.items()] == [
        (1, 3),
        (3, 3),
        (0, 1),
        (2, 1),
    ]
    for key in rows.counts:
        rows.put(key, rows.of(key) + 10 * key.expert)
    assert rows.outputs[:, 0].tolist() == [30, 10, 11, 1, 32, 22, 13, 33]
    weights = torch.tensor([[1.0, 2.0]]).expand(4, 2)
    assert rows.combine(weights)[:, 3].tolist() == [50, 13, 76, 79]


def test_an_interrupt_while_an_expert_is_on_its_way_harms_nothing(installed, monkeypatch):
    expected = [runner(installed, 8).run(0, *routing(3, seed=seed)) for seed in range(6)]
    interrupted = runner(installed, 3)

    def interrupt(load):
        raise KeyboardInterrupt

    for seed in range(6):
        with monkeypatch.context() as patch:
            patch.setattr(ExpertLoad, "wait", interrupt)
            with contextlib.suppress(KeyboardInterrupt):
                interrupted.run(0, *routing(3, seed=seed))
        assert torch.equal(interrupted.run(0, *routing(3, seed=seed)), expected[seed])


def test_a_prompts_experts_are_computed_in_a_few_groups_as_they_arrive(installed, monkeypatch):
    """Each group's threads wait for each other, while reads keep the cores busy. Computing Qwen3's
    experts as they came took two fifths of a cold start."""
    monkeypatch.setattr(compute, "_GROUPS", 2)
    read_now, together = disk(installed), compute.HostCompute._compute_together
    groups: list[int] = []
    begun = threading.Event()

    def read(key: ExpertKey, block: torch.Tensor, start: int) -> None:
        if key.expert:  # until the first expert is computed alone, as it must not be
            begun.wait(0.2)
        read_now(key, block, start)

    def note(self: compute.HostCompute, rows: LayerRows, keys: list[ExpertKey]) -> None:
        groups.append(len(keys))
        begun.set()
        together(self, rows, keys)

    monkeypatch.setattr(compute.HostCompute, "_compute_together", note)
    runner(installed, 8, read).run(0, *routing(64))
    assert groups[0] >= 2


@pytest.mark.parametrize(
    ("owner", "method", "error", "raised"),
    [
        (LoadQueue, "begin", KeyboardInterrupt(), KeyboardInterrupt),
        (threading.Thread, "start", RuntimeError("can't start new thread"), ResourceError),
    ],
    ids=["interrupt", "no thread"],
)
def test_a_transfer_that_is_not_begun_does_not_harm_the_next_answer(
    installed, monkeypatch, owner, method, error, raised
):
    """The cache knows the expert then, and nobody is bringing it."""
    failing = runner(installed, 3)

    def refuse(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, refuse)
        with pytest.raises(raised):
            failing.run(0, *routing(3))
    assert torch.equal(failing.run(0, *routing(3)), runner(installed, 8).run(0, *routing(3)))
