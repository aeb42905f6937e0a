"""The tiers of experts put together.

"cpu:0" is a device to torch, and not its "cpu": it plays a GPU, with slots in a memory of its own,
RAM behind it, and the disk behind that.
"""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.base.progress import Note
from mixchat.base.quantities import MemoryBudget
from mixchat.engine.generate import Engine
from mixchat.engine.report import report_of
from mixchat.experts.compute import HostCompute
from mixchat.experts.placement import Placement
from mixchat.loading import tiers
from mixchat.loading.loader import load_engine
from mixchat.loading.workers import Share
from mixchat.planning.machine_speeds import MachineSpeeds, Measurement
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.expert import Expert
from mixchat.weights.format.installed_model import InstalledModel

GREEDY = SamplingOptions(temperature=0)
PROMPT = list(range(5, 37))
SHORT = PROMPT[:9]


def calibration(copy: float, expert: float) -> Measurement:
    """A machine on which a copy runs at `copy` bytes a second and an expert takes `expert` s."""
    speeds = MachineSpeeds(1e9, 1e9, 1e9, 1e9, copy, {"cpu": {1: expert, 8: 8 * expert}}, 1e-3)
    return Measurement(time.time(), (speeds,))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test measures this machine: everything is copied up."""
    monkeypatch.setattr(tiers, "saved_measurement", lambda *_: calibration(1e12, 1.0))


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
    return list(engine.generate(prompt, sampling=GREEDY, stop_ids=set(), max_tokens=24))


def load(
    model: Path, slots: int, host: int, expert: int, note: Note = lambda text: None, **options: Any
) -> Engine:
    """An engine on "cpu:0" with so many slots there and in RAM."""
    with InstalledModel(model) as installed:
        shared = installed.blueprint.shared_size
    context = 2 * 2 * 128 * 32 * 2  # of the 128 tokens that it can do
    return load_engine(
        model,
        LoadOptions(
            host_memory=MemoryBudget(size=host * expert),
            device_memory=(MemoryBudget(size=shared + context + slots * expert),),
            device="cpu:0",
            **options,
        ),
        note,
    )


@pytest.mark.parametrize(
    ("slots", "host"), [(2, 0), (2, 4), (3, 5), (3, 8), (6, 0), (6, 5), (8, 0), (8, 8)]
)
def test_where_experts_are_does_not_show_in_the_text(
    tiny_model, expected_in_turn, expert_size, slots, host
):
    engine = load(tiny_model, slots, host, expert_size)
    behind = {"host": host} if host and slots < 8 else {}
    assert engine.experts.slots_by_tier == {"device": slots, **behind}
    assert [text(engine), text(engine, SHORT)] == expected_in_turn
    report = report_of(engine, "tiny")
    held = [tier for layer in report.tiers for tier in layer]
    assert held.count("device") <= slots
    assert held.count("host") <= behind.get("host", 0)
    assert sum(map(sum, report.hits)) + sum(map(sum, report.misses)) > 24 * 4


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_after_loading_all_experts_come_although_no_token_is_computed(
    tiny_model, expected_in_turn, expert_size, device, free
):
    """The first prompt waited for the disk although a person had typed for ten seconds."""
    if device == "cpu":
        engine = load_engine(tiny_model, LoadOptions(device=device))
    else:
        engine = load(tiny_model, 8, 0, expert_size)
    while engine.experts.is_filling:
        time.sleep(0.001)
    held = {tier for layer in report_of(engine, "tiny").tiers for tier in layer}
    assert held == {"host" if device == "cpu" else "device"}
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


SMALL_FIRST = [("trellis3", "trellis3"), ("nf4", None)]


@pytest.mark.parametrize(
    ("layout", "forms"),
    [
        ("cpu-packed", [("trellis3", None)] * 2),
        ("cpu-packed", SMALL_FIRST),
        ("bitsandbytes", SMALL_FIRST[::-1]),
    ],
)
def test_nor_does_it_with_experts_in_3_bits_or_of_several_types(
    tiny_checkpoint, install, layout, forms
):
    model = install(tiny_checkpoint, forms, layout=layout)
    with InstalledModel(model) as installed:
        size = installed.blueprint.expert.stride
    engine = load_engine(model, LoadOptions(device="cpu"))
    expected = [text(engine), text(engine, SHORT)]
    for slots, host in ((2, 0), (2, 5), (3, 8), (8, 0)):
        engine = load(model, slots, host, size)
        assert [text(engine), text(engine, SHORT)] == expected
    for fraction in (0.35, 0.5, 0.8):
        options = LoadOptions(MemoryBudget(fraction=fraction), device="cpu")
        engine = load_engine(model, options)
        assert [text(engine), text(engine, SHORT)] == expected


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


@pytest.mark.parametrize(("device", "forms"), [("cpu", SMALL_FIRST), ("cpu:0", SMALL_FIRST[::-1])])
def test_experts_of_several_sizes_have_slots_of_their_sizes(
    tiny_checkpoint, install, forms, device
):
    """Slots of the largest size made a mix hold as few experts as the larger type alone."""
    model = install(tiny_checkpoint, forms)
    with InstalledModel(model) as installed:
        blueprint = installed.blueprint
    sizes = [blueprint.expert_of(layer).stride for layer in range(2)]
    held = 4 * sizes[0] + 3 * sizes[1]
    assert held < 7 * max(sizes)
    expected = text(load_engine(model, LoadOptions(device="cpu")))
    engine = load_engine(model, LoadOptions(MemoryBudget(size=held), device="cpu"))
    if device != "cpu":
        context = 2 * 2 * 128 * 32 * 2
        budget = MemoryBudget(size=blueprint.shared_size + context + held)
        none = MemoryBudget(size=0)
        engine = load_engine(model, LoadOptions(none, (budget,), device=device))
    assert list(engine.experts.slots_by_tier.values()) == [7]
    assert text(engine) == text(engine) == expected
    assert engine.experts.bytes_held <= held
    assert engine.experts.halve()
    assert text(engine) == expected
    if device != "cpu":  # RAM is free, so its slots come back
        assert engine.experts.bytes_held <= 3 * max(sizes)


@pytest.mark.parametrize(("slots", "free", "past"), [(8, 16, False), (8, 15, True), (7, 100, True)])
def test_experts_are_read_past_the_page_cache_unless_it_can_hold_them_for_the_next_start(
    tiny_model, expert_size, monkeypatch, slots, free, past
):
    """Through it, a model that just fit into memory was read at a third of the disk's speed."""
    asked: list[bool] = []
    monkeypatch.setattr(InstalledModel, "open_direct", lambda _: asked.append(True))
    monkeypatch.setattr(tiers.machine, "free_memory", lambda: free * expert_size)
    with InstalledModel(tiny_model) as installed:
        placement, devices = Placement(slots, 0, 8), [torch.device("cpu")]
        tiers.build_experts(installed, Share(placement), devices, "lru", print)
    assert asked == [True] * past


