"""What a model asks of memory, and how many threads it is given."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mixchat.config import ModelConfig
from mixchat.engine.fitting import context_size, demand_of, settle_threads
from mixchat.errors import UsageError
from mixchat.experts.placement import Demand
from mixchat.weights.blueprint import Blueprint, Quantization
from mixchat.weights.demo import CONFIG
from mixchat.weights.outline import MIXTRAL

MODEL = ModelConfig.from_dict(MIXTRAL)


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """Torch takes two threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


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


def test_small_experts_are_computed_by_one_thread_and_others_by_as_many_as_there_were() -> None:
    settle_threads(Blueprint(MODEL, Quantization()))
    assert torch.get_num_threads() == 2
    settle_threads(Blueprint(ModelConfig.from_dict(CONFIG), Quantization()))
    assert torch.get_num_threads() == 1
