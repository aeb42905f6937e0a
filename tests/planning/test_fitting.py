"""The memory that a model asks for."""

from dataclasses import replace

import pytest

from mixchat.base.errors import UsageError
from mixchat.base.model_config import ModelConfig
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.experts.placement import Demand
from mixchat.planning.fitting import FreeMemory, MemoryPlan, fit_model
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.known_models import MIXTRAL

MODEL = read_config(MIXTRAL)


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
    )


def test_a_context_is_at_most_8192_tokens_unless_asked_for():
    assert fitted(MODEL).context == 8192
    assert fitted(replace(MODEL, max_position_embeddings=2048)).context == 2048
    assert [fitted(MODEL, size).context for size in (2, 32768)] == [2, 32768]
    for size in (0, 1, 32769):
        with pytest.raises(UsageError, match="2 to 32768"):
            fitted(MODEL, size)


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
    assert fit.computed == fit.blueprint == EIGHT_BITS


@pytest.mark.parametrize(
    ("free", "slots", "bits"), [(40, 256, 16), (28.6, 256, 8), (29.7, 256, 16), (12, 89, 8)]
)
def test_a_gpu_widens_8_bits_where_all_experts_fit_all_the_same(free, slots, bits):
    """With 28.6 GB and 1.14 left free, experts and context leave 2.4 of the 2.9 it takes."""
    fit = fit_model(EIGHT_BITS, FreeMemory(64 * 10**9, int(free * 10**9)), LoadOptions())
    assert fit.placement.slots == slots
    assert fit.computed.quantization.attention == ("none" if bits == 16 else "int8")
    assert fit.demand.shared == fit.computed.shared_size
    assert fit.demand.shared == (2_949_128_192 if bits == 16 else 1_521_917_952)
    assert fit.blueprint == EIGHT_BITS


def test_a_gpu_too_small_for_16_bits_holds_8():
    options = LoadOptions(device_memory=(MemoryBudget(size=3_200_000_000),))
    fit = fit_model(EIGHT_BITS, FreeMemory(64 * 10**9, 24 * 10**9), options)
    assert fit.computed == EIGHT_BITS
    with pytest.raises(UsageError, match="too small"):
        fit_model(Blueprint(MODEL, Quantization()), fit.free, options)


def test_more_memory_of_a_gpu_widens_the_stored_model():
    fit = fit_model(EIGHT_BITS, FreeMemory(64 * 10**9, 24 * 10**9), LoadOptions())
    assert fit.computed == EIGHT_BITS
    more = fit.with_more("device", 16 * 10**9)
    assert more.computed == EIGHT_BITS.widened() != EIGHT_BITS
    assert more.with_more("device", -(16 * 10**9)).computed == EIGHT_BITS


def test_a_head_apart_from_the_embedding_it_is_tied_to_is_not_widened():
    """It would become the embedding, which was not rounded: another model."""
    tied = Blueprint(replace(MODEL, tie_word_embeddings=True), EIGHT_BITS.quantization).widened()
    assert tied.quantization.attention == "none"
    assert tied.head.quant_type == "int8"
