"""Experts on GPUs on paper in front of RAM: the same outputs, wherever each is computed."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import paper_gpu
import pytest
import torch
from expert_doubles import FakeWorker, runner
from paper_runtime import PaperRuntime
from vram_doubles import settle

from mixchat.base import interrupts
from mixchat.base.errors import CheckpointError, ResourceError
from mixchat.experts.cache import ExpertKey
from mixchat.experts.dispatcher import Dispatcher
from mixchat.experts.gpu_experts import GpuExperts
from mixchat.experts.memory import within_memory
from mixchat.experts.vram import VramTier
from mixchat.weights.format.installed_model import InstalledModel

GPU, SECOND = torch.device("paper", 0), torch.device("paper", 1)
EVERYTHING = [ExpertKey(*key) for key in product(range(2), range(4))]
# Seconds of a copy, and of a row on the CPU.
SPLITS = {"by the bus": (0.0, 1.0), "by the CPU": (1.0, 0.0), "by both": (4.0, 1.0)}
TOLERANCE = 1e-5  # in fp32, relative


@pytest.fixture
def paper() -> Iterator[PaperRuntime]:
    with paper_gpu.in_place_of_cuda() as runtime:
        yield runtime


@pytest.fixture(scope="module")
def installed(
    make_checkpoint: Callable[..., Path], install: Callable[..., Path]
) -> Iterator[InstalledModel]:
    """Two layers of four experts in fp32."""
    checkpoint = make_checkpoint(std=0.05, stored_as="float32")
    with InstalledModel(install(checkpoint, quant_type="none")) as installed:
        yield installed


def routing(tokens: int, choices: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return hidden states, experts and weights on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 64, generator=generator)
    largest, selected = torch.randn(tokens, 4, generator=generator).topk(choices, dim=-1)
    return hidden, selected, largest.softmax(-1)


def vram_of(
    installed: InstalledModel,
    host: Dispatcher,
    slots: int,
    layers: range = range(2),
    device: torch.device = GPU,
) -> VramTier:
    blueprint = installed.blueprint
    strides = [blueprint.expert_of(layer).stride for layer in layers]
    return VramTier(
        device,
        layers,
        4,
        blueprint.expert_of,
        [strides[slot % len(strides)] for slot in range(slots)],
        lambda key, block, start: installed.read_expert(*key, block, start),
        host.ram,
    )


def on_gpus(
    installed: InstalledModel,
    slots: Sequence[int],
    in_ram: int = 8,
    split: tuple[float, float] = SPLITS["by both"],
    **options: Any,
) -> GpuExperts:
    """Return experts with so many slots on one GPU, or on two with a layer each."""
    host = runner(installed, in_ram, **options)
    gpus = [vram_of(installed, host, slots[0])]
    if len(slots) == 2:
        gpus = [
            vram_of(installed, host, count, range(layer, layer + 1), torch.device("paper", layer))
            for layer, count in enumerate(slots)
        ]
    for vram in gpus:
        vram.policy.exclude(key for key in host.on_workers if key.layer in vram.layers)
    copy, row = split
    return GpuExperts(
        host,
        gpus,
        copy_seconds=lambda layer: copy,
        host_seconds=lambda layer, rows: rows * row,
    )


def arrived(experts: GpuExperts) -> GpuExperts:
    """Fill the slots, and wait for all."""
    experts.fill(EVERYTHING)
    for vram in experts.gpus:
        settle(vram)
    while experts.is_filling:
        pass
    experts.publish()
    return experts


def compute(experts: GpuExperts, layer: int, *inputs: torch.Tensor) -> torch.Tensor:
    device = experts._by_layer[layer].device
    with torch.inference_mode():
        on_device = [each.to(device) for each in inputs]
        return experts.run(layer, *on_device).cpu()  # type: ignore[arg-type, call-arg]


def is_right(installed: InstalledModel, experts: GpuExperts, tokens: int = 17) -> bool:
    """Return whether both layers give what the CPU alone gives, within rounding."""
    alone = runner(installed, 8)
    for layer in range(2):
        inputs = routing(tokens, seed=layer)
        found, expected = compute(experts, layer, *inputs), alone.run(layer, *inputs)
        if (found - expected).norm() > TOLERANCE * expected.norm():
            return False
    return True


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize(
    ("slots", "in_ram"), [((8,), 2), ((3,), 8), ((3,), 2), ((0,), 5), ((4, 1), 2), ((2, 3), 8)]
)
def test_experts_give_what_the_cpu_gives_wherever_each_is(paper, installed, slots, in_ram, split):
    alone, experts = runner(installed, 8), arrived(on_gpus(installed, slots, in_ram, split))
    for tokens, seed in product((1, 2, 17, 40), range(2)):
        inputs = routing(tokens, seed=seed)
        for layer in range(2):
            expected = alone.run(layer, *inputs)
            found = compute(experts, layer, *inputs)
            assert (found - expected).norm() < TOLERANCE * expected.norm()


def test_experts_give_it_while_those_of_gpus_are_still_coming(paper, installed):
    experts = on_gpus(installed, (5,))
    experts.fill(EVERYTHING)
    assert is_right(installed, experts)
    assert is_right(installed, experts, tokens=1)
    settle(experts.gpus[0])
    assert is_right(installed, experts)


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("tokens", [1, 17])
def test_the_cpu_computes_no_expert_that_the_gpu_has_or_gets(
    paper, installed, monkeypatch, tokens, is_there
):
    """It computed all of them once more, and nothing but its time told."""
    experts = on_gpus(installed, (5,), in_ram=3, split=SPLITS["by the CPU"])
    computed, begun = set[ExpertKey](), threading.Event()
    host_compute, read = Dispatcher.compute, InstalledModel.read_expert

    def noted(self, layer, x, selected, **options):
        computed.update(ExpertKey(layer, expert) for expert in selected.flatten().tolist())
        begun.set()
        return host_compute(self, layer, x, selected, **options)

    def late(self, layer, expert, *place, **options):
        if ExpertKey(layer, expert) in experts.gpus[0].keys:
            begun.wait(1)  # so it comes while the layer is computed
        return read(self, layer, expert, *place, **options)

    monkeypatch.setattr(Dispatcher, "compute", noted)
    if is_there:
        arrived(experts)
    else:
        monkeypatch.setattr(InstalledModel, "read_expert", late)
        experts.fill(EVERYTHING)
    on_gpu, used = set(experts.gpus[0].keys), set[ExpertKey]()
    for layer in range(2):
        x, selected, weights = routing(tokens, seed=layer)
        compute(experts, layer, x, selected, weights)
        used.update(ExpertKey(layer, expert) for expert in selected.flatten().tolist())
    assert len(on_gpu) == 5
    assert computed == used - on_gpu


@pytest.mark.parametrize(
    ("copy", "row", "counts", "carried"),
    [
        pytest.param(4, 3, [50, 1], {0}, id="the one with many rows"),
        pytest.param(4, 3, [2], {0}, id="6 s on the CPU, 4 s to copy"),
        pytest.param(4, 3, [1], set(), id="3 s on the CPU, 4 s to copy"),
        pytest.param(4, 1, [11, 3, 0, 4], {0}, id="7 s on the CPU, 4 s to copy"),
        pytest.param(1, 0, [9, 9, 9, 9], set(), id="a fast CPU"),
        pytest.param(0, 1, [9, 9, 9, 9], {0, 1, 2, 3}, id="a fast bus"),
    ],
)
def test_the_cpu_and_the_bus_end_at_about_the_same_time(
    paper, installed, copy, row, counts, carried
):
    """Few rows are computed on the CPU, because a copy's time hangs on no rows."""
    experts, invite = on_gpus(installed, (0,), split=(copy, row)), VramTier.invite
    with patch.object(VramTier, "invite", autospec=True, side_effect=invite) as noted:
        selected = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[:, None]
        x, weights = torch.randn(len(selected), 64), torch.ones(len(selected), 1)
        compute(experts, 0, x, selected, weights)
    (_, keys), _ = noted.call_args
    assert {key.expert for key in keys} == carried


