"""Doubles of a token's kernels on GPUs on paper, by torch instead of the interpreter.

The interpreter takes a tenth of a second for a program. tests/kernels/gpu/ compares the kernels
themselves with the CPU's, and some tests of engines use them.

R = rows, C = columns, n = rows of x, K = chosen experts, S = splits.
"""

import ctypes
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.nn import functional

from mixchat.engine.caches.tensor_cache import in_8_bits
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.convolution import Convolution
from mixchat.kernels.cpu.delta_net import DeltaNetShape, DeltaRule
from mixchat.kernels.cpu.gated_norm import GatedNorm
from mixchat.kernels.cpu.router import Router, Scoring
from mixchat.kernels.gpu.codes import TILES
from mixchat.weights.matrix.linear import TYPES, LinearSpec

Tensor = torch.Tensor


def at(address: int, spec_bytes: int) -> Tensor:
    """Return bytes of memory as a tensor. Kernels take its address for a multiple of 16."""
    assert address % 16 == 0, "misaligned address"
    memory = (ctypes.c_uint8 * spec_bytes).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8)


def dense(
    kind: str, codes: int, absmax: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return the matrix fp32 [rows, C] at these addresses, with rows of zeros."""
    name = "none" if kind == "none32" else kind
    spec = LinearSpec("m", rows, columns, name, dtype)  # type: ignore[arg-type]
    places = [codes] if name == "none" else [absmax, codes]
    tensors = [
        at(place, tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        for place, tensor in zip(places, spec.tensors, strict=True)
    ]
    if name == "none":
        return tensors[0].float()
    return TYPES[spec.quant_type].dequantize(tensors, (rows, columns), torch.float32)  # type: ignore


def product(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    out: Tensor,
    n: int,
    **shape: Any,
) -> None:
    height, columns, kind = shape["ROWS"], shape["C"], shape["TYPE"]
    weight = dense(kind, codes.data_ptr(), absmax.data_ptr(), shape["R"], columns, codes.dtype)
    _splits(x.view(n, columns).float(), weight[:height], bias, out.view(-1, n, height), shape)


def _splits(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, shape: Any) -> None:
    """Write the products with parts of the columns to out [S, n, R]."""
    part = shape["PER"] * TILES[shape["TYPE"]].block
    for number, sums in enumerate(out):
        columns = slice(number * part, (number + 1) * part)
        sums.copy_(functional.linear(x[:, columns], weight[:, columns]))
    if bias is not None:
        out[0] += bias


def dequantize(
    codes: Tensor, absmax: Tensor, levels: Tensor, out: Tensor, first: int, rows: int, **shape: Any
) -> None:
    places = codes.data_ptr(), absmax.data_ptr()
    weight = dense(shape["TYPE"], *places, first + rows, shape["C"], torch.float32)
    out[:rows] = weight[first : first + rows].to(out.dtype)


def experts_up(
    x: Tensor, selected: Tensor, addresses: Tensor, levels: Tensor, out: Tensor, **shape: Any
) -> None:
    inner, limit, alpha = shape["INNER"], shape["LIMIT"], shape["ALPHA"]
    for expert, gated in zip(selected.tolist(), out, strict=True):
        address = int(addresses[expert])
        if not address:
            gated.zero_()
            continue
        places = address + shape["CODES_AT"], address + shape["ABSMAX_AT"]
        weight = dense(shape["TYPE"], *places, shape["R"], shape["C"], x.dtype)[: 2 * inner]
        both = functional.linear(x.float(), weight)
        if shape["BIAS_AT"] is not None:
            both += at(address + shape["BIAS_AT"], 8 * inner).view(torch.float32)
        gate, up = both.split(inner)
        if shape["GELU"]:
            gated.copy_(functional.gelu(gate, approximate="tanh") * up)
        elif limit is None:
            gated.copy_(functional.silu(gate) * up)
        else:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            gated.copy_((up + 1) * (gate * (gate * alpha).sigmoid()))


def experts_down(
    gated: Tensor,
    selected: Tensor,
    weights: Tensor,
    addresses: Tensor,
    levels: Tensor,
    out: Tensor,
    **shape: Any,
) -> None:
    rows = shape["ROWS"]
    by_expert = out.view(len(selected), -1, 1, rows)
    for number, expert in enumerate(selected.tolist()):
        address, sums = int(addresses[expert]), by_expert[number]
        if not address:
            sums.zero_()
            continue
        places = address + shape["CODES_AT"], address + shape["ABSMAX_AT"]
        weight = dense(shape["TYPE"], *places, shape["R"], shape["C"], gated.dtype)[:rows]
        at_bias = shape["BIAS_AT"]
        bias = None if at_bias is None else at(address + at_bias, 4 * rows).view(torch.float32)
        _splits(gated[number].float()[None], weight, bias, sums, shape)
        sums *= weights[number]


def add_norm(
    x: Tensor,
    partials: Tensor,
    weight: Tensor,
    normed: Tensor,
    finished: Tensor,
    eps: float,
    **shape: Any,
) -> None:
    if shape["P"]:
        added = partials.sum(0).to(x.dtype)
        x.copy_(x + added if shape["ADDS"] else added)
        if shape["FACTOR"] is not None:
            x *= shape["FACTOR"]
    normed.copy_(rows.rms_norm(x[None], weight, eps)[0])


def route(
    x: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    scales: Tensor | None,
    logits: Tensor,
    selected: Tensor,
    weights: Tensor,
    finished: Tensor,
    **shape: Any,
) -> None:
    scoring: Scoring = "sigmoid" if shape["SIGMOID"] else "softmax"
    more = bias, scoring, correction, shape["SCALING"]
    router = Router(gate, shape["K"], shape["NORMALIZED"], *more, scales=scales, cap=shape["CAP"])
    chosen = router._by_torch(x[None])
    selected.copy_(chosen[0][0])
    weights.copy_(chosen[1][0])


def dense_product(x: Tensor, weight: Tensor, out: Tensor, **shape: Any) -> None:
    out.copy_(weight.float() @ x.float())


def heads(
    qkv: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    queries: Tensor,
    gates: Tensor | None,
    numbers: Tensor,
    scales: Tensor | None,
    past: Tensor,
    eps: float,
    clip: float | None,
    room: int,
    **shape: Any,
) -> None:
    count, groups, width = shape["H"], shape["G"], shape["WIDTH"]
    whole = qkv.view(shape["S"], -1).sum(0).to(queries.dtype).view(1, -1, width)
    keys = whole[:, count : count + groups]
    values = keys if shape["VALUES_ARE_KEYS"] else whole[:, count + groups :][:, :groups]
    if shape["V_NORM"]:
        values = rows.rms_norm(values, torch.ones(width), eps)
    for norm, part in ((query_norm, whole[:, :count]), (key_norm, keys)):
        if norm is not None:
            apart = part.reshape(1, -1, len(norm))
            part.copy_(rows.rms_norm(apart, norm, eps).view(part.shape))
    if clip is not None:
        whole.clamp_(-clip, clip)
    place = past.long()
    rotated = rows.rotate(whole[:, : count + groups], cos[place], sin[place])[0]
    queries.copy_(rotated[:count])
    if gates is not None:
        gates.copy_(whole[0, -count:])
    for number, new in enumerate((rotated[count:], values[0])):
        at_place = numbers[number, :, int(place) % room]
        if scales is None:
            at_place.copy_(new)
        else:
            scale = new.float().abs().amax(-1) / 127
            scales[number, :, int(place) % room] = scale
            at_place.copy_((new.float() / scale.clamp(min=1e-30)[:, None]).round())


def delta_net(
    x: Tensor,
    projected: Tensor,
    ba_proj: Tensor,
    convolution: Tensor,
    rates: Tensor,
    biases: Tensor,
    norm: Tensor,
    addresses: Tensor,
    read: Tensor,
    out: Tensor,
    finished: Tensor,
    eps: float,
    **shape: Any,
) -> None:
    heads, blocks, block, key_dim = (shape[name] for name in ("V", "BLOCKS", "BLOCK", "KEY"))
    channels, taps = convolution.shape[1], shape["L"]
    sizes = [(taps - 1, channels)] * 2 + [(heads, blocks, key_dim, block)] * 2
    conv, after_conv, state, after = (
        at(address, 4 * prod(size)).view(torch.float32).view(size)
        for address, size in zip(addresses.tolist(), sizes, strict=True)
    )
    rule = DeltaRule(DeltaNetShape(shape["K"], heads, key_dim, blocks * block), rates, biases)
    rule.rates = rates
    row = projected.view(shape["S"], -1).sum(0).to(x.dtype)[None]
    qkv = Convolution(convolution.t())._by_torch(row[:, :channels], conv, after_conv)
    ba = functional.linear(x.float(), ba_proj.float()).to(x.dtype)[None]
    values = rule._by_torch(qkv, ba, state, after)
    out.copy_(GatedNorm(norm, eps)(values, row[:, channels:].contiguous()).view(out.shape))


def delta_rule(
    qkv: Tensor,
    gates: Tensor,
    before: Tensor,
    after: Tensor,
    out: Tensor,
    tokens: int,
    stride: int,
    **shape: Any,
) -> None:
    values = shape["BLOCKS"] * shape["BLOCK"]
    rule = DeltaRule(DeltaNetShape(shape["K"], shape["V"], shape["KEY"], values), *gates[0].T)
    rule.prepare = lambda qkv, ba: gates  # type: ignore[method-assign]
    out.copy_(rule._by_torch(qkv, out, before, after))


def gated_convolution(
    projected: Tensor, weight: Tensor, addresses: Tensor, out: Tensor, **shape: Any
) -> None:
    convolution = Convolution(weight.t(), gated=True)
    before, after = (
        at(address, 4 * prod(convolution.state_shape)).view(torch.float32).view(shape["L"] - 1, -1)
        for address in addresses.tolist()
    )
    row = projected.view(shape["S"], -1).sum(0).to(out.dtype)[None]
    out.copy_(convolution._by_torch(row, before, after)[0])


def head_products(x: Tensor, addresses: Tensor, levels: Tensor, out: Tensor, **shape: Any) -> None:
    places = shape["R"], shape["C"], x.dtype
    for row, codes, absmax, result in zip(x, *addresses.tolist(), out, strict=True):
        weight = dense(shape["TYPE"], codes, absmax, *places)[: shape["ROWS"]]
        result[: shape["ROWS"]] = functional.linear(row.float(), weight)


def latent_heads(
    queries: Tensor,
    latents: Tensor,
    norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    past: Tensor,
    numbers: Tensor,
    scales: Tensor | None,
    rotating: Tensor,
    kept: Tensor,
    whole: Tensor,
    eps: float,
    room: int,
    **shape: Any,
) -> None:
    heads, latent, turning = shape["H"], shape["LATENT"], shape["TURNING"]
    row, own = (part.view(-1, part.shape[-1]).sum(0).to(kept.dtype) for part in (queries, latents))
    kept.copy_(row[: kept.numel()].view(kept.shape))
    place = past.long()
    others = row[kept.numel() :][: heads * turning].view(1, heads, turning)
    whole[:, latent:] = rows.rotate(others, cos[place], sin[place])[0]
    key = rows.rotate(own[-turning:].view(1, 1, -1), cos[place], sin[place])[0]
    value = rows.rms_norm(own[-latent - turning : -turning].reshape(1, -1), norm, eps)
    for number, (new, stored) in enumerate(((key, rotating[0]), (value, numbers[0, 0]))):
        if scales is not None:
            new, scale = in_8_bits(new)
            scales[number, 0, place] = scale[0]
        stored[place] = new.to(stored.dtype)


DOUBLES: dict[str, Callable[..., None]] = {
    "_product": product,
    "_dequantize": dequantize,
    "_experts_up": experts_up,
    "_experts_down": experts_down,
    "_add_norm": add_norm,
    "_route": route,
    "_heads": heads,
    "_dense_product": dense_product,
    "_delta_net": delta_net,
    "_delta_rule": delta_rule,
    "_head_products": head_products,
    "_latent_heads": latent_heads,
    "_gated_convolution": gated_convolution,
}
