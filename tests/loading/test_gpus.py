"""Models on GPUs on paper (see paper_gpu.py) compute what the CPU computes."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from paper_runtime import Graph
from paper_tools import (
    EXPERTS,
    GREEDY,
    KINDS,
    LAYERS,
    PASSES,
    PROMPT,
    SPREADS,
    TOLERANCES,
    apart,
    installed_case,
    load,
    logits,
    random_case,
    settled,
    spread_out,
    text,
    tokens_agree,
)

from mixchat.base import gpu, interrupts
from mixchat.base.model_config import ModelConfig
from mixchat.base.options import LoadOptions
from mixchat.engine.answer import TokenAnswer
from mixchat.engine.generate import Engine
from mixchat.engine.layers.graph import kernels
from mixchat.engine.layers.operations import Apply, Rotate, Rows, UnsupportedOperationError
from mixchat.experts.cache import ExpertKey
from mixchat.experts.layer_rows import LayerRows
from mixchat.kernels.cpu.rows import Scaling
from mixchat.loading import devices, loader
from mixchat.loading.loader import load_engine, speed_predictor
from mixchat.planning.fitting import FreeMemory, fit_model
from mixchat.planning.machine_speeds import MachineSpeeds
from mixchat.planning.measuring import estimated_speeds
from mixchat.weights.families.mistral import MIXTRAL
from mixchat.weights.families.read_config import FAMILIES as FAMILIES_BY_TYPE

# Qwen3.5's layers are those of Qwen3-Next.
FAMILIES = sorted(FAMILIES_BY_TYPE.keys() - {"mixtral", "qwen3_5_moe"})


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("nf4", name) for name in SPREADS), *((kind, "half in RAM") for kind in KINDS)],
)
def test_gpus_compute_what_the_cpu_computes(paper, case, kind, name):
    engine = spread_out(paper, case(kind), name)
    assert engine.device == torch.device(gpu.KIND, 0)
    assert kind == "a mix" or engine.slots_by_tier == SPREADS[name].tiers
    found = logits(engine)
    assert apart(found, case(kind).expected) < TOLERANCES.get(kind, 0.03)
    assert tokens_agree(found, case(kind).expected)


@pytest.mark.parametrize("kind", ["fp32", "mxfp4", "trellis2", "a mix"])
def test_the_kernels_themselves_compute_it(paper, small_case, kind):
    """By Triton's interpreter, with all of them in one engine.

    The mix has nf4 and trellis3. tests/kernels/gpu/ has each type's products and experts.
    """
    small = small_case(kind)
    paper.interprets = True
    engine = load(small, EXPERTS // LAYERS)
    with torch.inference_mode():
        found = [
            engine.passes.model.forward(torch.tensor(ids), engine.held()[1], logits_of=slice(None))
            for ids in ([5, 9, 33], [60], [2])
        ]
    found = torch.cat([rows.float().cpu() for rows in found])
    assert apart(found, small.expected) < TOLERANCES.get(kind, 0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_cpu_s_logits(paper, make_checkpoint, install, family):
    """In fp32, since other types let the choice between two experts fall otherwise."""
    checkpoint = make_checkpoint(model_type=family, std=0.05, stored_as="float32")
    passes = ([*range(5, 17)], [33], [60])
    known = installed_case(install(checkpoint, quant_type="none", attention=16, head=16), passes)
    experts = known.blueprint.expert_count
    engine = load(known, experts // 2 + 2, experts)
    # Tokens are graphs, if the router has no groups, queries are not scaled by position, and no
    # layer is Mamba2.
    config = known.blueprint.config
    is_graph = config.n_group == 1 and not config.rope_parameters.llama_4_scaling_beta
    is_graph = is_graph and not config.mamba_n_heads
    assert (engine.passes.model._decoder is not None) == is_graph
    assert apart(logits(engine, passes), known.expected) < 1e-5


# Features that no family has alone.
FEATURES: dict[str, dict[str, Any]] = {
    "gates": {"attn_output_gate": True, "qk_norm": "head", "fp32_norms": True},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("slots", [EXPERTS, EXPERTS // 2])
def test_graphs_compute_every_feature(paper, tmp_path, monkeypatch, feature, slots):
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return replace(MIXTRAL.read_config(raw), **FEATURES[feature])

    monkeypatch.setitem(FAMILIES_BY_TYPE, "mixtral", replace(MIXTRAL, read_config=read_config))
    case = random_case(tmp_path / "model", "fp32", PASSES)
    engine = load(case, slots, EXPERTS)
    assert apart(logits(engine), case.expected) < 1e-5
    engine.forget()
    expected = text(engine)
    launches = paper.launches
    assert text(engine) == expected
    # Without graphs, each layer of each token has ten at least.
    assert paper.launches - launches < 8 * 10 * LAYERS


class Halving(Scaling):
    """A kernel that GPUs lack."""


_X = Rows.new("x", 64)


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (Apply(_X, (_X,), Halving(0.5)), "Halving"),
        (Rotate(_X, _X, Mock()), "Rotate"),
    ],
)
def test_an_operation_without_kernels_is_refused_by_its_name(operation, name):
    """Graphs told mixers apart by the operations in them, and could name no single one."""
    with pytest.raises(UnsupportedOperationError, match=f"^{name}$"):
        kernels([operation], Mock())


@pytest.mark.parametrize("name", ["one holds all", "two over RAM for some"])
def test_an_answer_after_a_prompt_is_the_same_the_second_time(paper, case, name):
    engine = spread_out(paper, case("nf4"), name, kv_bits=8)
    assert text(engine) == text(engine)


def test_the_host_waits_once_a_token_for_each_gpu(paper, case):
    """tests/loading/test_gpu_batches.py counts the waits of one GPU."""
    engine = spread_out(paper, case("fp32"), "two hold all")
    while engine.experts.is_filling:
        time.sleep(0.001)
    answer = engine.generate(PROMPT, sampling=GREEDY, stop_ids=set(), max_tokens=20)
    for _ in range(5):
        next(answer)
    for _ in range(10):
        paper.waits = 0
        next(answer)
        assert paper.waits == 2


def test_a_prompt_waits_for_its_routers_and_what_is_carried_to_the_gpu(paper, case):
    engine = load(case("fp32"), EXPERTS)
    text(engine)
    engine.forget()
    paper.waits = 0
    next(engine.generate(PROMPT, sampling=GREEDY, stop_ids=set(), max_tokens=1))
    assert paper.waits <= 2 * LAYERS + 1


@pytest.fixture
def interrupt_after(monkeypatch):
    """Let Ctrl-C come in so many calls of `interrupts.check`."""
    check, left = interrupts.check, [0]

    def interrupted():
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        check()

    monkeypatch.setattr(interrupts, "check", interrupted)
    return lambda calls: left.__setitem__(0, calls)


def test_ctrl_c_at_any_moment_leaves_an_engine_that_answers_the_same(paper, case, interrupt_after):
    engine = spread_out(paper, case("fp32"), "half in RAM")
    expected = text(engine)
    for calls in (1, 7, 20):
        engine.forget()
        interrupt_after(calls)
        with pytest.raises(KeyboardInterrupt):
            text(engine)
        assert text(engine) == expected


@pytest.fixture(scope="module")
def hybrid(make_checkpoint, install):
    """A model with states beside keys and values."""
    checkpoint = make_checkpoint(model_type="qwen3_next", std=0.05, stored_as="float32")
    return installed_case(install(checkpoint, quant_type="none", attention=16, head=16), [[5]])


@pytest.mark.parametrize("devices", [1, 2])
def test_states_are_those_of_whole_tokens_and_go_back_to_checkpoints(
    paper, hybrid, devices, interrupt_after
):
    paper.devices = devices
    experts = hybrid.blueprint.expert_count
    engine = load(hybrid, experts - 4, experts, others=[experts] * (devices - 1))
    expected = text(engine)
    assert text(engine) == expected  # of a checkpoint at the end of the prompt
    interrupt_after(20)  # between two layers of a decoded token
    answer = engine.generate(PROMPT, sampling=GREEDY, stop_ids=set(), max_tokens=8)
    found: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        found.extend(answer)
    assert 0 < len(found) < 8
    more = engine.generate([*PROMPT, *found], sampling=GREEDY, stop_ids=set(), max_tokens=8)
    assert [*found, *more][:8] == expected


def test_a_prompt_launches_no_more_for_more_tokens(paper, hybrid):
    """Each layer's state took ten launches a token."""
    engine = load(hybrid, hybrid.blueprint.expert_count)
    counts = []
    for tokens in (20, 20, 50):
        before = paper.launches
        with torch.inference_mode():
            engine.passes.model.forward(torch.arange(5, 5 + tokens), engine.held()[1])
        counts.append(paper.launches - before)
        engine.forget()
    assert counts[2] < counts[1] + 20


