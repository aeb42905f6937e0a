"""Experts on several GPUs on paper: the same bits as on one, wherever each of them is."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, NamedTuple

import pytest
import torch
from paper_gpu import Event, PaperRuntime, Stream
from paper_tools import (
    EXPERTS,
    GREEDY,
    KINDS,
    LAYERS,
    PROMPT,
    TOLERANCES,
    Case,
    Cases,
    apart,
    demand_of,
    load,
    logits,
    settled,
    speeds,
    text,
)

from mixchat.base import interrupts
from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.engine.generate import Engine
from mixchat.engine.report import report_of
from mixchat.experts.cache import ExpertKey
from mixchat.experts.compute import HostCompute
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.placement import Placement
from mixchat.experts.store import ExpertStore
from mixchat.experts.workers.messages import Hello
from mixchat.loading import loader, tiers
from mixchat.loading.loader import choose_devices, load_engine, speed_predictor
from mixchat.loading.served_experts import load_served_experts
from mixchat.planning import expectation, plan
from mixchat.planning.machine_speeds import Measurement
from mixchat.planning.plan import Machine


class WorkerSplit(NamedTuple):
    """Slots on the first GPU, on each other one, and in RAM; and what becomes of them."""

    first: int
    others: tuple[int, ...]
    host: int
    tiers: dict[str, int]


SPREADS = {
    "two hold all": WorkerSplit(6, (6,), 0, {"device": 6, "other-device": 6}),
    "two hold all, each could alone": WorkerSplit(
        EXPERTS, (EXPERTS,), EXPERTS, {"device": 6, "other-device": 6}
    ),
    "two over RAM for all": WorkerSplit(
        3, (2,), EXPERTS, {"device": 3, "other-device": 2, "host": EXPERTS}
    ),
    "two over RAM for some": WorkerSplit(3, (3,), 8, {"device": 3, "other-device": 3, "host": 8}),
    "two, one of them over RAM": WorkerSplit(
        3, (3,), 5, {"device": 3, "other-device": 3, "host": 5}
    ),
    "two over the disk": WorkerSplit(2, (4,), 0, {"device": 2, "other-device": 4}),
    "three hold all": WorkerSplit(2, (8, 3), 0, {"device": 2, "other-device": 10}),
    "three over RAM for all": WorkerSplit(
        2, (2, 2), EXPERTS, {"device": 2, "other-device": 4, "host": EXPERTS}
    ),
    "three over the disk": WorkerSplit(2, (2, 2), 0, {"device": 2, "other-device": 4}),
}
RESIDENT = [name for name, spread in SPREADS.items() if "hold all" in name]


def spread_out(paper: PaperRuntime, case: Case, name: str, **options: Any) -> Engine:
    spread = SPREADS[name]
    paper.devices = 1 + len(spread.others)
    return load(case, spread.first, spread.host, others=spread.others, **options)


@pytest.fixture(scope="module")
def alone(case: Cases) -> Callable[[PaperRuntime, str], torch.Tensor]:
    """Return what one GPU that holds all experts of a kind computes."""
    found: dict[str, torch.Tensor] = {}

    def alone(paper: PaperRuntime, kind: str) -> torch.Tensor:
        if kind not in found:
            paper.devices = 1
            found[kind] = logits(load(case(kind), EXPERTS))
        return found[kind]

    return alone


@pytest.mark.parametrize("name", SPREADS)
@pytest.mark.parametrize("kind", KINDS)
def test_several_gpus_compute_what_one_computes(
    paper: PaperRuntime,
    case: Cases,
    alone: Callable[[PaperRuntime, str], torch.Tensor],
    kind: str,
    name: str,
) -> None:
    expected = alone(paper, kind)
    engine = spread_out(paper, case(kind), name)
    assert engine.slots_by_tier == SPREADS[name].tiers
    found = logits(engine)
    assert torch.equal(found, expected)
    assert apart(found, case(kind).expected) < TOLERANCES.get(kind, 0.03)


@pytest.mark.parametrize("name", ["two hold all", "two over RAM for some", "three over the disk"])
def test_an_answer_after_a_prompt_is_that_of_one_gpu(
    paper: PaperRuntime, case: Cases, name: str
) -> None:
    expected = text(load(case("nf4"), EXPERTS, kv_bits=8))
    engine = spread_out(paper, case("nf4"), name, kv_bits=8)
    assert [text(engine), text(engine)] == [expected, expected]


@pytest.mark.parametrize("exact", [False, True])
def test_gpus_are_named_in_any_order_and_number(
    paper: PaperRuntime, case: Cases, exact: bool
) -> None:
    expected = text(load(case("nf4"), EXPERTS, exact_prompts=exact))
    paper.devices = 3
    named: dict[str, Any] = {"device": "paper:2, paper:0", "exact_prompts": exact}
    engine = load(case("nf4"), 3, EXPERTS, others=(3,), **named)
    assert engine.device == torch.device("paper", 2)
    assert {device.device.index for device in engine.experts._devices} == {0, 2}  # type: ignore[attr-defined]
    assert text(engine) == expected


@pytest.mark.parametrize("kind", ["fp32", "nf4, reordered"])
def test_what_the_cpu_computes_for_several_gpus_is_right(
    paper: PaperRuntime, case: Cases, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tiers, "saved_measurement", lambda *_: speeds(copy=1.0, expert=1e-9))
    computed = []
    run = HostCompute.run
    monkeypatch.setattr(
        HostCompute, "run", lambda self, key, x: computed.append(self) or run(self, key, x)
    )
    engine = spread_out(paper, case(kind), "two over RAM for all")
    for _ in range(2):  # in RAM the second time
        engine.forget()
        found = logits(engine)
    assert apart(found, case(kind).expected) < TOLERANCES.get(kind, 0.03)
    if case(kind).blueprint.expert == case(kind).blueprint.computed_on(torch.device("cpu")).expert:
        assert len(set(computed)) == 2  # for each GPU


@pytest.mark.parametrize(
    ("name", "on_host"),
    [*product(SPREADS, [False]), *((name, True) for name in SPREADS if SPREADS[name].host)],
)
def test_a_token_waits_as_often_as_with_one_gpu(
    paper: PaperRuntime, case: Cases, monkeypatch: pytest.MonkeyPatch, name: str, on_host: bool
) -> None:
    """Once a layer, for the choice, and once for the logits: rows and outputs need no wait."""
    if on_host:
        monkeypatch.setattr(tiers, "saved_measurement", lambda *_: speeds(copy=1.0, expert=1e-9))
    engine = spread_out(paper, case("fp32"), name)
    answer = engine.generate(PROMPT, sampling=GREEDY, stop_ids=set(), max_tokens=40)
    for _ in range(9):
        next(answer)
    before = engine.experts.stats.misses.total()
    for _ in range(25):
        paper.waits = 0
        next(answer)
        assert paper.waits == LAYERS + 1
    assert (engine.experts.stats.misses.total() > before) == (name not in RESIDENT)


@pytest.mark.parametrize("name", SPREADS)
def test_a_prompt_waits_as_often_as_with_one_gpu(
    paper: PaperRuntime, case: Cases, name: str
) -> None:
    engine = spread_out(paper, case("fp32"), name)
    paper.waits = 0
    next(engine.generate(PROMPT, sampling=GREEDY, stop_ids=set(), max_tokens=1))
    assert paper.waits <= 2 * LAYERS + 1


@pytest.mark.parametrize("name", SPREADS)
def test_each_expert_has_one_home_with_streams_and_ram_of_its_own(
    paper: PaperRuntime, case: Cases, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A slot is filled once its own GPU, and not the current one, has read what was in it."""
    waited, wait = set(), Event.wait

    def noted(event: Event, stream: Stream) -> None:
        waited.add((event._stream.index, stream.index))
        wait(event, stream)

    monkeypatch.setattr(Event, "wait", noted)
    engine = spread_out(paper, case("nf4"), name)
    text(engine)
    dispatcher: Any = engine.experts
    sources, disks = set(), set()
    for number, device in enumerate(dispatcher._devices):
        store = device.fetcher._store
        assert store._side.index == device.device.index == number
        assert {slot.block.device.index for slot in store._slots.values()} == {number}
        held = {slot.holds for slot in store._slots.values()} - {None}
        assert {dispatcher._owner(key) for key in held} <= {number}
        sources.add(id(store._source))
        disks.add(id(getattr(store._source, "_source", store._source)))
    assert len(sources) == len(disks) == len(dispatcher._devices)
    assert waited == {(number, number) for number in range(len(dispatcher._devices))}