def test_the_cpu_does_not_wait_for_what_the_gpu_holds(paper, installed, monkeypatch):
    """Its rows were copied behind the experts that the GPU had been given before."""
    experts = arrived(on_gpus(installed, (4,), split=SPLITS["by the CPU"]))
    main, waited = paper.current_stream(GPU), list[tuple[int, int]]()
    host_compute = Dispatcher.compute

    def noted(self, *arguments, **options):
        waited.append((paper.host_saw[main], main.done))
        return host_compute(self, *arguments, **options)

    monkeypatch.setattr(Dispatcher, "compute", noted)
    compute(experts, 0, *routing(40))
    ((saw, done),) = waited
    assert done - saw > 5  # kernels of two experts


def test_one_token_waits_for_the_gpu_once(paper, installed):
    experts = arrived(on_gpus(installed, (8,), 2))
    inputs = [each.to(GPU) for each in routing(1)]
    experts.run(0, *inputs)  # type: ignore[arg-type, call-arg]
    paper.waits = 0
    experts.run(0, *inputs)  # type: ignore[arg-type, call-arg]
    assert paper.waits == 1


def test_uses_are_hits_if_the_gpu_held_the_expert_and_misses_otherwise(paper, installed):
    experts = arrived(on_gpus(installed, (3,)))
    assert {key for key in EVERYTHING if experts.tier(key) == "device"} == {
        (0, 0),
        (0, 1),
        (1, 0),
    }
    before = experts.stats
    hidden, _, weights = routing(3)
    selected = torch.tensor([[0, 1], [0, 2], [3, 2]])
    compute(experts, 0, hidden, selected, weights)
    experts.note_token(np.array([[1, 3], [0, 2]]))
    stats = experts.stats.since(before)
    assert stats.hits == {(0, 0): 2, (0, 1): 2, (1, 0): 1}
    assert stats.misses == {(0, 2): 2, (0, 3): 2, (1, 2): 1}
    size = installed.blueprint.expert.stride
    assert experts.stats.bytes_moved >= 3 * size