def test_answers_of_a_model_with_states_are_the_same_in_company(paper, hybrid):
    engine = load(hybrid, hybrid.blueprint.expert_count, 0, parallel=2, more=10**8)
    expected = text(engine)
    batch = engine.new_batch()
    answers = [batch.add(TokenAnswer(PROMPT, GREEDY, set(), 8)) for _ in range(2)]
    while not all(answer.has_ended for answer in answers):
        batch.step()
    assert [answer.ids[len(PROMPT) :] for answer in answers] == [expected] * 2


class NearbyWorker:
    """A worker that computes in this process, as another machine would."""

    def __init__(self, engine: Engine, slots: int) -> None:
        self._experts: Any = engine.experts
        self.slots, self.works, self.arithmetic = slots, True, ""
        self.held: frozenset[ExpertKey] = frozenset()
        self.asked = 0

    def hold(self, keys: Sequence[ExpertKey]) -> None:
        self.held = frozenset(keys)

    def begin_turn(self) -> None:
        """It is never lost for good."""

    def begin(self, rows: LayerRows, keys: Sequence[ExpertKey]) -> None:
        self._keys = keys
        self.asked += len(keys)

    def finish(self, rows: LayerRows) -> Sequence[ExpertKey]:
        if not self.works:
            return self._keys
        for key in self._keys:
            chosen = torch.full((rows.counts[key], 1), key.expert)
            rows.put(key, self._experts.compute(rows.layer, rows.of(key), chosen).outputs)
        return []


