"""The experts that a worker serves compute the bits that an engine's do."""

from pathlib import Path

import pytest
import torch
from served_workers import hello_of

from mixchat.base import machine
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.experts import memory
from mixchat.experts.cache import ExpertKey
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.workers.messages import Hello
from mixchat.loading.loader import load_engine
from mixchat.loading.served_experts import ServedExperts, load_served_experts

CPU = LoadOptions(MemoryBudget(fraction=0.5), device="cpu")


@pytest.mark.parametrize("kind", [{}, {"quant_type": "none"}], ids=["nf4", "fp32"])
@pytest.mark.parametrize("shape", [(64, 96), (64, 128), (50, 49), (80, 112)], ids=str)
def test_rows_get_the_bits_that_they_get_in_a_prompt(make_checkpoint, install, shape, kind):
    """MKL rounds otherwise where rows lie at odd addresses, as they do in what a chat sends."""
    hidden_size, intermediate_size = shape
    checkpoint = make_checkpoint(hidden_size=hidden_size, intermediate_size=intermediate_size)
    model = install(checkpoint, **kind)
    served = load_served_experts(model, CPU, lambda line: None)
    engine = load_engine(model, CPU)
    dtype = engine.blueprint.quantization.dtype
    served.begin(hello_of(served, str(dtype).removeprefix("torch.")))
    hidden_states = torch.randn(17, hidden_size, generator=torch.Generator().manual_seed(1))
    hidden_states = hidden_states.to(dtype)
    # One row for expert 1, after five for expert 0.
    selected = torch.tensor([[0, 1], *[[0, 2]] * 4, *[[2, 3]] * 12])
    rows = LayerRows(1, hidden_states, selected)
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


def served_on_cpu(model: Path, options: LoadOptions) -> tuple[ServedExperts, Hello]:
    """Return the experts of the tiny model, 4 in each of 2 layers, and a chat for them."""
    served = load_served_experts(model, options, lambda line: None)
    return served, hello_of(served, "bfloat16")


def load_all(served: ServedExperts, keys: list[ExpertKey]) -> int:
    """Let experts be held, and return how many of them were loaded."""
    served.hold(keys)
    loads = 0
    while served.load_next():
        loads += 1
        assert loads <= len(keys)
    return loads


def test_experts_of_the_last_chat_make_room_for_those_of_the_next_one(tiny_model):
    """Those that had just been loaded were evicted instead, again and again, without an end."""
    served, hello = served_on_cpu(tiny_model, CPU)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    served.begin(hello)
    assert load_all(served, [ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(0, 2), ExpertKey(1, 0)])
    for _ in range(3):
        served.compute(0, [(0, 1), (1, 1), (2, 1)], x, True, lambda: None)
        served.compute(1, [(0, 1)], x, True, lambda: None)
    served.begin(hello)
    assert load_all(served, [ExpertKey(1, expert) for expert in range(4)]) == 3


def test_experts_are_freed_for_other_programs_also_while_nothing_is_asked(tiny_model, monkeypatch):
    """Only requests looked at the memory: a worker said what it had room for when it started."""
    free = 10**12
    monkeypatch.setattr(machine, "free_memory", lambda: free)
    monkeypatch.setattr(memory, "INTERVAL", 0)
    served, hello = served_on_cpu(tiny_model, LoadOptions(device="cpu"))
    served.begin(hello)
    assert served.slots == 8
    free = 0
    served.begin(hello)
    assert served.slots == 2
    free = 10**12
    every = [ExpertKey(layer, expert) for layer in range(2) for expert in range(4)]
    served.begin(hello)
    assert served.slots == 8
    assert load_all(served, every) == 8
    held = served._experts.bytes_held
    free = 0
    while served.load_next():  # those to hold first may be others than those that have stayed
        pass
    assert served._experts.bytes_held == held // 4
    free = 10**12
    assert served.load_next()
    assert served.slots == 8
