"""The memory of GPUs on paper: what is promised, what runs out, and what is given back."""

from threading import Event, current_thread, main_thread
from typing import Any

import pytest
import torch
from paper_tools import EXPERTS, SPREADS, demand_of, load, logits, settled, spread_out, text
from served_workers import hello_of

from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.experts.disk_source import DiskSource
from mixchat.experts.mover import Steps
from mixchat.experts.store import ExpertStore
from mixchat.loading.loader import load_engine
from mixchat.loading.served_experts import load_served_experts
from mixchat.planning.fitting import FreeMemory
from mixchat.weights.matrix.nf4 import NF4


@pytest.mark.parametrize("name", ["one over RAM for all", "three over RAM for all"])
def test_each_gpu_takes_the_memory_that_it_was_said_to_take(paper, case, name):
    settled(paper)
    demand, spread = demand_of(case("nf4")), SPREADS[name]
    devices = [torch.device("paper", number) for number in range(1 + len(spread.others))]
    before = [paper.memory(device).taken for device in devices]
    engine = spread_out(paper, case("nf4"), name)
    text(engine)
    text(engine)
    taken = [paper.memory(device).taken - was for device, was in zip(devices, before, strict=True)]
    for number, slots in enumerate((spread.first, *spread.others)):
        promised = slots * demand.expert + (0 if number else demand.shared)
        # Blocks begin with a page; tables, predictors and rotations are not counted when so small.
        spare = NF4.levels.nbytes if number else demand.context + 60_000
        assert promised <= taken[number] <= promised + slots * 4096 + spare
    free, total = paper.mem_get_info(engine.device)
    assert FreeMemory.now([engine.device]).device == free == total - before[0] - taken[0]


def test_an_engine_that_is_dropped_gives_back_its_gpus_memory_and_unlocks_ram(paper, case):
    """Pinned pages stayed so; the next block at that address could not be pinned."""
    before = settled(paper)
    other = paper.memory(torch.device("paper", 1)).taken
    levels = NF4.levels.nbytes  # stay on each GPU
    engine = spread_out(paper, case("nf4"), "two over RAM for all")
    text(engine)
    assert before[1] < len(paper.locked) <= before[1] + EXPERTS
    assert set(paper.locked.values()) == {case("nf4").blueprint.expert.stride}
    del engine
    taken, locked = settled(paper)
    assert locked == before[1]
    assert taken <= before[0] + levels
    assert paper.memory(torch.device("paper", 1)).taken <= other + levels


@pytest.mark.parametrize(
    ("slots", "others", "fails_at", "note", "left"),
    [
        (7, (), 5, "paper:0 has less memory than it says: it holds 3 experts", {"device": 3}),
        (
            *(3, (5,), 6),
            "paper:1 has less memory than it says: it holds 2 experts",
            {"device": 3, "other-device": 2},
        ),
    ],
    ids=["one", "two"],
)
def test_a_gpu_with_less_memory_than_it_says_holds_half_of_its_experts(
    paper, case, slots, others, fails_at, note, left
):
    expected = logits(load(case("nf4"), EXPERTS))
    notes: list[str] = []
    paper.devices, paper.allocations, paper.fail_at = 1 + len(others), 0, fails_at
    engine = load(case("nf4"), slots, EXPERTS, notes.append, others=others)
    assert notes == [note]
    assert engine.slots_by_tier == left | {"host": EXPERTS}
    assert torch.equal(logits(engine), expected)


@pytest.mark.parametrize("kind", ["nf4", "trellis3"])
def test_a_gpu_may_run_out_of_memory_at_any_time(paper, case, kind):
    """Also in the thread that moves experts, which reorders them in memory of the GPU."""
    expected = text(load(case(kind), EXPERTS))
    for after in range(1, 1000, 330):
        notes: list[str] = []
        engine = load(case(kind), 8, EXPERTS, notes.append)
        paper.allocations, paper.fail_at = 0, after
        assert text(engine) == expected
        happened = paper.allocations >= after
        if kind == "nf4":  # the mover's thread takes no memory of the GPU's
            assert bool(notes) == happened
        # A prefetch that failed is forgotten, as one that was cancelled.
        assert notes == ["GPU 0 ran out of memory: 4 experts fit now"] * len(notes)
        assert engine.experts.slots == (4 if notes else 8)


def test_ram_that_cannot_be_page_locked_is_slower_and_no_fault(paper, case):
    """CUDA reports the refusal again at the next kernel."""
    expected = text(load(case("nf4"), EXPERTS))
    paper.refuses_locks = True
    assert text(load(case("nf4"), 3, EXPERTS)) == expected


def test_a_second_gpu_that_holds_no_two_experts_after_all_is_named(paper, case, monkeypatch):
    slot = ExpertStore._slot

    def failing(self, number):
        if self._device.index == 1:
            raise torch.OutOfMemoryError("paper out of memory")
        return slot(self, number)

    monkeypatch.setattr(ExpertStore, "_slot", failing)
    with pytest.raises(ResourceError, match="paper:1 has less memory than it says: not even two"):
        spread_out(paper, case("nf4"), "two over RAM for all")


@pytest.mark.parametrize("kind", ["nf4", "trellis3"])
def test_several_gpus_may_run_out_of_memory_at_any_time(paper, case, kind):
    expected = text(load(case(kind), EXPERTS))
    for after in range(1, 1000, 330):
        notes: list[str] = []
        paper.devices = 2
        engine = load(case(kind), 4, EXPERTS, notes.append, others=(5,))
        paper.allocations, paper.fail_at = 0, after
        assert text(engine) == expected
        left = {
            "GPU 0 ran out of memory: 7 experts fit now": (2, 5),
            "GPU 1 ran out of memory: 6 experts fit now": (4, 2),
        }
        assert len(notes) <= 1
        first, other = left[notes[0]] if notes else (4, 5)
        assert engine.slots_by_tier == {"device": first, "other-device": other, "host": EXPERTS}