def test_each_gpu_counts_the_uses_of_its_layers(paper, installed):
    experts = arrived(on_gpus(installed, (2, 1)))
    experts.note_token(np.array([[0, 2], [3, 0]]))
    assert experts.stats.hits == {(0, 0): 1, (1, 0): 1}
    assert experts.stats.misses == {(0, 2): 1, (1, 3): 1}
    first, second = (vram.policy._uses for vram in experts.gpus)
    assert first[0].round().tolist() == [1, 0, 1, 0]
    assert second[0].round().tolist() == [1, 0, 0, 1]


def test_a_prompts_rows_count_as_one_tokens_uses(paper, installed):
    experts = arrived(on_gpus(installed, (8,), 2))
    selected = torch.tensor([[0, 1], [0, 2], [0, 2], [3, 2]])
    compute(experts, 1, torch.randn(4, 64), selected, torch.ones(4, 2))
    uses = experts.gpus[0].policy._uses[1]
    assert uses.round(decimals=2).tolist() == pytest.approx([0.75, 0.25, 0.75, 0.25])


def test_tiers_and_slots_are_told_apart(paper, installed):
    expert = installed.blueprint.expert.stride
    one = arrived(on_gpus(installed, (3,), 5))
    assert one.slots_by_tier == {"device": 3, "host": 5}
    assert one.slots == 8
    assert Counter(map(one.tier, EVERYTHING)) == {"device": 3, "host": 5}
    assert one.bytes_held == 8 * expert
    two = arrived(on_gpus(installed, (2, 3), 2))
    assert two.slots_by_tier == {"device": 2, "other-device": 3, "host": 2}
    assert list(two.slots_by_tier) == ["device", "other-device", "host"]
    assert Counter(map(two.tier, EVERYTHING)) == {"device": 2, "other-device": 3, "disk": 3}
    assert [two.holds(key) for key in EVERYTHING[:4]] == [True, True, False, False]