@pytest.mark.parametrize("name", SPREADS)
def test_a_report_tells_the_gpus_apart(paper: PaperRuntime, case: Cases, name: str) -> None:
    engine, most = spread_out(paper, case("nf4"), name), SPREADS[name].tiers
    text(engine)
    report = report_of(engine, "tiny")
    held = Counter(chain(*report.tiers))
    assert report.slots == most
    assert list(report.slots) == [tier for tier in report.tiers_used if tier != "disk"]
    assert all(0 < held[tier] <= most[tier] for tier in ("device", "other-device"))
    assert held["host"] <= most.get("host", 0)
    assert held.total() == EXPERTS
    assert sum(map(sum, report.hits)) + sum(map(sum, report.misses)) >= 2 * LAYERS * 8


@pytest.mark.parametrize("name", ["two hold all", "three over RAM for all"])
def test_each_gpu_takes_the_memory_that_it_was_said_to_take(
    paper: PaperRuntime, case: Cases, name: str
) -> None:
    settled(paper)
    devices = [torch.device("paper", number) for number in range(1 + len(SPREADS[name].others))]
    before = [paper.memory(device).taken for device in devices]
    engine = spread_out(paper, case("nf4"), name)
    text(engine)
    demand, spread = demand_of(case("nf4")), SPREADS[name]
    taken = [paper.memory(device).taken - was for device, was in zip(devices, before, strict=True)]
    for slots, found in zip((spread.first, *spread.others), taken, strict=True):
        shared = demand.shared if found is taken[0] else 0
        promised = shared + slots * demand.expert
        spare = demand.context + 60_000 if shared else 0
        assert promised <= found <= promised + slots * 4096 + spare


