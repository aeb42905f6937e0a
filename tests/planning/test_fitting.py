"""The memory that a model asks for."""

from dataclasses import replace
from typing import Any

import pytest

from mixchat.base.errors import UsageError
from mixchat.base.model_config import ModelConfig
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.base.rope_parameters import RopeParameters
from mixchat.experts.placement import Demand, reserve_of
from mixchat.install.known_models import KNOWN
from mixchat.planning.fitting import FreeMemory, MemoryPlan, fit_model
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization

MODEL = read_config(KNOWN["instruct"].config)


def fitted(model: ModelConfig, context_size: int | None = None) -> MemoryPlan:
    blueprint = Blueprint(model, Quantization())
    return fit_model(blueprint, FreeMemory(64 * 10**9), LoadOptions(context_size=context_size))


def test_the_demand_of_mixtral():
    assert fitted(MODEL, 8192).demand == Demand(
        shared=2_949_128_192,
        context=2**30,
        expert=93_585_408,
        experts=256,
        whole=256 * 93_585_408,
        layers=(93_585_408,) * 32,
    )


def test_a_context_that_a_person_chose_is_taken_or_refused():
    assert [fitted(MODEL, size).context for size in (2, 32768)] == [2, 32768]
    for size in (0, 1, 32769):
        with pytest.raises(UsageError, match="2 to 32768"):
            fitted(MODEL, size)


GB = 10**9


def context(free: float, device: float | None = None, **options: Any) -> int:
    on_gpu = None if device is None else int(device * GB)
    memory = FreeMemory(int(free * GB), on_gpu)
    return fit_model(Blueprint(MODEL, Quantization()), memory, LoadOptions(**options)).context


@pytest.mark.parametrize(
    ("free", "tokens"), [(64, 32768), (33, 32768), (31, 16384), (30, 8192), (14, 8192), (4.3, 8192)]
)
def test_a_context_is_as_large_as_costs_no_expert_its_place(free, tokens):
    """Coding agents failed with "prompt is too long": each model had 8,192 tokens."""
    assert context(free) == tokens
    assert context(64, device=free + 0.2) == tokens  # keys and values are on the GPU then


@pytest.mark.parametrize("free", [29.5, 30.5, 31.2, 32.9, 40])
def test_a_full_context_that_nobody_chose_leaves_the_experts_and_the_reserve(free):
    fit = fit_model(Blueprint(MODEL, Quantization()), FreeMemory(int(free * GB)), LoadOptions())
    if fit.context > 8192:
        left = fit.free.host - fit.demand.shared - fit.demand.whole - fit.demand.context
        assert fit.placement.slots == 256
        assert left >= reserve_of(fit.free.host)


def test_answers_at_once_8_bits_and_windows_count_in_the_context():
    assert [context(32, parallel=count) for count in (1, 2, 4)] == [16384, 8192, 8192]
    assert context(32, kv_bits=8) == 32768
    windows = replace(MODEL, sliding_window=128, layer_types=("sliding_attention",) * 32)
    fit = fit_model(Blueprint(windows, Quantization()), FreeMemory(30 * GB), LoadOptions())
    assert fit.context == 32768  # of which layers keep 2,688 tokens


def test_a_context_keeps_to_budgets():
    budget = MemoryBudget(size=8 * GB)
    assert context(64, host_memory=budget) == 32768
    assert context(13.5, host_memory=budget) == 8192
    assert context(64, device=24, device_memory=(budget,)) == 8192
    wide = (MemoryBudget(size=32 * GB),)
    assert context(64, device=40, device_memory=wide) == 32768


def test_a_context_is_never_longer_than_the_models_or_its_ropes_original():
    for largest, tokens in ((2048, 2048), (20000, 20000), (131072, 32768)):
        assert fitted(replace(MODEL, max_position_embeddings=largest)).context == tokens
    rope = RopeParameters(1e6, "dynamic", 4.0, original_max_position_embeddings=4096)
    assert fitted(replace(MODEL, rope_parameters=rope)).context == 4096


