"""The tiers of experts with GPUs on paper, put together without a model around them."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from paper_tools import settled, speeds
from served_workers import hello_of

from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.options import LoadOptions
from mixchat.base.progress import Note
from mixchat.base.quantities import MemoryBudget
from mixchat.experts import vram as vram_module
from mixchat.experts.cache import ExpertKey
from mixchat.experts.gpu_experts import GpuExperts
from mixchat.experts.placement import Placement
from mixchat.experts.vram import VramSlots
from mixchat.loading import tiers
from mixchat.loading.served_experts import ServedExperts
from mixchat.loading.tiers import build_experts, moe_layers
from mixchat.loading.workers import ExpertShare
from mixchat.weights.format.installed_model import InstalledModel

EVERYTHING = [ExpertKey(*key) for key in product(range(2), range(4))]
GPUS = [torch.device("paper", number) for number in range(2)]

Install = Callable[..., Path]


@pytest.fixture(scope="module")
def installed(make_checkpoint: Install, install: Install) -> Iterator[InstalledModel]:
    """Two layers of four experts in fp32."""
    directory = install(make_checkpoint(std=0.05, stored_as="float32"), quant_type="none")
    with InstalledModel(directory) as installed:
        yield installed


def placed(slots: Sequence[int], layers: Sequence[int], in_ram: int = 8) -> Placement:
    first, *others = slots
    return Placement(first, in_ram, 8, other_slots=tuple(others), layers=tuple(layers))


def build(
    installed: InstalledModel,
    placement: Placement,
    note: Note = lambda text: None,
    share: ExpertShare | None = None,
) -> GpuExperts:
    """Return the experts, once they are where they are to be."""
    devices = GPUS[: len(placement.layers)]
    experts = build_experts(
        installed, share or ExpertShare(placement), devices, note, predicts=False
    )
    assert isinstance(experts, GpuExperts)
    experts.fill([ExpertKey(layer, expert) for layer in range(2) for expert in range(4)])
    while experts.is_filling:
        time.sleep(0.001)
    experts.publish()
    return experts


def on_gpus(experts: GpuExperts) -> set[ExpertKey]:
    return {key for vram in experts.gpus for key in vram.keys}


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    selected = torch.rand(tokens, 4, generator=generator).argsort()[:, :2]
    return torch.randn(tokens, 64, generator=generator), selected


def is_right(installed: InstalledModel, experts: GpuExperts | ServedExperts, layer: int) -> bool:
    """Return whether some rows get what the CPU alone gives them, within rounding."""
    alone = build_experts(installed, ExpertShare(Placement(8, 0, 8)), [torch.device("cpu")], print)
    for tokens in (1, 20):
        x, selected = routing(tokens)
        expected = alone.compute(layer, x, selected).outputs
        if isinstance(experts, GpuExperts):
            found = experts.compute(layer, x, selected).outputs.cpu()
        else:
            choices = [(int(expert), 1) for expert in selected[0]]
            found = experts.compute(layer, choices, x[:1], True, lambda: None)
            expected = alone.compute(layer, x[:1], selected[:1]).outputs
        if (found - expected).norm() > 1e-5 * expected.norm():
            return False
    return True


def test_each_gpu_has_layers_of_its_own(paper, installed):
    experts = build(installed, placed((3, 2), (1, 1)))
    assert [(vram.device.index, vram.layers, vram.slots) for vram in experts.gpus] == [
        (0, range(1), 3),
        (1, range(1, 2), 2),
    ]
    assert Counter(map(experts.tier, EVERYTHING)) == {"device": 3, "other-device": 2, "host": 3}
    assert all(is_right(installed, experts, layer) for layer in range(2))


def test_a_gpu_without_layers_is_said_not_to_be_used(paper, installed):
    notes: list[str] = []
    experts = build(installed, placed((8, 0), (2, 0)), notes.append)
    assert notes == ["paper:1 is not used: it has too little memory free"]
    assert [vram.device.index for vram in experts.gpus] == [0]


def test_layers_without_experts_are_no_layers_of_slots(paper, make_checkpoint, install):
    """dots1 begins with a dense layer."""
    directory = install(
        make_checkpoint(model_type="dots1", num_hidden_layers=3, moe_intermediate_size=128)
    )
    with InstalledModel(directory) as model:
        dense = model.config.first_k_dense_replace
        assert dense == 1
        assert moe_layers(model.config, placed((0, 8), (1, 2))) == [range(0, 0), range(0, 2)]
        assert moe_layers(model.config, placed((4, 4), (2, 1))) == [range(0, 1), range(1, 2)]
        notes: list[str] = []
        experts = build(model, placed((0, 8), (1, 2)), notes.append)
    assert [(vram.device.index, vram.layers) for vram in experts.gpus] == [(1, range(2))]
    assert notes == []


def test_a_gpu_begins_with_the_experts_that_were_used_most_before(paper, installed, monkeypatch):
    uses = {EVERYTHING[3]: 9, EVERYTHING[6]: 5, EVERYTHING[1]: 1}
    monkeypatch.setattr(tiers, "saved_uses", lambda path: uses)
    assert on_gpus(build(installed, placed((2,), (2,)))) == {EVERYTHING[3], EVERYTHING[6]}


def test_a_gpu_holds_no_expert_that_is_left_to_workers(paper, installed):
    placement = placed((8,), (2,))
    here = frozenset(EVERYTHING[::3])
    assert on_gpus(build(installed, placement, share=ExpertShare(placement, here))) == here


@pytest.mark.parametrize("is_measured", [False, True])
def test_the_bus_and_the_cpu_are_as_fast_as_measured_or_as_estimated(
    paper, installed, monkeypatch, is_measured
):
    measured = speeds(copy=1e9, expert=0.25) if is_measured else None
    monkeypatch.setattr(tiers, "saved_speeds", lambda *_: measured)
    monkeypatch.setattr(tiers, "estimated_speeds", lambda *_: speeds(copy=2e9, expert=0.5))
    experts = build(installed, placed((2,), (2,)))
    bus, row = (1e9, 0.25) if is_measured else (2e9, 0.5)
    assert experts._copy_seconds(0) == installed.blueprint.expert.stride / bus
    assert experts._host_seconds(0, 1) == row


def test_each_gpu_takes_the_memory_that_it_was_said_to_take(paper, installed):
    size = installed.blueprint.expert.stride
    settled(paper)
    before = [paper.memory(device).taken for device in GPUS]
    experts = build(installed, placed((3, 2), (1, 1)))
    for device, was, slots in zip(GPUS, before, (3, 2), strict=True):
        taken = paper.memory(device).taken - was
        assert (slots + 2) * size <= taken <= (slots + 2) * size + 1000
    assert experts.bytes_held == 8 * size


@pytest.mark.parametrize(("fail_at", "slots"), [(1, 4), (6, 4)])
def test_a_gpu_with_less_memory_than_it_says_holds_half(paper, installed, fail_at, slots):
    notes: list[str] = []
    paper.allocations, paper.fail_at = 0, fail_at
    experts = build(installed, placed((8,), (2,)), notes.append)
    assert notes == [f"paper:0 has less memory than it says: it holds {slots} experts"]
    assert experts.slots_by_tier == {"device": slots, "host": 8}
    assert is_right(installed, experts, 0)


def test_a_gpu_that_holds_no_two_experts_after_all_is_named(paper, installed, monkeypatch):
    def slots(device: torch.device, *arguments: Any) -> VramSlots:
        if device.index == 1:
            raise torch.OutOfMemoryError("paper out of memory")
        return VramSlots(device, *arguments)

    monkeypatch.setattr(vram_module, "VramSlots", slots)
    with pytest.raises(ResourceError, match="paper:1 has less memory than it says: not even two"):
        build(installed, placed((3, 3), (1, 1)))


def served(
    installed: InstalledModel, *slots: int, in_ram: int = 2, note: Note = lambda text: None
) -> ServedExperts:
    """Return the experts of a worker with so many slots on each GPU."""
    size = installed.blueprint.expert.stride
    # Two more pass a prompt's experts, unless all are held.
    budgets = tuple(MemoryBudget(size=(count + 2) * size) for count in slots)
    options = LoadOptions(MemoryBudget(size=in_ram * size), budgets)
    return ServedExperts(installed, options, GPUS[: len(slots)], note)


def hold(worker: ServedExperts, keys: Sequence[ExpertKey]) -> None:
    worker.hold(keys)
    while worker.load_next():
        pass


def test_a_worker_spreads_what_a_chat_lets_it_hold_over_its_gpus(paper, installed):
    paper.devices = 2
    worker = served(installed, 1, 1)
    assert worker.slots == 4
    for exact, chosen in product((False, True), ((0, 2), (1, 3))):
        worker.begin(hello_of(worker, "float32", exact))
        keys = [ExpertKey(layer, expert) for layer in range(2) for expert in chosen]
        hold(worker, keys)
        experts: Any = worker._experts
        assert Counter(map(experts.tier, keys)) == {"device": 1, "other-device": 1, "host": 2}
        assert all(is_right(installed, worker, layer) for layer in range(2))


def test_a_worker_s_gpu_that_runs_out_of_memory_holds_fewer_experts(paper, installed, monkeypatch):
    """Each answer lost the worker at the same place, since the next chat found it as full again."""
    notes: list[str] = []
    worker = served(installed, 3, note=notes.append)
    worker.begin(hello_of(worker, "float32"))
    hold(worker, EVERYTHING[:4])
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    request: Any = (0, [(0, 1), (2, 1)], x, True, lambda: None)
    expected = worker.compute(*request)
    paper.allocations, paper.fail_at = 0, 2
    assert torch.allclose(worker.compute(*request), expected, rtol=1e-4, atol=1e-6)
    assert notes == ["GPU 0 ran out of memory: it holds fewer experts now"]
    paper.fail_at = None
    monkeypatch.setattr(paper.memory(GPUS[0]).allocator, "take", lambda *_: None)
    with pytest.raises(ResourceError, match="GPU 0 ran out of memory, without any expert in it"):
        worker.compute(*request)


def test_a_worker_s_budgets_are_checked(paper, installed):
    with pytest.raises(UsageError, match="too small for the device: the model needs at least"):
        served(installed, -1)
    with pytest.raises(UsageError, match=r"--host-memory .* is too small: two experts"):
        served(installed, 2, in_ram=1)