def test_workers_compute_what_a_gpu_leaves_to_them(paper, case, monkeypatch):
    alone = load_engine(case("fp32").directory, LoadOptions(device="cpu", context_size=64))
    expected = text(alone)
    worker = NearbyWorker(alone, 6)
    monkeypatch.setattr(loader, "connect_workers", lambda *_: [worker])
    engine = load(case("fp32"), 5, 4)
    assert text(engine) == expected
    assert worker.asked
    worker.works = False
    engine.forget()
    assert text(engine) == expected


def test_an_engine_that_is_dropped_gives_back_its_gpus_memory_and_unlocks_ram(paper, case):
    """Pinned pages stayed so; the next block at that address could not be pinned."""
    model = case("nf4")
    text(spread_out(paper, model, "half in RAM"))  # the tables of levels stay on a GPU
    before = settled(paper)
    engine = spread_out(paper, model, "half in RAM")
    text(engine)
    assert sum(paper.locked.values()) < 34 * 2**20
    del engine
    assert settled(paper) == before


def test_a_shared_expert_does_not_delay_the_router_s_choice(
    paper, make_checkpoint, install, monkeypatch
):
    """The host waits for the choice, and a description has the shared expert before the router."""
    graphs: list[Graph] = []
    monkeypatch.setattr(paper, "CUDAGraph", lambda: graphs.append(Graph()) or graphs[-1])
    checkpoint = make_checkpoint(model_type="qwen2_moe", std=0.05, stored_as="float32")
    known = installed_case(install(checkpoint), ([5, 9],))
    load(known, known.blueprint.expert_count)
    # Two norms, two products, heads, attention, the router and three copies. Then zeros for the
    # host's part, two kernels of experts, and three of the shared expert with its gate.
    assert [len(graph.work) for graph in graphs[:2]] == [10, 6]


