"""The tiers of experts put together, without a GPU."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.engine.generate import Engine
from mixchat.engine.report import report_of
from mixchat.experts.placement import Placement
from mixchat.loading import tiers
from mixchat.loading.loader import load_engine
from mixchat.loading.workers import ExpertShare
from mixchat.weights.format.expert import Expert
from mixchat.weights.format.installed_model import InstalledModel

GREEDY = SamplingOptions(temperature=0)
PROMPT = list(range(5, 37))
SHORT = PROMPT[:9]


@pytest.fixture(scope="module")
def expert_size(tiny_model: Path) -> int:
    with InstalledModel(tiny_model) as installed:
        return installed.blueprint.expert.stride


@pytest.fixture(scope="module")
def expected_in_turn(tiny_model: Path) -> list[list[int]]:
    """Return the answers to two prompts, with all eight experts in RAM."""
    engine = load_engine(tiny_model, LoadOptions(device="cpu"))
    return [text(engine), text(engine, SHORT)]


@pytest.fixture(scope="module")
def expected(expected_in_turn: list[list[int]]) -> list[int]:
    """Return the answer to the first one."""
    return expected_in_turn[0]


def text(engine: Engine, prompt: list[int] = PROMPT) -> list[int]:
    engine.forget()  # tokens of a prompt may be rounded otherwise together than alone
    return list(engine.generate(prompt, sampling=GREEDY, stop_ids=set(), max_tokens=24))


SMALL_FIRST = [("trellis3", "trellis3"), ("nf4", None)]
FORMS = {
    "nf4": None,
    "trellis3": [("trellis3", None)] * 2,
    "small first": SMALL_FIRST,
    "large first": SMALL_FIRST[::-1],
}


@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_where_experts_are_does_not_show_in_the_text(tiny_checkpoint, install, forms):
    model = install(tiny_checkpoint, forms)
    with InstalledModel(model) as installed:
        size = installed.blueprint.expert.stride
    engine = load_engine(model, LoadOptions(device="cpu"))
    expected = [text(engine), text(engine, SHORT)]
    budgets = [MemoryBudget(size=slots * size) for slots in (2, 3, 6, 8)]
    budgets += [MemoryBudget(fraction=fraction) for fraction in (0.35, 0.5, 0.8)]
    for budget in budgets:
        engine = load_engine(model, LoadOptions(budget, device="cpu"))
        assert [text(engine), text(engine, SHORT)] == expected
        report = report_of(engine, "tiny")
        held = [tier for layer in report.tiers for tier in layer]
        assert held.count("host") <= engine.experts.slots_by_tier["host"]
        assert sum(map(sum, report.hits)) + sum(map(sum, report.misses)) > 24 * 4


def test_after_loading_all_experts_come_although_no_token_is_computed(
    tiny_model, expected_in_turn, free
):
    """The first prompt waited for the disk although a person had typed for ten seconds."""
    engine = load_engine(tiny_model, LoadOptions(device="cpu"))
    while engine.experts.is_filling:
        time.sleep(0.001)
    assert {tier for layer in report_of(engine, "tiny").tiers for tier in layer} == {"host"}
    assert engine.experts.stats.bytes_moved == 8 * engine.blueprint.expert.nbytes
    assert [text(engine), text(engine, SHORT)] == expected_in_turn
    assert not engine.experts.stats.misses


def test_a_damaged_expert_is_an_error_when_it_is_needed_and_not_before(
    tiny_model, expected, monkeypatch, free
):
    def fail(*_: Any, **__: Any) -> None:
        raise CheckpointError("cut short")

    with monkeypatch.context() as patch:
        patch.setattr(InstalledModel, "read_expert", fail)
        engine = load_engine(tiny_model, LoadOptions(device="cpu"))
        while engine.experts.is_filling:
            time.sleep(0.001)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="cut short"):
                text(engine)
    assert text(engine) == expected


def test_a_layer_is_not_computed_in_the_form_of_another(make_checkpoint, install, monkeypatch):
    """After a layer in one type, the next layer's codes were read as if they had that type, too.

    It happened while a mix decoded and some experts were not in memory, and gave wrong text.
    """
    model = install(make_checkpoint(intermediate_size=128), [("trellis3", None), ("nf4", None)])
    found = []
    for has_stages in (Expert.has_stages, lambda *_: False):
        monkeypatch.setattr(Expert, "has_stages", has_stages)
        for fraction in (0.5, 1.0):
            options = LoadOptions(MemoryBudget(fraction=fraction), device="cpu")
            found.append(text(load_engine(model, options)))
    assert found == found[:1] * 4


@pytest.mark.parametrize("forms", [SMALL_FIRST, SMALL_FIRST[::-1]])
def test_experts_of_several_sizes_have_slots_of_their_sizes(tiny_checkpoint, install, forms):
    """Slots of the largest size made a mix hold as few experts as the larger type alone."""
    model = install(tiny_checkpoint, forms)
    with InstalledModel(model) as installed:
        blueprint = installed.blueprint
    sizes = [blueprint.expert_of(layer).stride for layer in range(2)]
    held = 4 * sizes[0] + 3 * sizes[1]
    assert held < 7 * max(sizes)
    expected = text(load_engine(model, LoadOptions(device="cpu")))
    engine = load_engine(model, LoadOptions(MemoryBudget(size=held), device="cpu"))
    assert engine.experts.slots_by_tier == {"host": 7}
    assert text(engine) == text(engine) == expected
    assert engine.experts.bytes_held <= held


SLOW, FAST = 0.5e9, 3e9  # bytes a second


@pytest.mark.parametrize(
    ("slots", "free", "rate", "past"),
    [
        (8, 16, SLOW, False),
        (8, 16, FAST, True),
        (8, 16, None, True),
        (8, 15, SLOW, True),
        (7, 100, SLOW, True),
    ],
)
def test_experts_are_read_past_the_page_cache_unless_it_keeps_a_slow_disks_for_the_next_start(
    tiny_model, expert_size, monkeypatch, slots, free, rate, past
):
    """Through it, a model that just fit into memory was read at a third of the disk's speed."""
    asked: list[bool] = []
    measured = None if rate is None else SimpleNamespace(disk_idle=rate)
    monkeypatch.setattr(InstalledModel, "open_direct", lambda _: asked.append(True))
    monkeypatch.setattr(tiers, "saved_speeds", lambda *_: measured)
    monkeypatch.setattr(tiers.machine, "free_memory", lambda: free * expert_size)
    with InstalledModel(tiny_model) as installed:
        placement, devices = Placement(slots, 0, 8), [torch.device("cpu")]
        tiers.build_experts(installed, ExpertShare(placement), devices, print)
    assert asked == [True] * past


