"""Attention of new tokens over a cache in pages, at the speed at which memory can be read.

`attend` computes an online softmax over 512 keys in each item of work. `merge` combines these
parts. A row is a pair of new token and head.

T = new tokens, P = tokens before them, H = heads, G = groups (of R = H / G heads), h = head_dim,
v = the numbers of a value, which are h unless the cache holds latents.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from mixchat.kernels.cpu.arithmetic import exponential, store_fp32
from mixchat.kernels.cpu.attend_kernel import SIGNATURE, SPLIT, AttendKernel
from mixchat.kernels.cpu.compile import compiled_here
from mixchat.kernels.cpu.emit import Function, f32, vector
from mixchat.kernels.cpu.latent_kernel import LatentKernel
from mixchat.kernels.cpu.pages import CacheShape
from mixchat.kernels.cpu.program import Step

_NO_WINDOW = 2**30  # tokens
_ROWS_TOGETHER = 4  # whose products are computed at once
_MERGED = 16  # vectors of a value that are merged at once, as registers allow


def attend(
    shape: CacheShape,
    pages: torch.Tensor,
    past: int,
    queries: torch.Tensor,
    window: int | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention [T, H, v] of `queries` [T, H, h], fp32 or bf16, over the cache.

    The cache holds the keys and values of these tokens already. A token attends to itself and all
    before it, or to the last `window` of these. `pages` as for `store`. `sinks` are logits [H],
    fp32, of which each joins the sum of a head's softmax.
    """
    queries = queries.contiguous()
    out = queries.new_empty(*queries.shape[:2], shape.value_dim)
    keys = past + queries.shape[0]
    for step in attend_steps(shape, queries, out, keys):
        set_window(shape, step, window, sinks)
        step.set(pages=pages.data_ptr(), past=past, splits=count_splits(keys))
        step.run()
    return out


def attend_steps(
    shape: CacheShape, queries: torch.Tensor, out: torch.Tensor, most_keys: int
) -> tuple[Step, Step]:
    """Return the steps of `attend`, for at most `most_keys` keys. The second needs the first.

    Before they run, set the address `pages`, `past`, `splits` (see `count_splits`) and the window.
    """
    rows = queries.shape[0] * shape.heads
    parts = torch.empty(rows * count_splits(most_keys), shape.value_width + 2)
    compiled = _compiled(shape, queries.dtype == torch.bfloat16)
    attend = SIGNATURE.step(
        compiled.function("attend"),
        queries=queries,
        parts=parts,
        out=out,
        tokens=queries.shape[0],
        per_item=_kernel(shape).rows_of(shape),
    )
    return attend, attend.copy(compiled.function("merge"))


def set_window(
    shape: CacheShape, step: Step, window: int | None, sinks: torch.Tensor | None
) -> None:
    """Let a step of `attend_steps` use this window and these sinks. The caller keeps the sinks."""
    logits = _no_sinks(shape.heads) if sinks is None else sinks
    step.set(window=window or _NO_WINDOW, sinks=logits.data_ptr())


@functools.cache
def _no_sinks(heads: int) -> torch.Tensor:
    """Return logits of which nothing joins a sum. A step keeps only their address."""
    return torch.full((heads,), -torch.inf)


def count_splits(keys: int) -> int:
    """Return the number of parts into which `keys` keys are split."""
    return -(-keys // SPLIT)


def rows_per_item(shape: CacheShape, splits: int) -> int:
    """Return the rows of one item of work, so that a token's rows are items for all threads."""
    items = -(-torch.get_num_threads() // (splits * shape.groups))
    rows = -(-shape.shared // items)
    return min(_kernel(shape).rows_of(shape), -(-rows // _ROWS_TOGETHER) * _ROWS_TOGETHER)


def _kernel(shape: CacheShape) -> type[AttendKernel]:
    return LatentKernel if shape.latent_dim else AttendKernel


@compiled_here
def _compiled(module: Any, lanes: int, shape: CacheShape, bf16: bool) -> None:
    _kernel(shape)(module, shape, lanes, bf16).write()
    _write_merge(module, shape, lanes, bf16)


def _write_merge(module: Any, shape: CacheShape, lanes: int, bf16: bool) -> None:
    """Write `merge`. An item of work is a row. A head's sink counts like a part without values."""
    function = Function(module, "merge")
    args = SIGNATURE.read_by(function)
    parts = args.pointer("parts")
    out = args.pointer("out")
    splits = args.number("splits")
    floats = vector(f32, lanes)
    size = (shape.value_width + 2) * 4
    vectors = shape.value_width // lanes
    line = function.scratch(shape.value_width * 4)
    with function.each_item(function.pointer, args.number("tokens") * shape.heads) as row:
        sink = args.pointer("sinks").load(f32, row % shape.heads * 4)
        with function.loop(0, splits, 1, [sink]) as (split, largest):
            score = parts.load(f32, (row * splits + split) * size)
            largest[0] = function.maximum(score, largest[0])
        sink_weight = exponential(function, sink - largest[0])
        for first in range(0, vectors, _MERGED):
            numbers = range(first, min(first + _MERGED, vectors))
            zeros = [function.constant(floats, 0.0)] * len(numbers)
            with function.loop(0, splits, 1, [sink_weight, *zeros]) as (split, sums):
                split_part = parts.plus((row * splits + split) * size)
                factor = exponential(function, split_part.load(f32) - largest[0])
                sums[0] = function.multiply_add(split_part.load(f32, 4), factor, sums[0])
                for index, number in enumerate(numbers, 1):
                    values = split_part.load(floats, 8 + number * lanes * 4)
                    sums[index] = function.multiply_add(
                        values, factor.broadcast(lanes), sums[index]
                    )
            for index, number in enumerate(numbers, 1):
                line.store(sums[index] / sums[0].broadcast(lanes), number * lanes * 4)
        with function.loop(0, shape.value_dim, 1) as (column, _):
            value = line.load(f32, column * 4)
            store_fp32(out, value, row * shape.value_dim + column, bf16)
    function.finish()
