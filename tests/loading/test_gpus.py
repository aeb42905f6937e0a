"""Experts on GPUs on paper (see paper_gpu.py): the same bits, wherever each of them is."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import chain, product
from typing import Any

import pytest
import torch
from paper_runtime import Event, PaperRuntime
from paper_tools import (
    EXPERTS,
    GREEDY,
    KINDS,
    LAYERS,
    PROMPT,
    SPREADS,
    TOLERANCES,
    Cases,
    apart,
    load,
    logits,
    settled,
    speeds,
    spread_out,
    text,
)
from served_workers import hello_of

from mixchat.base import interrupts
from mixchat.base.errors import UsageError
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.bench.machine_limits import LimitsMeter, copy_bandwidth
from mixchat.engine.generate import Engine
from mixchat.engine.report import report_of
from mixchat.experts.cache import ExpertKey
from mixchat.experts.compute import HostCompute
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.placement import Placement
from mixchat.loading import loader, tiers
from mixchat.loading.devices import usable_devices
from mixchat.loading.loader import speed_predictor
from mixchat.loading.served_experts import load_served_experts
from mixchat.planning import bandwidth, expectation, gpu_measuring, plan
from mixchat.planning.compute_speed import Effort, layer_probe
from mixchat.planning.gpu_measuring import measure_gpu
from mixchat.planning.measuring import measurement_key, take_sample
from mixchat.planning.plan import Machine

RESIDENT = [name for name in SPREADS if "hold" in name]
# One for each way: all are there, some come from RAM, some from the disk.
WAYS = ["one over RAM for all", "two hold all", "two over RAM for some", "three over the disk"]


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


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("nf4", name) for name in SPREADS), *((kind, "two over RAM for some") for kind in KINDS)],
)
def test_gpus_compute_what_one_that_holds_all_computes(paper, case, alone, kind, name):
    expected = alone(paper, kind)
    engine = spread_out(paper, case(kind), name)
    assert engine.device == torch.device("paper", 0)
    assert engine.slots_by_tier == SPREADS[name].tiers
    found = logits(engine)
    assert torch.equal(found, expected)
    assert apart(found, case(kind).expected) < TOLERANCES.get(kind, 0.03)


@pytest.mark.parametrize("name", WAYS)
def test_an_answer_after_a_prompt_is_that_of_one_gpu(paper, case, name):
    expected = text(load(case("nf4"), EXPERTS, kv_bits=8))
    engine = spread_out(paper, case("nf4"), name, kv_bits=8)
    assert [text(engine), text(engine)] == [expected, expected]


@pytest.mark.parametrize("exact", [False, True])
def test_gpus_are_named_in_any_order_and_number(paper, case, exact):
    expected = text(load(case("nf4"), EXPERTS, exact_prompts=exact))
    paper.devices = 3
    named: dict[str, Any] = {"device": "paper:2, paper:0", "exact_prompts": exact}
    engine = load(case("nf4"), 3, EXPERTS, others=(3,), **named)
    assert engine.device == torch.device("paper", 2)
    assert {device.device.index for device in engine.experts._devices} == {0, 2}
    assert text(engine) == expected


@pytest.mark.parametrize("name", ["one over RAM for all", "two over RAM for all"])
@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_what_the_cpu_computes_for_gpus_is_right(paper, case, monkeypatch, kind, name):
    monkeypatch.setattr(tiers, "saved_measurement", lambda *_: speeds(copy=1.0, expert=1e-9))
    computed = defaultdict(list)  # rows, for each GPU
    run = HostCompute.run
    monkeypatch.setattr(
        HostCompute, "run", lambda self, key, x: computed[self].append(len(x)) or run(self, key, x)
    )
    engine = spread_out(paper, case(kind), name)
    for _ in range(2):  # in RAM the second time
        engine.forget()
        found = logits(engine)
    assert apart(found, case(kind).expected) < TOLERANCES.get(kind, 0.03)
    assert len(computed) == paper.devices
    for rows in computed.values():
        assert 1 in rows  # in decoding
        assert max(rows) > 1  # in prefill


@pytest.mark.parametrize(
    ("name", "on_host"), [*product(WAYS, [False]), ("two over RAM for some", True)]
)
def test_a_token_waits_as_often_as_with_one_gpu(paper, case, monkeypatch, name, on_host):
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


@pytest.mark.parametrize("name", WAYS)
def test_a_prompt_waits_as_often_as_with_one_gpu(paper, case, name):
    engine = spread_out(paper, case("fp32"), name)
    paper.waits = 0
    next(engine.generate(PROMPT, sampling=GREEDY, stop_ids=set(), max_tokens=1))
    assert paper.waits <= 2 * LAYERS + 1


@pytest.mark.parametrize("name", WAYS)
def test_each_expert_has_one_home_with_streams_and_ram_of_its_own(paper, case, monkeypatch, name):
    """A slot is filled once its own GPU, and not the current one, has read what was in it."""
    waited, wait = set(), Event.wait

    def noted(event, stream):
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
        assert {slot.block().device.index for slot in store._slots.values()} == {number}
        held = {slot.holds for slot in store._slots.values()} - {None}
        assert {dispatcher._owner(key) for key in held} <= {number}
        sources.add(id(store._source))
        disks.add(id(getattr(store._source, "_source", store._source)))
    assert len(sources) == len(disks) == len(dispatcher._devices)
    assert waited == {(number, number) for number in range(len(dispatcher._devices))}


@pytest.mark.parametrize("name", WAYS)
def test_a_report_tells_the_gpus_apart(paper, case, name):
    engine, most = spread_out(paper, case("nf4"), name), SPREADS[name].tiers
    text(engine)
    report = report_of(engine, "tiny")
    held = Counter(chain(*report.tiers))
    assert report.slots == most
    assert list(report.slots) == [tier for tier in report.tiers_used if tier != "disk"]
    assert all(0 < held[tier] <= most[tier] for tier in most if tier != "host")
    assert held["host"] <= most.get("host", 0)
    assert held.total() == EXPERTS
    assert sum(map(sum, report.hits)) + sum(map(sum, report.misses)) >= 2 * LAYERS * 8


@pytest.mark.parametrize("name", ["two over RAM for all", "three over the disk"])
def test_ctrl_c_at_any_moment_leaves_an_engine_that_answers_the_same(
    paper, case, monkeypatch, name
):
    expected = text(load(case("nf4"), EXPERTS))
    engine, check = spread_out(paper, case("nf4"), name), interrupts.check
    left = 0  # calls until Ctrl-C

    def interrupted():
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        check()

    monkeypatch.setattr(interrupts, "check", interrupted)
    for calls in range(1, 60, 14):
        left = calls
        with pytest.raises(KeyboardInterrupt):
            text(engine)
        if calls % 4 == 1:
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


@pytest.mark.parametrize("slots", [2, 5])
def test_what_workers_leave_to_two_gpus_is_spread_over_both(paper, case, monkeypatch, slots):
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


def test_a_worker_spreads_what_a_chat_lets_it_hold_over_its_gpus(paper, case):
    paper.devices = 2
    expert = case("nf4").blueprint.expert.stride
    notes: list[str] = []
    budget = MemoryBudget(size=3 * expert)
    settled(paper)
    for number in range(2):  # beside the experts, room to dequantize one
        memory = paper.memory(torch.device("paper", number))
        memory.total = memory.taken + 4 * expert + 400_000
    options = LoadOptions(MemoryBudget(size=0), (budget,))
    served = load_served_experts(case("nf4").directory, options, notes.append)
    assert served.slots == 6
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    for exact, chosen in product((False, True), ((0, 2), (1, 3))):
        keys = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in chosen]
        served.begin(hello_of(served, "float32", exact))
        served.hold(keys)
        while served.load_next():
            pass
        assert [device.fetcher.slots for device in served._experts._devices] == [3, 3]
        assert all(served._experts.holds(key) for key in keys)
        for layer in range(LAYERS):
            served.compute(layer, [(expert, 1) for expert in chosen], x, True, lambda: None)
        assert served._experts.stats.misses.total() == len(keys)  # each was loaded once
    assert notes == []


def test_devices_that_do_not_go_together_are_refused(paper):
    paper.devices = 2
    assert [str(device) for device in usable_devices("paper").devices] == ["paper:0", "paper:1"]
    for names in (None, "paper:0,paper:1"):
        assert usable_devices(names) == usable_devices("paper")
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
            usable_devices(names)


def test_planning_looks_at_every_gpu(paper, tmp_path):
    paper.devices = 2
    paper.memory(torch.device("paper", 1)).total = 10**9
    there = Machine.now(tmp_path, usable_devices(None).devices)
    (other,) = there.other_gpus
    assert (other.device, other.name, other.memory) == ("paper:1", "GPU on paper", 10**9)
    assert there.free.other_gpus["paper:1"] <= 10**9 < (there.free.device or 0)


def test_the_speed_with_the_slots_of_all_gpus_is_predicted(paper, case, monkeypatch):
    known = speeds(copy=1e9, expert=1e-3)
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
        assert predicted.decode() == expected


def test_an_event_of_one_gpu_is_not_recorded_on_the_stream_of_another(paper):
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


def test_the_first_gpu_is_taken_if_none_is_named_and_one_that_is_not_there_is_refused(paper):
    assert usable_devices(None).devices == [torch.device("paper:0")]
    with pytest.raises(UsageError, match="torch sees 1 GPU here"):
        usable_devices("paper:1")
    paper.devices = 2
    assert usable_devices("paper:1").devices == [torch.device("paper:1")]
    assert paper.current_device() == 1


@pytest.fixture
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products on paper are the CPU's."""
    for dimension in ("_TOKENS", "_COLUMNS", "_ROWS"):
        monkeypatch.setattr(bandwidth, dimension, 8)
    monkeypatch.setattr(gpu_measuring, "_MATRIX_BYTES", 10**6)