def test_ram_is_filled_with_what_gpus_do_not_hold(paper, installed):
    experts = arrived(on_gpus(installed, (3,), 5))
    ram = experts.ram
    assert ram.elsewhere == {(0, 0), (0, 1), (1, 0)}
    assert ram.holds_all
    assert ram.stats.bytes_moved == 5 * installed.blueprint.expert.nbytes
    ram.load(ExpertKey(0, 0), [])  # in the place of another one
    assert not ram.holds_all
    for key in EVERYTHING:
        if key not in ram.elsewhere:
            ram.load(key, [])
    assert ram.holds_all
    # An expert that leaves the GPU is missing in RAM.
    assert experts.give_way()
    assert len(ram.elsewhere) == 2
    assert not ram.holds_all


def test_experts_of_workers_are_neither_on_gpus_nor_carried_there(paper, installed, monkeypatch):
    worker = FakeWorker(installed, EVERYTHING[::2])
    experts = arrived(on_gpus(installed, (8,), split=SPLITS["by the bus"], workers=[worker]))
    on_gpu = {key for key in EVERYTHING if experts.tier(key) == "device"}
    assert on_gpu == set(EVERYTHING[1::2])
    assert is_right(installed, experts)
    assert {key for keys in worker.sent for key in keys} == set(EVERYTHING[::2])
    worker.works = False
    assert is_right(installed, experts)
    worker.works = True
    copies = on_gpus(installed, (8,), workers=[worker], copies=EVERYTHING[:3])
    assert {key for key in EVERYTHING if arrived(copies).tier(key) == "device"} == {
        *EVERYTHING[:3],
        *EVERYTHING[1::2],
    }


@pytest.mark.parametrize("slots", [(3,), (2, 3), (8,)])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_memory_may_run_out_at_any_moment_of_a_prompt(paper, installed, slots, split):
    alone = runner(installed, 8)
    inputs = routing(40)
    expected = [alone.run(layer, *inputs) for layer in range(2)]
    for after in (1, 2, 3, 5, 8, 12, 18, 25, 40):
        notes = list[str]()
        experts = on_gpus(installed, slots, split=split)
        experts.fill(EVERYTHING)
        paper.allocations, paper.fail_at = 0, after
        for layer in range(2):
            run = partial(compute, experts, layer, *inputs)
            found = within_memory(experts, run, notes.append)
            assert (found - expected[layer]).norm() < TOLERANCE * expected[layer].norm()
        paper.fail_at = None
        left = sum(vram.slots for vram in experts.gpus)
        assert left == sum(slots) - len(notes)
        assert len(notes) <= 1
        experts.begin_turn()
        assert sum(vram.slots for vram in experts.gpus) == sum(slots)
        assert not experts.ram._lent - {k for v in experts.gpus for k in v._loads}


def test_the_gpu_that_ran_out_of_memory_gives_way(paper, installed):
    experts = arrived(on_gpus(installed, (4, 4)))
    assert experts.give_way(1)
    assert [vram.slots for vram in experts.gpus] == [4, 3]
    assert experts.give_way()
    assert [vram.slots for vram in experts.gpus] == [3, 2]
    for _ in range(3):
        experts.give_way(0)
    assert not experts.give_way(0)
    assert [vram.slots for vram in experts.gpus] == [0, 2]
    assert is_right(installed, experts)


def test_a_gpu_that_runs_out_of_memory_without_experts_is_named(paper, installed):
    experts = on_gpus(installed, (2,))

    def full() -> torch.Tensor:
        raise torch.OutOfMemoryError("paper out of memory. GPU 0 has a total capacity of 4 bytes")

    with pytest.raises(ResourceError, match="GPU 0 ran out of memory, without any expert in it"):
        within_memory(experts, full, lambda text: None)