@pytest.mark.parametrize("full", [0, 1])
def test_the_gpu_that_runs_out_of_memory_gives_up_experts_and_the_other_one_does_not(
    paper, case, monkeypatch, full
):
    expected = text(load(case("nf4"), EXPERTS))
    notes: list[str] = []
    paper.devices = 2
    engine = load(case("nf4"), 4, EXPERTS, notes.append, others=(4,))
    allocated, left = paper.allocated, 40

    def failing(tensor, device):
        nonlocal left
        # A prediction that the mover cannot bring is no error.
        left -= device.index == full and current_thread() is main_thread()
        if left == 0:
            left = -1
            raise torch.OutOfMemoryError(f"paper out of memory. GPU {full} has 4 GB in all")
        allocated(tensor, device)

    monkeypatch.setattr(paper, "allocated", failing)
    assert text(engine) == expected
    assert notes == [f"GPU {full} ran out of memory: 6 experts fit now"]
    assert [device.fetcher.slots for device in engine.experts._devices] == [[2, 4], [4, 2]][full]


def test_a_gpu_that_runs_out_of_memory_with_two_experts_is_named(paper, case):
    paper.devices = 2
    engine = load(case("nf4"), 4, EXPERTS, others=(2,))
    settled(paper)
    memory = paper.memory(torch.device("paper", 1))
    memory.total = memory.taken
    with pytest.raises(ResourceError, match="GPU 1 ran out of memory, with two experts in it"):
        text(engine)


def test_where_torch_does_not_say_which_gpu_ran_out_of_memory_all_give_up_experts(
    paper, case, monkeypatch
):
    expected = text(load(case("nf4"), EXPERTS))
    notes: list[str] = []
    paper.devices = 2
    engine = load(case("nf4"), 4, EXPERTS, notes.append, others=(5,))
    forward, calls = engine.passes.model.forward, iter(range(100))

    def once(*arguments, **options):
        if next(calls) == 0:
            raise torch.OutOfMemoryError("out of memory")
        return forward(*arguments, **options)

    monkeypatch.setattr(engine.passes.model, "forward", once)
    assert text(engine) == expected
    assert notes == ["the device ran out of memory: 4 experts fit now"]


def test_a_worker_s_gpu_that_runs_out_of_memory_holds_fewer_experts(paper, case):
    """Each answer lost the worker at the same place, since the next chat found it as full again."""
    expert = case("nf4").blueprint.expert.stride
    notes: list[str] = []
    options = LoadOptions(MemoryBudget(size=0), (MemoryBudget(size=4 * expert),))
    served = load_served_experts(case("nf4").directory, options, notes.append)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    served.begin(hello_of(served, "float32"))
    request = (0, [(0, 1), (2, 1)], x, True, lambda: None)
    expected = served.compute(*request)
    paper.allocations, paper.fail_at = 0, 2
    assert torch.equal(served.compute(*request), expected)
    assert notes == ["GPU 0 ran out of memory: 2 experts fit now"]
    memory = paper.memory(torch.device("paper", 0))
    memory.total = memory.taken
    with pytest.raises(ResourceError, match="GPU 0 ran out of memory, with two experts in it"):
        served.compute(*request)


def test_a_gpu_without_room_for_two_experts_is_left_out(paper, case):
    """A screen's GPU may have nothing free; whoever names no budget gets what the others hold."""
    expected = text(load(case("nf4"), EXPERTS))
    notes: list[str] = []
    paper.devices = 3
    paper.memory(torch.device("paper", 1)).total = 10**9
    engine = load_engine(case("nf4").directory, LoadOptions(context_size=64), notes.append)
    assert notes == ["paper:1 is not used: it has too little memory free for two experts"]
    assert engine.slots_by_tier == {"device": 6, "other-device": 6}
    assert text(engine) == expected


def test_budgets_are_for_all_gpus_or_for_each_and_errors_name_the_gpu(paper, case):
    paper.devices = 3
    with pytest.raises(UsageError, match="has 2 values, and there are 3 GPUs"):
        load(case("nf4"), 3, others=(3,))
    with pytest.raises(UsageError, match="too small for paper:2: two experts take"):
        load(case("nf4"), 3, others=(3, 1))
    with pytest.raises(UsageError, match="too small for the first GPU: the model needs at least"):
        load(case("nf4"), 1, others=(3, 3))
    with pytest.raises(ResourceError, match=r"asks for \S+ \S+, 4 GB are free on paper:1"):
        load(case("nf4"), 3, others=(10**6, 3))
    assert load(case("nf4"), EXPERTS).slots_by_tier == {"device": 4, "other-device": 8}


def test_queued_fills_keep_no_memory_when_the_engine_is_closed(paper, case, monkeypatch):
    """Loads that wait for their turn held their slots, until the mover's thread came to them."""
    model = case("nf4")  # made before its loads are held
    before, _ = settled(paper)
    reached, passed = Event(), Event()
    load_expert = DiskSource.load

    def held(self: DiskSource, *place: Any) -> Steps:
        reached.set()
        passed.wait()
        yield from load_expert(self, *place)

    monkeypatch.setattr(DiskSource, "load", held)
    engine = load(model, EXPERTS)
    reached.wait()
    expert = demand_of(model).expert
    assert paper.memories[0].taken - before >= EXPERTS * expert
    engine.close()
    assert paper.memories[0].taken - before <= 2 * expert
    passed.set()
