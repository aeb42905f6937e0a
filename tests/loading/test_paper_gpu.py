"""All that is written for CUDA, run on a GPU on paper (see paper_gpu.py) beside the CPU."""

from pathlib import Path

import pytest
import torch
from paper_gpu import PaperRuntime
from paper_tools import (
    EXPERTS,
    GREEDY,
    KINDS,
    LAYERS,
    PROMPT,
    TOLERANCES,
    Cases,
    apart,
    demand_of,
    load,
    logits,
    settled,
    speeds,
    text,
)

from mixchat.base.errors import ResourceError, UsageError
from mixchat.bench import machine_limits
from mixchat.bench.machine_limits import LimitsMeter, copy_bandwidth
from mixchat.experts.compute import HostCompute
from mixchat.loading import tiers
from mixchat.loading.loader import choose_devices
from mixchat.planning.compute_speed import Effort, layer_probe
from mixchat.planning.fitting import FreeMemory
from mixchat.planning.measuring import measurement_key, take_sample
from mixchat.planning.plan import Machine

PLACES = {
    "all resident": (EXPERTS, 0),
    "over RAM for all": (3, EXPERTS),
    "over RAM for some": (3, 5),
    "two over RAM for four": (2, 4),
    "over the disk": (3, 0),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_computes_what_the_cpu_computes_wherever_experts_are(
    paper: PaperRuntime, case: Cases, kind: str, place: str
) -> None:
    slots, host = PLACES[place]
    engine = load(case(kind), slots, host)
    assert engine.device == torch.device("paper", 0)
    assert engine.slots_by_tier == {"device": slots, **({"host": host} if host else {})}
    assert apart(logits(engine), case(kind).expected) < TOLERANCES.get(kind, 0.03)


@pytest.mark.parametrize("place", list(PLACES)[1:])
def test_where_experts_are_does_not_show_in_what_a_gpu_computes(
    paper: PaperRuntime, case: Cases, place: str
) -> None:
    expected = logits(load(case("nf4"), EXPERTS, kv_bits=8))
    assert torch.equal(logits(load(case("nf4"), *PLACES[place], kv_bits=8)), expected)


@pytest.mark.parametrize("kind", ["fp32", "nf4, reordered"])
def test_what_the_cpu_computes_for_a_gpu_is_right(
    paper: PaperRuntime, case: Cases, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tiers, "saved_measurement", lambda *_: speeds(copy=1.0, expert=1e-9))
    computed = []
    run = HostCompute.run
    monkeypatch.setattr(
        HostCompute, "run", lambda self, key, x: computed.append(len(x)) or run(self, key, x)
    )
    engine = load(case(kind), 2, EXPERTS)
    for _ in range(2):  # in RAM the second time
        engine.forget()
        found = logits(engine)
    assert apart(found, case(kind).expected) < TOLERANCES.get(kind, 0.03)
    if case(kind).blueprint.expert == case(kind).blueprint.computed_on(torch.device("cpu")).expert:
        assert 1 in computed  # in decoding
        assert max(computed) > 1  # in prefill


WAITS = {"all in RAM": (3, EXPERTS, False), "computed there": (3, EXPERTS, True)} | {
    place: (*slots, False) for place, slots in PLACES.items()
}


@pytest.mark.parametrize("place", WAITS)
def test_a_token_waits_once_a_layer_and_once_for_the_logits(
    paper: PaperRuntime, case: Cases, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """With experts missing it was twice a layer: for the choice and for the predictions.

    And once more for each expert that the CPU computes, after the experts of the GPU.
    """
    slots, host, on_host = WAITS[place]
    if on_host:
        monkeypatch.setattr(tiers, "saved_measurement", lambda *_: speeds(copy=1.0, expert=1e-9))
    engine = load(case("fp32"), slots, host)
    answer = engine.generate(PROMPT, sampling=GREEDY, stop_ids=set(), max_tokens=40)
    for _ in range(9):
        next(answer)
    before = engine.experts.stats.misses.total()
    for _ in range(25):
        paper.waits = 0
        next(answer)
        assert paper.waits == LAYERS + 1
    assert (engine.experts.stats.misses.total() > before) == (slots < EXPERTS)


def test_a_prompt_waits_twice_a_layer_at_most_however_many_experts_it_needs(
    paper: PaperRuntime, case: Cases
) -> None:
    """For the choice and for the predictions; it was once for each expert, too."""
    engine = load(case("fp32"), 3, EXPERTS)
    paper.waits = 0
    next(engine.generate(PROMPT, sampling=GREEDY, stop_ids=set(), max_tokens=1))
    assert paper.waits <= 2 * LAYERS + 1


def test_a_gpu_with_less_memory_than_it_says_holds_half_of_the_experts(
    paper: PaperRuntime, case: Cases
) -> None:
    expected = logits(load(case("nf4"), EXPERTS))
    notes: list[str] = []
    paper.allocations, paper.fail_at = 0, 5
    engine = load(case("nf4"), 7, EXPERTS, notes.append)
    assert notes == ["paper:0 has less memory than it says: it holds 3 experts"]
    assert engine.slots_by_tier == {"device": 3, "host": EXPERTS}
    assert torch.equal(logits(engine), expected)


def test_a_gpu_that_never_has_memory_for_two_experts_is_refused(
    paper: PaperRuntime, case: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "mem_get_info", lambda device: (10**9, 10**9))
    paper.memory(torch.device("paper", 0)).total = 0
    with pytest.raises(ResourceError, match="not even two experts"):
        load(case("nf4"), 7, EXPERTS)


@pytest.mark.parametrize("kind", ["nf4", "nf4, reordered"])
def test_a_gpu_may_run_out_of_memory_at_any_time(
    paper: PaperRuntime, case: Cases, kind: str
) -> None:
    """Also in the thread that moves experts, which reorders them in memory of the GPU."""
    expected = text(load(case(kind), EXPERTS))
    for after in range(1, 1000, 160):
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


def test_a_gpu_that_runs_out_of_memory_with_two_experts_says_so(
    paper: PaperRuntime, case: Cases
) -> None:
    notes: list[str] = []
    engine = load(case("nf4"), 5, EXPERTS, notes.append)
    settled(paper)
    device = paper.memory(engine.device)
    device.total = device.taken - 3 * case("nf4").blueprint.expert.stride
    with pytest.raises(ResourceError, match="two experts in it"):
        text(engine)
    assert notes == ["GPU 0 ran out of memory: 2 experts fit now"]
    device.total = 10**9
    assert text(engine) == text(load(case("nf4"), EXPERTS))


@pytest.mark.parametrize("place", ["all resident", "over RAM for all"])
def test_a_model_takes_the_memory_that_it_was_said_to_take(
    paper: PaperRuntime, case: Cases, place: str
) -> None:
    slots, host = PLACES[place]
    before, _ = settled(paper)
    engine = load(case("nf4"), slots, host)
    text(engine)
    text(engine)
    demand = demand_of(case("nf4"))
    promised = demand.shared + demand.context + slots * demand.expert
    taken = paper.memory(engine.device).taken - before
    # Blocks begin with a page; tables, predictors and rotations are not counted for so small ones.
    assert promised - demand.context <= taken <= promised + slots * 4096 + 60_000
    info = paper.mem_get_info(engine.device)
    assert FreeMemory.now([engine.device]).device == info[0] == info[1] - before - taken


@pytest.mark.parametrize("kind", ["nf4", "nf4, reordered"])
def test_8_bits_are_widened_where_all_experts_fit_beside_that(
    paper: PaperRuntime, case: Cases, kind: str
) -> None:
    before, _ = settled(paper)
    engine = load(case(kind), EXPERTS, more=1_000_000)
    assert engine.blueprint == case(kind).blueprint.widened()
    demand, wide = demand_of(case(kind)), engine.blueprint.shared_size
    assert wide > demand.shared
    taken = paper.memory(engine.device).taken - before
    assert wide + EXPERTS * demand.expert <= taken <= wide + demand.context + 500_000
    assert apart(logits(engine), case(kind).expected) < 0.03


@pytest.mark.parametrize(("slots", "more"), [(EXPERTS, 0), (EXPERTS - 1, 1000)])
def test_8_bits_stay_where_they_are_needed_for_experts(
    paper: PaperRuntime, case: Cases, slots: int, more: int
) -> None:
    engine = load(case("nf4"), slots, more=more)
    assert engine.blueprint == case("nf4").blueprint
    assert engine.experts.slots == slots


def test_an_engine_that_is_dropped_gives_back_its_gpus_memory_and_unpins_the_hosts(
    paper: PaperRuntime, case: Cases
) -> None:
    """Pinned pages stayed so; the next block at that address could not be pinned."""

    before = settled(paper)
    engine = load(case("nf4"), 3, EXPERTS)
    text(engine)
    assert before[1] < len(paper.locked) <= before[1] + EXPERTS
    assert set(paper.locked.values()) == {case("nf4").blueprint.expert.stride}
    del engine
    assert settled(paper) == before


@pytest.mark.parametrize("kind", ["nf4", "nf4, reordered"])
def test_ram_that_cannot_be_page_locked_is_slower_and_no_fault(
    paper: PaperRuntime, case: Cases, kind: str
) -> None:
    """CUDA reports the refusal again at the next kernel, which was one that reorders an expert."""
    expected = text(load(case(kind), EXPERTS))
    paper.refuses_locks = True
    assert text(load(case(kind), 3, EXPERTS)) == expected


def test_the_first_gpu_is_taken_if_none_is_named_and_one_that_is_not_there_is_refused(
    paper: PaperRuntime,
) -> None:
    assert choose_devices(None) == [torch.device("paper:0")]
    with pytest.raises(UsageError, match="torch sees 1 GPUs here"):
        choose_devices("paper:1")
    paper.devices = 2
    assert choose_devices("paper:1") == [torch.device("paper:1")]
    assert paper.current_device() == 1


def test_the_second_of_two_gpus_computes_what_the_first_does(
    paper: PaperRuntime, case: Cases
) -> None:
    """Every tensor of its is in its memory: mixed memories are an error."""
    expected = logits(load(case("nf4"), 3, EXPERTS))
    paper.devices = 2
    engine = load(case("nf4"), 3, EXPERTS, device="paper:1")
    assert engine.device == torch.device("paper", 1)
    assert torch.equal(logits(engine), expected)


def test_planning_looks_at_a_gpu_and_measures_it(
    paper: PaperRuntime, case: Cases, tmp_path: Path
) -> None:
    device, blueprint = torch.device("paper", 0), case("nf4").blueprint
    there = Machine.now(tmp_path, [device])
    assert (there.gpu, there.gpu_memory) == ("GPU on paper", 4 * 10**9)
    assert "paper:0: GPU on paper" in measurement_key(blueprint, tmp_path, device)
    little = Effort(file_bytes=100_000, pool_bytes=100_000, seconds=1e-3)
    found = take_sample(blueprint, tmp_path, device, layer_probe(blueprint, device), effort=little)
    assert set(found.expert_seconds) == {"cpu", "paper:0"}
    assert found.copy_bandwidth is not None
    assert found.copy_bandwidth > 0


def test_the_bench_measures_a_gpus_limits(
    paper: PaperRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("paper", 0)
    monkeypatch.setattr(machine_limits, "_SUMMED_FLOATS", 1000)
    for dimension in ("_TOKENS", "_COLUMNS", "_ROWS"):
        monkeypatch.setattr(machine_limits, dimension, 8)
    limits = LimitsMeter(device).measure()
    assert min(limits.memory, limits.gemm) > 0
    assert (copy_bandwidth(device, 4096) or 0) > 0
    assert copy_bandwidth(torch.device("cpu"), 4096) is None