def test_planning_looks_at_a_gpu_and_measures_it(paper, case, tmp_path, small_products):
    device, blueprint = torch.device("paper", 0), case("nf4").blueprint
    there = Machine.now(tmp_path, [device])
    assert (there.gpu, there.gpu_memory) == ("GPU on paper", 4 * 10**9)
    assert "paper:0: GPU on paper" in measurement_key(blueprint, tmp_path, device)
    little = Effort(file_bytes=100_000, pool_bytes=100_000, seconds=1e-3)
    found = take_sample(blueprint, tmp_path, [device], layer_probe(blueprint), effort=little)
    (measured,) = found.gpus
    assert (measured.name, measured.origin) == ("GPU on paper", "measured")
    assert min(measured.memory, measured.bus, measured.compute) > 0
    assert set(measured.efficiency) == {"nf4", "int8"}
    assert found.copy_bandwidth == measured.bus


def test_a_gpu_is_measured_beside_a_model_that_fills_it(paper, case):
    """The bench took 1.15 GB after the slots had taken all but one."""
    device, blueprint = torch.device("paper", 0), case("nf4").blueprint
    memory = paper.memory(device)
    memory.total = memory.taken + 100_000_000
    most, allocate = [memory.taken], paper.allocated

    def watch(tensor, device):
        allocate(tensor, device)
        most.append(memory.taken)

    paper.allocated = watch
    measured = measure_gpu(blueprint, device)
    limits = LimitsMeter(device)
    assert min(limits.measure().memory, measured.memory) > 0
    assert max(most) - most[0] < 50_000_000


def test_the_bench_measures_a_gpus_limits(paper, small_products):
    device = torch.device("paper", 0)
    limits = LimitsMeter(device).measure()
    assert min(limits.memory, limits.gemm) > 0
    assert (copy_bandwidth(device, 4096) or 0) > 0
    assert copy_bandwidth(torch.device("cpu"), 4096) is None