def test_ram_is_locked_for_both_gpus_and_given_back_with_their_memory(
    paper: PaperRuntime, case: Cases
) -> None:
    before = settled(paper)
    other = paper.memory(torch.device("paper", 1)).taken
    engine = spread_out(paper, case("nf4"), "two over RAM for all")
    text(engine)
    assert before[1] < len(paper.locked) <= before[1] + EXPERTS
    del engine
    assert settled(paper) == before
    assert paper.memory(torch.device("paper", 1)).taken == other


def test_a_second_gpu_with_less_memory_than_it_says_holds_half_of_its_experts(
    paper: PaperRuntime, case: Cases
) -> None:
    expected = text(load(case("nf4"), EXPERTS))
    notes: list[str] = []
    paper.devices, paper.allocations, paper.fail_at = 2, 0, 6
    engine = load(case("nf4"), 3, EXPERTS, notes.append, others=(5,))
    assert notes == ["paper:1 has less memory than it says: it holds 2 experts"]
    assert engine.slots_by_tier == {"device": 3, "other-device": 2, "host": EXPERTS}
    assert text(engine) == expected


def test_a_second_gpu_that_holds_no_two_experts_after_all_is_named(
    paper: PaperRuntime, case: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = ExpertStore._slot

    def failing(self: ExpertStore, number: int) -> Any:
        if self._device.index == 1:
            raise torch.OutOfMemoryError("paper out of memory")
        return slot(self, number)

    monkeypatch.setattr(ExpertStore, "_slot", failing)
    with pytest.raises(ResourceError, match="paper:1 has less memory than it says: not even two"):
        spread_out(paper, case("nf4"), "two over RAM for all")


@pytest.mark.parametrize("kind", ["nf4", "nf4, reordered"])
def test_several_gpus_may_run_out_of_memory_at_any_time(
    paper: PaperRuntime, case: Cases, kind: str
) -> None:
    expected = text(load(case(kind), EXPERTS))
    for after in range(1, 1000, 240):
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
    paper: PaperRuntime, case: Cases, monkeypatch: pytest.MonkeyPatch, full: int
) -> None:
    expected = text(load(case("nf4"), EXPERTS))
    notes: list[str] = []
    paper.devices = 2
    engine = load(case("nf4"), 4, EXPERTS, notes.append, others=(4,))
    allocated, left = paper.allocated, 40

    def failing(tensor: torch.Tensor, device: torch.device) -> None:
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
    assert [device.fetcher.slots for device in engine.experts._devices] == [[2, 4], [4, 2]][full]  # type: ignore[attr-defined]


def test_a_gpu_that_runs_out_of_memory_with_two_experts_is_named(
    paper: PaperRuntime, case: Cases
) -> None:
    paper.devices = 2
    engine = load(case("nf4"), 4, EXPERTS, others=(2,))
    settled(paper)
    memory = paper.memory(torch.device("paper", 1))
    memory.total = memory.taken
    with pytest.raises(ResourceError, match="GPU 1 ran out of memory, with two experts in it"):
        text(engine)