def test_what_is_sooner_computed_than_copied_is_computed_in_ram(
    tiny_model, expected, expert_size, monkeypatch
):
    """Both devices are one CPU here, so that the text stays the same to the byte."""
    monkeypatch.setattr(tiers, "saved_measurement", lambda *_: calibration(copy=1.0, expert=1e-9))
    computed = []
    run = HostCompute.run
    monkeypatch.setattr(
        HostCompute, "run", lambda self, key, x: computed.append(key) or run(self, key, x)
    )
    engine = load(tiny_model, 2, 8, expert_size)
    assert text(engine) == expected
    moved = engine.experts.stats.bytes_moved
    assert text(engine) == expected
    assert len(computed) > 24
    # All are in RAM by now, and nothing goes up any more but what was predicted.
    assert engine.experts.stats.bytes_moved <= moved + 8 * expert_size


def test_a_machine_with_a_gpu_is_measured_at_the_first_start(
    tiny_model, expected, expert_size, monkeypatch
):
    monkeypatch.setattr(tiers, "saved_measurement", lambda *_: None)
    monkeypatch.setattr(tiers, "measure_machine", lambda *_: calibration(1e12, 1.0))
    notes: list[str] = []
    assert text(load(tiny_model, 2, 8, expert_size, note=notes.append)) == expected
    assert notes == ["measuring this machine, 20 s at most (only the first time)"]


def test_an_expert_that_left_ram_in_the_meantime_is_fetched_after_all(
    tiny_model, expected, expert_size, monkeypatch
):
    monkeypatch.setattr(HostCompute, "choose", lambda self, missing: list(missing))
    engine = load(tiny_model, 3, 4, expert_size)
    assert text(engine) == expected


def test_of_two_experts_one_is_copied_while_the_other_is_computed():
    class Tier:
        def tier(self, key):
            return "disk" if key == "on disk" else "host"

    host: Any = HostCompute(
        Tier(),
        copy_seconds=0.004,
        host_seconds=lambda rows: 0.003 * rows,
    )
    assert len(host.choose({"a": 1, "b": 1})) == 1
    assert host.choose({"many rows": 50, "few": 1}) == ["few"]
    assert host.choose({"a": 2}) == []  # 6 ms here, 4 ms to copy
    assert host.choose({"a": 1}) == ["a"]
    assert host.choose({"on disk": 1}) == []
    assert host.choose({}) == []


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


def test_what_the_cpu_cannot_compute_as_it_lies_is_copied_up(
    tiny_model, expected, expert_size, monkeypatch
):
    with InstalledModel(tiny_model) as installed:
        packed = installed.blueprint.expert.gate_up.packed
    other = "bitsandbytes" if packed else "cpu-packed"
    assert installed.blueprint.in_layout(other).expert != installed.blueprint.expert
    monkeypatch.setattr(Blueprint, "computed_on", lambda self, device: self.in_layout(other))
    monkeypatch.setattr(tiers, "saved_measurement", lambda *_: calibration(copy=1.0, expert=1e-9))
    with InstalledModel(tiny_model) as installed:
        assert tiers._host_compute(installed, None, torch.device("cpu", 0), print) is None


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
    assert (
        len(engine.experts._devices[0].fetcher._store._slots) == 2
    )  # the memory of the others has gone
    free["bytes"] = 10**12
    assert text(engine) == expected
    assert engine.experts.slots == 8