def test_a_saved_conversation_fits_again_when_less_memory_is_free():
    """With 32,768 tokens one day and 8,192 the next, its KV cache could not be used."""
    assert context(14, least_context=20000) == 32768
    assert context(14, least_context=9000) == 16384
    assert context(14, least_context=8000) == 8192
    assert context(6, least_context=20000) == 16384  # more does not fit
    assert context(14, least_context=20000, context_size=4096) == 4096
    assert context(64, least_context=10**6) == 32768


def test_the_table_of_the_embedding_counts_only_where_it_is_the_head_too():
    """It has 32,000 rows of 4,096 weights, of which a token needs one row."""
    table = 32_000 * 4_096 * 2
    tied = replace(MODEL, tie_word_embeddings=True)
    one = fitted(tied).demand.shared
    assert one == fitted(MODEL).demand.shared
    assert one == sum(spec.nbytes for spec in Blueprint(tied, Quantization()).shared_tensors())
    apart = Blueprint(tied, Quantization(head="int8"))
    assert apart.shared_size == sum(spec.nbytes for spec in apart.shared_tensors()) - table


EIGHT_BITS = Blueprint(MODEL, Quantization(attention="int8", head="int8"))


def test_8_bits_take_half_of_the_attention_and_the_head():
    """1,473,249,280 weights: 2 bytes each, or 1 and a bf16 scale for each 64."""
    fit = fit_model(EIGHT_BITS, FreeMemory(64 * 10**9), LoadOptions())
    assert fit.demand.shared == 2_949_128_192 - 1_473_249_280 + 1_473_249_280 // 32
    assert fit.blueprint == EIGHT_BITS


def test_a_gpu_too_small_for_16_bits_holds_8():
    options = LoadOptions(device_memory=(MemoryBudget(size=3_200_000_000),))
    fit = fit_model(EIGHT_BITS, FreeMemory(64 * 10**9, 24 * 10**9), options)
    assert fit.blueprint == EIGHT_BITS
    with pytest.raises(UsageError, match="too small"):
        fit_model(Blueprint(MODEL, Quantization()), fit.free, options)


STATES = Blueprint(read_config(KNOWN["qwen3.6"].config), Quantization())


@pytest.mark.parametrize(
    ("free", "parallel", "checkpoints"),
    [(64, 1, 64), (25, 1, 32), (24, 1, 16), (20, 1, 8), (64, 4, 16), (28, 4, 4)],
)
def test_checkpoints_are_as_many_as_cost_no_expert_its_place(free, parallel, checkpoints):
    """They had 512 MB however much memory was free, so a long text had one in 8,192 tokens."""
    options = LoadOptions(context_size=32768, parallel=parallel)
    fit = fit_model(STATES, FreeMemory(free * GB), options)
    assert fit.checkpoints == checkpoints
    usual = fit_model(STATES, FreeMemory(20 * GB), options)
    more = fit.checkpoints - usual.checkpoints
    assert fit.demand.context - usual.demand.context == more * parallel * 65_863_680
    if more:
        left = fit.free.host - fit.demand.shared - fit.demand.whole - fit.demand.context
        assert left >= reserve_of(fit.free.host)


def test_a_gpu_and_budgets_have_checkpoints_by_their_room():
    def checkpoints(host, device=None, **options):
        memory = FreeMemory(host * GB, device and device * GB)
        return fit_model(STATES, memory, LoadOptions(context_size=32768, **options)).checkpoints

    budget = MemoryBudget(size=8 * GB)
    assert [checkpoints(64, device) for device in (20, 24, 48)] == [8, 16, 64]
    assert [checkpoints(host, host_memory=budget) for host in (14, 16, 18)] == [8, 32, 64]


def test_a_model_without_states_has_no_checkpoints():
    assert fitted(MODEL).checkpoints == 0
