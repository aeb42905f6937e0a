"""The memory that a model asks for."""

from dataclasses import replace

import pytest

from mixchat.errors import UsageError
from mixchat.experts.placement import Demand
from mixchat.model_config import ModelConfig
from mixchat.options import LoadOptions
from mixchat.planning.fitting import Fit, FreeMemory, fit_model
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.make.outline import MIXTRAL

MODEL = ModelConfig.from_dict(MIXTRAL)


def fitted(model: ModelConfig, context_size: int | None = None) -> Fit:
    blueprint = Blueprint(model, Quantization())
    return fit_model(blueprint, FreeMemory(64 * 10**9), LoadOptions(context_size=context_size))


def test_the_demand_of_mixtral() -> None:
    assert fitted(MODEL, 8192).demand == Demand(
        shared=3_211_272_192, context=2**30, expert=93_585_408, experts=256
    )


def test_a_context_is_at_most_8192_tokens_unless_asked_for() -> None:
    assert fitted(MODEL).context == 8192
    assert fitted(replace(MODEL, max_position_embeddings=2048)).context == 2048
    assert [fitted(MODEL, size).context for size in (2, 32768)] == [2, 32768]
    for size in (0, 1, 32769):
        with pytest.raises(UsageError, match="2 to 32768"):
            fitted(MODEL, size)
