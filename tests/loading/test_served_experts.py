"""The experts that a worker serves compute the bits that an engine's do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.workers.messages import Hello
from mixchat.loading.loader import load_engine
from mixchat.loading.served_experts import load_served_experts
from mixchat.options import LoadOptions
from mixchat.quantities import MemoryBudget

CPU = LoadOptions(MemoryBudget(fraction=0.5), device="cpu")


@pytest.mark.parametrize(
    "kind", [{}, {"quant_type": "none"}, {"layout": "cpu-packed"}], ids=["nf4", "fp32", "packed"]
)
@pytest.mark.parametrize("shape", [(64, 96), (50, 49), (80, 112)], ids=str)
def test_rows_get_the_bits_that_they_get_in_a_prompt(
    make_checkpoint: Callable[..., Path],
    install: Callable[..., Path],
    shape: tuple[int, int],
    kind: dict[str, str],
) -> None:
    """MKL rounds otherwise where rows lie at odd addresses, as they do in what a chat sends."""
    if shape == (50, 49) and kind != {"quant_type": "none"}:
        pytest.skip("4 bits need an even number of columns")
    hidden_size, intermediate_size = shape
    checkpoint = make_checkpoint(hidden_size=hidden_size, intermediate_size=intermediate_size)
    model = install(checkpoint, **kind)
    served = load_served_experts(model, CPU, lambda line: None)
    served.begin(Hello(served.identity, served.name, "float32", hidden_size))
    engine = load_engine(model, CPU)
    hidden_states = torch.randn(17, hidden_size, generator=torch.Generator().manual_seed(1))
    # One row for expert 1, after five for expert 0.
    selected = torch.tensor([[0, 1], *[[0, 2]] * 4, *[[2, 3]] * 12])
    rows = LayerRows(1, hidden_states, selected, selected)
    with torch.inference_mode():
        expected = engine.experts.compute(1, hidden_states, selected)
    keys = list(rows.counts)
    sent = torch.cat([rows.of(key) for key in keys])
    found = served.compute(
        1, [(key.expert, rows.counts[key]) for key in keys], sent, False, lambda: None
    )
    for key, part in zip(keys, found.split([rows.counts[key] for key in keys]), strict=True):
        rows.put(key, part)
    assert torch.equal(rows.outputs, expected.outputs)