def test_what_graphs_read_is_kept_by_something_else(paper, make_checkpoint, install, monkeypatch):
    """A graph of CUDA keeps nothing: a dense part's table was freed, and replays read it."""
    graphs: list[Graph] = []
    monkeypatch.setattr(paper, "CUDAGraph", lambda: graphs.append(Graph()) or graphs[-1])
    checkpoint = make_checkpoint(model_type="qwen2_moe", std=0.05, stored_as="float32")
    known = installed_case(install(checkpoint), ([5, 9],))
    engine = load(known, known.blueprint.expert_count)
    while engine.experts.is_filling:
        time.sleep(0.001)
    taken = settled(paper)
    assert graphs
    for graph in graphs:
        graph.work.clear()
    assert settled(paper) == taken


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe_lite"])
def test_answers_at_once_take_their_context_and_no_scratch_of_their_own(
    paper, make_checkpoint, install, family, monkeypatch
):
    """Each layer, set of graphs and sequence had its own: 2 GB for GLM-4.7-Flash with `serve`.

    A context of 64 tokens is not split, and needs none.
    """

    def estimated(*given: Any) -> MachineSpeeds:
        # The tiny layers of tests take a CPU less time than a GPU's kernels take to start.
        return replace(estimated_speeds(*given), layer_seconds=1e-3)

    monkeypatch.setattr(devices, "estimated_speeds", estimated)
    size = {"model_type": family, "std": 0.05, "max_position_embeddings": 4096}
    directory = install(make_checkpoint(**size))
    known = installed_case(directory, ([5, 9],))
    taken, planned = [], []
    for parallel in (1, 3):
        before = settled(paper)[0]
        options = LoadOptions(context_size=4096, parallel=parallel)
        demand = fit_model(known.blueprint, FreeMemory(10**12, 10**12), options).demand
        engine = load_engine(directory, options)
        taken.append(settled(paper)[0] - before)
        planned.append(demand.beside_experts + demand.whole)
        del engine
    assert taken[1] - taken[0] < (planned[1] - planned[0]) + 2**16
    assert demand.scratch < taken[1] < planned[1] + 2**19  # with tables of ropes, and of a token


@pytest.mark.parametrize("part", [0, 0.1, 0.4, 0.8])
def test_a_gpu_may_run_out_of_memory_at_any_time(paper, case, part):
    """At a part of the allocations of an answer. The 500th was tried, of 203."""
    engine = load(case("fp32"), 6, EXPERTS)
    paper.allocations = 0
    expected = text(engine)
    after = 1 + int(part * paper.allocations)
    engine.forget()
    paper.allocations, paper.fail_at = 0, after
    assert text(engine) == expected
    assert paper.allocations > after


def test_ram_that_cannot_be_page_locked_is_slower_and_no_fault(paper, case):
    """Without it a graph cannot tell the host what a router chose."""
    paper.refuses_locks = True
    engine = load(case("fp32"), 5, EXPERTS)
    assert apart(logits(engine), case("fp32").expected) < 1e-5


def test_the_speed_with_the_slots_of_all_gpus_is_predicted(paper, case):
    for name in ("half in RAM", "two hold all"):
        engine = spread_out(paper, case("nf4"), name)
        predicted = speed_predictor(case("nf4").directory, None, engine)()
        assert predicted is None or predicted.decode() > 0
