"""`heads` and `store` beside what attention does on a CPU."""

import pytest
import torch
from gpu_tools import kv_tensors, length_of, stored

from mixchat.base.rope_parameters import RopeParameters
from mixchat.engine.layers.operations import RMSNorm
from mixchat.engine.layers.rope import RotaryEmbedding
from mixchat.kernels.gpu.heads import heads
from mixchat.kernels.gpu.kv_store import store

CPU = torch.device("cpu")
YARN = RopeParameters(
    rope_type="yarn", rope_theta=1.5e5, factor=4.0, original_max_position_embeddings=32
)


def weights_of(kind: str, count: int, width: int) -> list[torch.Tensor]:
    sizes = {"none": (), "head": (width, width), "projection": (count * width, 2 * width)}
    return [torch.randn(size) for size in sizes[kind]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("count", "width", "rotated", "splits", "norm", "clip", "past", "others"),
    [
        (4, 64, 64, 1, "none", None, 0, ()),
        (4, 64, 64, 4, "none", 1.5, 33, ()),
        (6, 80, 80, 3, "head", None, 7, ()),
        (2, 96, 96, 9, "projection", None, 40, ()),
        (8, 128, 64, 2, "head", None, 63, ()),  # the last position of the tables
        (2, 256, 256, 5, "projection", 2.0, 20, ()),
        (4, 16, 8, 1, "projection", None, 1, ()),
        (4, 64, 64, 3, "head", None, 5, ("gates",)),
        (4, 80, 80, 3, "head", None, 5, ("gates",)),
        (4, 64, 64, 3, "head", None, 5, ("v_norm",)),
        (4, 64, 64, 3, "head", None, 5, ("v_norm", "values_are_keys")),
    ],
)
def test_heads_are_those_of_a_cpu(
    dtype, bits, count, width, rotated, splits, norm, clip, past, others
):
    """Gates are stored as they are. Values may be normalized, and may be the keys."""
    rope = YARN if width == 64 else RopeParameters(1e4, partial_rotary_factor=rotated / width)
    rotation = RotaryEmbedding(rope, width, 64, dtype, CPU)
    norms = [RMSNorm(weight.to(dtype), 1e-5) for weight in weights_of(norm, count, width)]
    # Queries, keys, values and gates. A head that is not asked for is not there.
    heads_of = count, 2, 0 if "values_are_keys" in others else 2, count * ("gates" in others)
    partials = torch.randn(splits, sum(heads_of) * width)

    qkv = partials.sum(0).to(dtype).view(1, -1, width)
    gates_before = qkv[0, count + sum(heads_of[1:3]) :].clone()
    values = qkv[:, count + heads_of[2] :][:, :2]
    if "v_norm" in others:
        values = RMSNorm(torch.ones(width), 1e-5)(values)
    for normed, one in zip((qkv[:, :count], qkv[:, count : count + 2]), norms, strict=False):
        one(normed, in_place=True)
    if clip is not None:
        qkv.clamp_(-clip, clip)
    rotated_heads = rotation(qkv[:, : count + 2], slice(past, past + 1))[0]

    tensors = kv_tensors(2, 32, width, dtype, bits)
    queries = torch.full((count, width), torch.nan).to(dtype)
    gates = torch.empty(count, width).to(dtype) if "gates" in others else None
    weights = [one.weight for one in norms]
    of_values = {name: True for name in others if name != "gates"}
    place = length_of(past), rotation.tables
    heads(partials, queries, tensors, *place, weights, 1e-5, clip, gates, **of_values)

    # Without the CPU's kernel, fp16 is rounded at each step. Sums of another order may be rounded
    # to the other side, and so may 8 bits.
    within = {torch.bfloat16: 2**-7, torch.float16: 2**-8, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(queries, rotated_heads[:count], rtol=within, atol=within)
    if gates is not None:
        torch.testing.assert_close(gates, gates_before, rtol=within, atol=within)
    within = max(within, 0.04) if bits == 8 else within
    keys, stored_values = stored(tensors, past)
    torch.testing.assert_close(keys, rotated_heads[count:].float(), rtol=within, atol=within)
    torch.testing.assert_close(stored_values, values[0].float(), rtol=within, atol=within)
    # Nothing else was stored.
    assert (tensors.numbers != 0).any(-1).sum() == 4


def test_norms_with_weights_in_fp32_are_rounded_once():
    """Rounded before they were multiplied, a tenth of the numbers differed."""
    rotation = RotaryEmbedding(RopeParameters(1e4), 64, 64, torch.bfloat16, CPU)
    norms = [RMSNorm(torch.randn(64), 1e-5) for _ in range(2)]
    partials = torch.randn(1, 8 * 64)
    qkv = partials.bfloat16().view(1, 8, 64)
    norms[0](qkv[:, :4], in_place=True)
    queries, tensors = torch.empty(4, 64).bfloat16(), kv_tensors(2, 32, 64, torch.bfloat16, 16)
    weights = [norm.weight for norm in norms]
    heads(partials, queries, tensors, length_of(0), rotation.tables, weights, 1e-5, None)
    assert (queries != rotation(qkv[:, :4], slice(1))[0]).float().mean() < 0.01


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (17, 5), (40, 39), (3, 79)])
def test_keys_and_values_are_stored_in_a_ring(bits, tokens, past):
    tensors = kv_tensors(2, 40, 80, torch.bfloat16, bits)
    rows = torch.randn(tokens, 6, 80).bfloat16()
    keys, values = rows[:, 1:3], rows[:, 3:5]
    rows[0, 1] = 0
    store(tensors, keys, values, length_of(past))
    for token in range(tokens):
        for new, old in zip((keys, values), stored(tensors, past + token), strict=True):
            expected = new[token].float()
            if bits == 8:
                scale = expected.abs().amax(-1, keepdim=True) / 127
                expected = (expected / scale.clamp(min=1e-30)).round() * scale
            assert torch.equal(old, expected)
    assert (tensors.numbers != 0).any(-1).sum() == 4 * tokens - 1
