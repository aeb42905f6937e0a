"""What a model asks of memory."""

from dataclasses import replace

import pytest

from mixchat.errors import UsageError
from mixchat.experts.placement import Demand
from mixchat.model_config import ModelConfig
from mixchat.planning.fitting import context_size, demand_of
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.make.outline import MIXTRAL

MODEL = ModelConfig.from_dict(MIXTRAL)


def test_the_demand_of_mixtral() -> None:
    assert demand_of(Blueprint(MODEL, Quantization()), 8192) == Demand(
        shared=3_211_272_192, context=2**30, expert=93_585_408, experts=256
    )


def test_a_context_is_at_most_8192_tokens_unless_asked_for() -> None:
    assert context_size(MODEL, None) == 8192
    assert context_size(replace(MODEL, max_position_embeddings=2048), None) == 2048
    assert [context_size(MODEL, wanted) for wanted in (2, 32768)] == [2, 32768]
    for wanted in (0, 1, 32769):
        with pytest.raises(UsageError, match="2 to 32768"):
            context_size(MODEL, wanted)
