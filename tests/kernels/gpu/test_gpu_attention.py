"""`attend` beside softmax in fp64, with a mask and repeated keys."""

import itertools

import pytest
import torch
from gpu_tools import kv_tensors, length_of

from mixchat.base import gpu
from mixchat.engine.caches.tensor_cache import attention_mask, in_8_bits
from mixchat.kernels.cpu.rows import Gating, HeadGating
from mixchat.kernels.gpu import attention
from mixchat.kernels.gpu.attention import Parts, attend
from mixchat.kernels.gpu.kv_store import KVTensors, store
from mixchat.kernels.gpu.splits import token_scratch


def filled(tensors: KVTensors, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Store so many random tokens. Return keys and values [2, G, tokens, h] as they are stored."""
    _, groups, _, width = tensors.numbers.shape
    rows = torch.randn(2, tokens, groups, width).to(dtype)
    for start in range(0, tokens, 32):
        chunk = rows[:, start : start + 32]
        store(tensors, chunk[0], chunk[1], length_of(start))
    if tensors.scales is None:
        return rows.transpose(1, 2)
    scales = rows.float().abs().amax(-1, keepdim=True) / 127
    return ((rows / scales).round() * scales).transpose(1, 2)


def expected(queries, rows, window, sinks):
    """Return the attention [T, H, h] of queries [T, H, h] over rows [2, G, P + T, h]."""
    tokens, heads, width = queries.shape
    keys, values = rows.double().repeat_interleave(heads // rows.shape[1], 1)
    scores = queries.double().transpose(0, 1) @ keys.mT / width**0.5  # [H, T, P + T]
    mask = attention_mask(keys.shape[1] - tokens, tokens, window)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.double().view(-1, 1, 1).expand(heads, tokens, 1)
        scores = torch.cat([scores, sink], -1)
    return (scores.softmax(-1)[..., : keys.shape[1]] @ values).transpose(0, 1)


def check(
    heads,
    groups,
    width,
    room,
    past,
    tokens,
    *,
    window=None,
    sinks=None,
    gating=None,
    bits=16,
    dtype,
):
    tensors = kv_tensors(groups, room, width, dtype, bits)
    rows = filled(tensors, past + tokens, dtype)
    queries = (2 * torch.randn(tokens, heads, width)).to(dtype)
    out = torch.full_like(queries, torch.nan)
    parts = Parts.for_tokens(tokens, heads, tensors, window)
    gates = None
    if gating is not None:
        gates = torch.randn_like(queries if gating == Gating() else queries[..., 0])
    attend(queries, tensors, length_of(past), out, parts, window, sinks, gates)
    within = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 1e-5}[dtype]
    right = expected(queries, rows, window, sinks).to(dtype)
    if gates is not None:
        right = gating(right.flatten(1), gates.flatten(1)).view(right.shape)
    torch.testing.assert_close(out, right, rtol=within, atol=within)
    return parts.splits


@pytest.mark.parametrize("gating", [Gating(), HeadGating(64)])
@pytest.mark.parametrize(("past", "splits"), [(1, 1), (69, 2)])
def test_gates_multiply_the_output(past, splits, gating):
    shape = 4, 2, 64, past + 1, past, 1
    assert check(*shape, gating=gating, dtype=torch.bfloat16) == splits


@pytest.mark.parametrize("width", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_every_width_of_a_head(width, bits, tokens):
    assert check(4, 2, width, 200, 69, tokens, bits=bits, dtype=torch.bfloat16) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [8, 16])
def test_every_type(dtype, bits):
    check(6, 2, 64, 300, 99, 3, bits=bits, dtype=dtype)


@pytest.mark.parametrize("past", [0, 1, 63, 64, 127, 200])
@pytest.mark.parametrize("has_sinks", [True, False])
def test_a_token_after_any_count_of_others(past, has_sinks):
    sinks = 3 * torch.randn(6) if has_sinks else None
    check(6, 2, 64, 256, past, 1, sinks=sinks, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("past", "tokens", "window"),
    [(0, 1, 9), (8, 1, 9), (9, 1, 9), (150, 1, 64), (300, 1, 65), (70, 30, 9), (111, 20, 128)],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_window_in_a_ring(past, tokens, window, bits):
    """The ring has just the room of a window and the new tokens."""
    sinks = torch.randn(4)
    shape = 4, 1, 64, window + tokens - 1, past, tokens
    check(*shape, window=window, sinks=sinks, bits=bits, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("heads", "groups", "past", "tokens", "programs"),
    [(4, 4, 0, 130, 1), (8, 1, 40, 33, 1), (10, 2, 3, 40, 1), (12, 1, 9, 11, 1), (5, 1, 80, 9, 9)],
)
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("has_sinks", [True, False])
def test_a_prompt(heads, groups, past, tokens, programs, window, has_sinks, monkeypatch):
    sinks = torch.randn(heads) if has_sinks else None
    shape = heads, groups, 64, past + tokens, past, tokens
    monkeypatch.setattr(attention, "PROGRAMS", programs)
    splits = check(*shape, window=window, sinks=sinks, dtype=torch.bfloat16)
    assert splits == (1 if programs == 1 or window else 2)


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("is_amd", [True, False])
def test_a_token_s_splits_fit_into_the_scratch_that_plans_count(has_bf16, is_amd, monkeypatch):
    monkeypatch.setattr(gpu, "has_bf16", lambda device: has_bf16)
    monkeypatch.setattr(gpu, "is_amd", lambda: is_amd)
    shapes = itertools.product(
        (1, 5, 20, 32, 128), (1, 2, 4, 8), (64, 128, 256, 512), (64, 131_072)
    )
    for heads, groups, width, room in shapes:
        numbers = torch.empty(2, groups, room, width, dtype=torch.bfloat16, device="meta")
        for bits, window in itertools.product((8, 16), (None, 128)):
            stored = numbers.to(torch.int8) if bits == 8 else numbers
            tensors = KVTensors(stored, None, None)
            parts = Parts.for_tokens(1, groups * heads, tensors, window)
            taken = parts.sums.numel() + parts.weights.numel()
            assert taken <= token_scratch(groups * heads, groups, width)


def test_a_long_prompt_is_not_split():
    tensors = kv_tensors(8, 4096, 128, torch.bfloat16, 16)
    assert Parts.for_tokens(1, 64, tensors, None).splits == 32
    assert Parts.for_tokens(2048, 64, tensors, None).splits == 1
    assert Parts.for_tokens(1, 64, tensors, 128).splits == 3


@pytest.mark.parametrize(("past", "tokens"), [(0, 1), (70, 1), (3, 20)])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("heads", "latent", "turning"), [(20, 512, 64), (3, 64, 16), (5, 48, 24)])
def test_latents_are_keys_and_values(past, tokens, bits, heads, latent, turning):
    room, dtype = past + tokens, torch.bfloat16
    stored = torch.int8 if bits == 8 else dtype
    rows = torch.randn(1, room, latent + turning).to(dtype)
    parts, scales = torch.split(rows, [latent, turning], dim=-1), None
    if bits == 8:
        pairs = [in_8_bits(part) for part in parts]
        scales = torch.stack([scale[..., 0] for _, scale in reversed(pairs)])
        parts = tuple(numbers for numbers, _ in pairs)
        rows = torch.cat([numbers * scale for numbers, scale in pairs], -1)
    numbers, rotating = (part.to(stored).contiguous() for part in parts)
    tensors = KVTensors(numbers[None], scales, rotating)
    queries = torch.randn(tokens, heads, latent + turning).to(dtype)
    out = torch.full((tokens, heads, latent), torch.nan).to(dtype)
    attend(
        *(queries, tensors, length_of(past), out, Parts.for_tokens(tokens, heads, tensors, None)),
        scale=0.1,
    )
    # `expected` divides by the root of the width.
    scaled = queries.double() * 0.1 * (latent + turning) ** 0.5
    right = expected(scaled, torch.stack([rows, rows]).double(), None, None)[..., :latent]
    torch.testing.assert_close(out, right.to(dtype), rtol=2**-6, atol=2**-6)
