"""Decoding waits for the device as rarely as it can: a GPU is idle each time."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.loading.loader import load_engine

# The ways to bring numbers from a device to Python, or a tensor to another device.
WAITS = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")
# Those that wait only where the tensor is on a GPU: the sampler has the logits on the CPU by then.
AFTER_THE_LOGITS = {"__int__", "item", "numpy"}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what would wait for a GPU, if these tensors were there."""
    counts: Counter[str] = Counter()

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **options)

        return call

    for name in WAITS:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return counts


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_a_token_waits_once_a_layer_for_the_routing_and_once_for_the_logits(
    tiny_model, waits, device
):
    engine = load_engine(tiny_model, LoadOptions(device=device, context_size=64))
    greedy = SamplingOptions(temperature=0)
    answer = engine.generate([5, 6, 7], sampling=greedy, stop_ids=set(), max_tokens=60)
    for _ in range(30):  # until all experts are where they are computed
        next(answer)
    assert engine.experts._devices[0].fetcher.holds_all
    waits.clear()
    for _ in range(10):
        next(answer)
    waited = {name: count for name, count in waits.items() if name not in AFTER_THE_LOGITS}
    # The id and the row of the embedding are on the CPU everywhere.
    embedding = Counter(tolist=10)
    layers = engine.config.num_hidden_layers
    assert waited == Counter(tolist=10 * layers, cpu=10) + embedding