@pytest.mark.parametrize(("rate", "layers"), [(5e8, 0), (7e8, 3), (None, 3)])
def test_experts_are_predicted_unless_the_disk_is_too_slow_for_wrong_predictions(
    tiny_model, monkeypatch, rate, layers
):
    monkeypatch.setattr(tiers, "saved_speeds", lambda *_: SimpleNamespace(disk_idle=rate))
    with InstalledModel(tiny_model) as installed:
        placement, devices = Placement(4, 0, 8), [torch.device("cpu")]
        experts = tiers.build_experts(installed, ExpertShare(placement), devices, print)
    assert experts._layers_ahead == layers


def test_a_disk_that_fails_ends_the_turn_and_not_the_chat(tiny_model, expected, monkeypatch):
    engine = load_engine(tiny_model, LoadOptions(MemoryBudget(fraction=0.4), device="cpu"))
    real, reads = os.preadv, iter(range(10**6))

    def sometimes(*arguments):
        if next(reads) % 3 == 2:
            raise OSError(5, "Input/output error")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", sometimes)
        for _ in range(3):
            with pytest.raises(CheckpointError, match=r"(shared|experts-00\d).*Input/output error"):
                text(engine)
    assert text(engine) == expected


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The memory that counts as free, checked at each step."""
    free = {"bytes": 10**12}
    monkeypatch.setattr("mixchat.base.machine.free_memory", lambda: free["bytes"])
    monkeypatch.setattr("mixchat.experts.memory.INTERVAL", 0)
    return free


def test_slots_are_given_back_when_memory_shrinks_and_come_back_with_it(tiny_model, expected, free):
    engine = load_engine(tiny_model, LoadOptions(device="cpu"))
    assert text(engine) == expected
    assert engine.experts.slots == 8
    free["bytes"] = 0
    assert text(engine) == expected
    assert engine.experts.slots == 2
    holder: Any = engine.experts
    assert len(holder.ram._memory._slots) == 2  # the memory of the others has gone
    free["bytes"] = 10**12
    assert text(engine) == expected
    assert engine.experts.slots == 8