def test_where_torch_does_not_say_which_gpu_ran_out_of_memory_all_give_up_experts(
    paper: PaperRuntime, case: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = text(load(case("nf4"), EXPERTS))
    notes: list[str] = []
    paper.devices = 2
    engine = load(case("nf4"), 4, EXPERTS, notes.append, others=(5,))
    forward, calls = engine.passes.model.forward, iter(range(100))

    def once(*arguments: Any, **options: Any) -> torch.Tensor:
        if next(calls) == 0:
            raise torch.OutOfMemoryError("out of memory")
        return forward(*arguments, **options)

    monkeypatch.setattr(engine.passes.model, "forward", once)
    assert text(engine) == expected
    assert notes == ["the device ran out of memory: 4 experts fit now"]


@pytest.mark.parametrize("name", ["two over RAM for all", "three over the disk"])
def test_ctrl_c_at_any_moment_leaves_an_engine_that_answers_the_same(
    paper: PaperRuntime, case: Cases, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected = text(load(case("nf4"), EXPERTS))
    engine, check = spread_out(paper, case("nf4"), name), interrupts.check
    left = 0  # calls until Ctrl-C

    def interrupted() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        check()

    monkeypatch.setattr(interrupts, "check", interrupted)
    for calls in range(1, 60, 7):
        left = calls
        with pytest.raises(KeyboardInterrupt):
            text(engine)
        if calls % 4 == 0:
            assert text(engine) == expected
    assert text(engine) == expected


class NearbyWorker:
    """A worker that computes on the first GPU, as another machine would."""

    def __init__(self, engine: Engine, slots: int) -> None:
        self._experts: Any = engine.experts
        self.slots, self.works = slots, True
        self.held: frozenset[ExpertKey] = frozenset()

    def hold(self, keys: Sequence[ExpertKey]) -> None:
        self.held = frozenset(keys)

    def begin_turn(self) -> None:
        """It is never lost for good."""

    def begin(self, rows: LayerRows, keys: Sequence[ExpertKey]) -> None:
        self._keys = keys

    def finish(self, rows: LayerRows) -> Sequence[ExpertKey]:
        if not self.works:
            return self._keys
        for key in self._keys:
            chosen = torch.full((rows.counts[key], 1), key.expert, device="paper:0")
            rows.put(key, self._experts.compute(rows.layer, rows.of(key), chosen).outputs)
        return []


@pytest.mark.parametrize("slots", [2, 4, 5])
def test_what_workers_leave_to_two_gpus_is_spread_over_both(
    paper: PaperRuntime, case: Cases, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """Every second expert was left to them, and all of these were at home on the same GPU."""
    alone = load(case("nf4"), EXPERTS)
    expected = text(alone)
    alone.forget()
    worker = NearbyWorker(alone, 6)
    monkeypatch.setattr(loader, "connect_workers", lambda *_: [worker])
    paper.devices = 2
    engine = load(case("nf4"), slots, EXPERTS, others=(slots,))
    dispatcher: Any = engine.experts
    alone_here = {ExpertKey(*key) for key in product(range(LAYERS), range(4))} - worker.held
    here = alone_here | dispatcher._copies
    assert Counter(map(dispatcher._owner, here)) == {0: len(here) // 2, 1: len(here) // 2}
    assert text(engine) == expected
    assert text(engine) == expected
    held = [key for key in alone_here if dispatcher.tier(key) in ("device", "other-device")]
    assert len(held) == min(6, 2 * slots)
    worker.works = False
    assert text(engine) == expected


def hello(exact: bool = False) -> Hello:
    return Hello(
        model_identity="identity",
        model_name="tiny",
        dtype="float32",
        hidden_size=64,
        exact_prompts=exact,
    )


def test_a_worker_spreads_what_a_chat_lets_it_hold_over_its_gpus(
    paper: PaperRuntime, case: Cases
) -> None:
    paper.devices = 2
    expert = case("nf4").blueprint.expert.stride
    notes: list[str] = []
    budget = MemoryBudget(size=3 * expert)
    settled(paper)
    for number in range(2):  # no room for the experts of two chats
        memory = paper.memory(torch.device("paper", number))
        memory.total = memory.taken + 4 * expert + 60_000
    options = LoadOptions(MemoryBudget(size=0), (budget,))
    served = load_served_experts(case("nf4").directory, options, notes.append)
    assert served.slots == 6
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    for exact, chosen in product((False, True), ((0, 2), (1, 3))):
        keys = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in chosen]
        served.begin(hello(exact))
        served.hold(keys)
        while served.load_next():
            pass
        assert [device.fetcher.slots for device in served._experts._devices] == [3, 3]
        assert all(served._experts.holds(key) for key in keys)
        for layer in range(LAYERS):
            served.compute(layer, [(expert, 1) for expert in chosen], x, True, lambda: None)
        assert served._experts.stats.misses.total() == len(keys)  # each was loaded once
    assert notes == []


def test_a_worker_s_gpu_that_runs_out_of_memory_holds_fewer_experts(
    paper: PaperRuntime, case: Cases
) -> None:
    """Each answer lost the worker at the same place, since the next chat found it as full again."""
    expert = case("nf4").blueprint.expert.stride
    notes: list[str] = []
    options = LoadOptions(MemoryBudget(size=0), (MemoryBudget(size=4 * expert),))
    served = load_served_experts(case("nf4").directory, options, notes.append)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    served.begin(hello())
    request = (0, [(0, 1), (2, 1)], x, True, lambda: None)
    expected = served.compute(*request)
    paper.allocations, paper.fail_at = 0, 2
    assert torch.equal(served.compute(*request), expected)
    assert notes == ["GPU 0 ran out of memory: 2 experts fit now"]
    memory = paper.memory(torch.device("paper", 0))
    memory.total = memory.taken
    with pytest.raises(ResourceError, match="GPU 0 ran out of memory, with two experts in it"):
        served.compute(*request)


def test_a_gpu_without_room_for_two_experts_is_left_out(paper: PaperRuntime, case: Cases) -> None:
    """A screen's GPU may have nothing free; whoever names no budget gets what the others hold."""
    expected = text(load(case("nf4"), EXPERTS))
    notes: list[str] = []
    paper.devices = 3
    paper.memory(torch.device("paper", 1)).total = 10**9
    engine = load_engine(case("nf4").directory, LoadOptions(context_size=64), notes.append)
    assert notes == ["paper:1 is not used: it has too little memory free for two experts"]
    assert engine.slots_by_tier == {"device": 6, "other-device": 6}
    assert text(engine) == expected


def test_budgets_are_for_all_gpus_or_for_each_and_errors_name_the_gpu(
    paper: PaperRuntime, case: Cases
) -> None:
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


def test_devices_that_do_not_go_together_are_refused(paper: PaperRuntime) -> None:
    paper.devices = 2
    assert [str(device) for device in choose_devices("paper")] == ["paper:0", "paper:1"]
    assert choose_devices(None) == choose_devices("paper:0,paper:1") == choose_devices("paper")
    assert paper.current_device() == 0
    for names, said in {
        "paper:0,paper:0": "names 'paper:0' twice",
        "cpu,paper:0": "'cpu' has to stand alone",
        "paper,paper:1": "'paper' has to stand alone",
        "cpu:0,paper:1": "only GPUs compute together",
        "paper:1,paper:2": "torch sees 2 GPUs here",
        "paper:0,": "has to stand alone",
    }.items():
        with pytest.raises(UsageError, match=said):
            choose_devices(names)


def test_planning_looks_at_every_gpu(paper: PaperRuntime, tmp_path: Path) -> None:
    paper.devices = 2
    paper.memory(torch.device("paper", 1)).total = 10**9
    there = Machine.now(tmp_path, choose_devices(None))
    (other,) = there.other_gpus
    assert (other.device, other.name, other.memory) == ("paper:1", "GPU on paper", 10**9)
    assert there.free.others["paper:1"] <= 10**9 < (there.free.device or 0)


def test_the_speed_with_the_slots_of_all_gpus_is_predicted(
    paper: PaperRuntime, case: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sample,) = speeds(copy=1e9, expert=1e-3).samples
    known = Measurement(1.7e9, (replace(sample, expert_seconds={"paper:0": {1: 1e-4, 8: 2e-4}}),))
    monkeypatch.setattr(plan, "saved_measurement", lambda *_: known)
    directory, blueprint = case("nf4").directory, case("nf4").blueprint
    for name, placement in {
        "two over RAM for all": Placement(3, EXPERTS, EXPERTS, other_slots=(2,)),
        "three hold all": Placement(2, 0, EXPERTS, other_slots=(5, 5)),
    }.items():
        engine = spread_out(paper, case("nf4"), name)
        expected = expectation.expect(blueprint, engine.device, known, placement).speed
        assert expected is not None
        predicted = speed_predictor(directory, None, engine)()
        assert predicted is not None
        assert predicted.decode() == expected


def test_an_event_of_one_gpu_is_not_recorded_on_the_stream_of_another(paper: PaperRuntime) -> None:
    """As on CUDA: what the double is strict about."""
    first, second = (paper.current_stream(torch.device("paper", number)) for number in (0, 1))
    assert first is not second
    event = paper.Event()
    event.record(first)
    event.wait(second)
    with pytest.raises(RuntimeError, match="one device"):
        event.record(second)
    with paper.stream(paper.Stream(torch.device("paper", 1))):
        assert paper.current_device() == 1
        assert paper.current_stream(torch.device("paper", 0)) is first
        assert paper.current_stream() is not second
    assert paper.current_device() == 0
    assert paper.current_stream(torch.device("paper", 1)) is second