def test_ctrl_c_at_any_moment_leaves_experts_that_compute_the_same(paper, installed, monkeypatch):
    check, left = interrupts.check, 0

    def interrupted() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        check()

    monkeypatch.setattr(interrupts, "check", interrupted)
    for split in SPLITS.values():
        experts = on_gpus(installed, (3,), 3, split)
        experts.fill(EVERYTHING)
        for calls in range(1, 8):
            left = calls
            try:
                compute(experts, 0, *routing(40, seed=calls))
            except KeyboardInterrupt:
                left = 0
                assert is_right(installed, experts)
        left = 0
        settle(experts.gpus[0])
        experts.publish()
        settle(experts.gpus[0])
        experts.publish()
        assert not experts.ram._lent - set(experts.gpus[0]._loads)


def test_a_damaged_expert_is_an_error_when_it_is_needed_and_not_before(
    paper, installed, monkeypatch
):
    read = InstalledModel.read_expert

    def fail(self, layer, expert, *arguments, **options):
        if (layer, expert) == (0, 1):
            raise CheckpointError("cut short")
        read(self, layer, expert, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(InstalledModel, "read_expert", fail)
        experts = arrived(on_gpus(installed, (8,), 2))
        settle(experts.gpus[0])
        x, weights = torch.randn(1, 64), torch.ones(1, 1)
        compute(experts, 0, x, torch.tensor([[0]]), weights)
        for split in ("by the bus", "by the CPU"):
            copy, row = SPLITS[split]
            experts._copy_seconds = lambda layer, copy=copy: copy
            experts._host_seconds = lambda layer, rows, row=row: row
            with pytest.raises(CheckpointError, match="cut short"):
                compute(experts, 0, x, torch.tensor([[1]]), weights)
    assert is_right(installed, experts)


def test_a_token_that_the_decoder_computes_needs_only_what_is_missing(paper, installed):
    experts = arrived(on_gpus(installed, (3,), 5))
    assert experts.missing(0, [0, 3, 1, 2]) == [1, 3]
    assert not experts.holds_all(GPU)
    x, _, _ = routing(1)
    weights = torch.tensor([0.25, 0.75])
    row = experts.row_on_host(0, x[0], [3, 2], weights)
    expected = runner(installed, 8).run(0, x, torch.tensor([[3, 2]]), weights[None])
    torch.testing.assert_close(row, expected[0])
    addresses = experts.table(1).cpu()
    assert [bool(address) for address in addresses] == [True, False, False, False]
    assert arrived(on_gpus(installed, (8,), 2)).holds_all(GPU)


def test_a_worker_brings_what_a_chat_asks_for_to_its_gpus_then_into_ram(paper, installed):
    experts = on_gpus(installed, (2, 1), 2)
    wanted = [*EVERYTHING[:3], *EVERYTHING[4:]]
    for vram in experts.gpus:
        vram.policy.exclude([EVERYTHING[3]])
    fitting = experts.fitting(wanted)
    assert fitting == [*EVERYTHING[:3], *EVERYTHING[4:6]]
    for key in fitting:
        experts.load(key, pinned=fitting)
        assert experts.holds(key)
    assert Counter(map(experts.tier, EVERYTHING)) == {
        "device": 2,
        "other-device": 1,
        "host": 2,
        "disk": 3,
    }
    assert experts.tier(EVERYTHING[3]) == "disk"
    assert is_right(installed, experts)


def test_rows_from_ram_are_computed_on_the_layers_gpu(paper, installed):
    experts, (x, selected, _) = arrived(on_gpus(installed, (4, 4))), routing(9)
    for layer in range(2):
        rows = experts.compute(layer, x, selected)
        expected = runner(installed, 8).compute(layer, x, selected).outputs
        assert rows.outputs.device.index == layer
        assert (rows.outputs.cpu() - expected).norm() < TOLERANCE * expected.norm()


def test_closed_experts_hold_no_memory(paper, installed):
    experts = arrived(on_gpus(installed, (2, 3)))
    experts.close()
    assert experts.bytes_held == 0
    assert not experts.is_filling
