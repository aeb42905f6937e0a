"""Attention of new tokens over a cache in pages, at the speed at which memory can be read.

`attend` computes an online softmax (Milakov & Gimelshein, arXiv:1805.02867) in fp32, over 512 keys
in each item of work. `merge` combines these parts. A row is a pair of new token and head.

T = new tokens, P = tokens before them, H = heads, G = groups (of R = H / G heads), h = head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from mixchat.kernels.cpu.arithmetic import exponential, reduced, store_fp32
from mixchat.kernels.cpu.attention_products import Products, products_of
from mixchat.kernels.cpu.compile import compiled_here
from mixchat.kernels.cpu.emit import Function, Pointer, Value, f32, i32, i64, vector
from mixchat.kernels.cpu.pages import KEY_BLOCK, PAGE, CacheShape, group_part
from mixchat.kernels.cpu.program import Signature, Step, copy_of

_KEYS = 64  # that are scored before their values are added
_SPLIT = PAGE  # keys of one item of work
_ROWS = 32  # of one item of work, unless one token has more
# Vectors of keys, or of a value's numbers, that are computed at once. A factor that was broadcast
# then serves two products.
_VECTORS = 2
# Scores. If all keys so far are masked, the largest score is _LOWEST, and e^(masked - lowest) is 0.
# With infinities the difference would be NaN.
_MASKED, _LOWEST = -3e38, -1e38
_NO_WINDOW = 2**30  # tokens
_SIGNATURE = Signature(
    "pages", "queries", "parts", "out", "past", "tokens", "splits", "per_item", "window", "sinks"
)


def attend(
    shape: CacheShape,
    pages: torch.Tensor,
    past: int,
    queries: torch.Tensor,
    window: int | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention [T, H, h] of `queries` [T, H, h], fp32 or bf16, over the cache.

    The cache holds the keys and values of these tokens already. A token attends to itself and all
    before it, or to the last `window` of these. `pages` as for `store`. `sinks` are logits [H],
    fp32, of which each joins the sum of a head's softmax.
    """
    queries = queries.contiguous()
    out = torch.empty_like(queries)
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
    parts = torch.empty(rows * count_splits(most_keys), shape.width + 2)
    numbers = _SIGNATURE.numbers(
        queries=queries.data_ptr(),
        parts=parts.data_ptr(),
        out=out.data_ptr(),
        tokens=queries.shape[0],
        per_item=_rows(shape) // shape.shared,
    )
    compiled = _compiled(shape, queries.dtype == torch.bfloat16)
    attend, merge = (compiled.function(name) for name in ("attend", "merge"))
    keeps = queries, parts, out
    return (
        Step(attend, _SIGNATURE, numbers, keeps),
        Step(merge, _SIGNATURE, copy_of(numbers), keeps),
    )


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
    return -(-keys // _SPLIT)


def _rows(shape: CacheShape) -> int:
    return max(_ROWS, shape.shared)


@compiled_here
def _compiled(module: Any, lanes: int, shape: CacheShape, bf16: bool) -> None:
    _AttendKernel(module, shape, lanes, bf16).write()
    _write_merge(module, shape, lanes, bf16)


class _AttendKernel:
    """The function `attend`, for some rows of a group and one split of up to `_SPLIT` keys.

    It stores the largest score, the sum of weights and the weighted values.
    """

    def __init__(self, module: Any, shape: CacheShape, lanes: int, bf16: bool) -> None:
        self.shape, self.lanes, self._bf16 = shape, lanes, bf16
        self.floats = vector(f32, lanes)
        self.function = function = Function(module, "attend")
        self._args = _SIGNATURE.read_by(function)
        self._products: Products = products_of(function, shape, lanes)
        rows, size = _rows(shape), self._products.size
        self._queries = function.scratch(rows * shape.width * size)
        self._query_scales = function.scratch(rows * 4)
        self._scores = function.scratch(rows * _KEYS * 4)
        self._weights = function.scratch(rows * _KEYS * size)
        self._weight_scales = function.scratch(rows * 4)
        self._sums = function.scratch(rows * shape.width * 4)
        self._state = function.scratch(rows * 8)  # largest score, sum of weights

    def write(self) -> None:
        function, args, shape = self.function, self._args, self.shape
        tokens, splits = args.number("tokens"), args.number("splits")
        per_item, past = args.number("per_item"), args.number("past")
        blocks = (tokens + per_item - 1) // per_item
        with function.each_item(function.pointer, blocks * splits * shape.groups) as item:
            split, block_and_group = item % splits, item // splits
            group = block_and_group % shape.groups
            first = block_and_group // shape.groups * per_item
            end = function.minimum(first + per_item, tokens)
            rows = (end - first) * shape.shared
            self._begin(first, group, rows)
            # From the window of the first token to the last token itself.
            lowest = past + first + 1 - args.number("window")
            start = split * _SPLIT
            start_at = function.maximum(lowest // _KEYS * _KEYS, start)
            limit = function.minimum(start + _SPLIT, past + end)
            with function.loop(start_at, limit, _KEYS) as (key, _):
                page = group_part(args, shape, key, group)
                following = key + _KEYS
                following = following.compare("<", limit).choose(following, key)
                next_page = group_part(args, shape, following, group)
                self._score(page, key % PAGE, rows)
                self._weigh(page, key, first, rows)
                self._add_values(page, key % PAGE, rows, next_page, following % PAGE)
            self._end(first, group, rows, split, splits)
        function.finish()

    def _row(self, row: Value, first: Value, group: Value) -> Value:
        shared = self.shape.shared
        return (first + row // shared) * self.shape.heads + group * shared + row % shared

    def _begin(self, first: Value, group: Value, rows: Value) -> None:
        """Prepare the queries, their scales times 1 / sqrt(h), and an empty state."""
        function, shape, lanes = self.function, self.shape, self.lanes
        zeros, products = function.constant(self.floats, 0.0), self._products
        with function.loop(0, rows, 1) as (row, _):
            queries = self._queries.plus(row * (shape.width * products.size))
            # The padding to whole vectors stays 0, in queries as in pages, and adds nothing.
            for start in range(0, shape.width, lanes):
                self._sums.store(zeros, (row * shape.width + start) * 4)
            for start in range(0, shape.width * products.size, lanes * 4):
                queries.store(zeros, start)
            first_number = self._row(row, first, group) * shape.head_dim
            scale = products.store_query(
                self._args.pointer("queries"), first_number, self._bf16, queries
            )
            self._query_scales.store(scale * shape.head_dim**-0.5, row * 4)
            self._state.store(function.constant(f32, _LOWEST), row * 8)
            self._state.store(function.constant(f32, 0.0), row * 8 + 4)

    def _tiles(
        self, rows: Value
    ) -> Iterator[tuple[int, AbstractContextManager[tuple[Value, list[Value]]]]]:
        """Yield how many rows are computed at once, as registers allow, and a loop over them."""
        done = self.function.constant(i64, 0)
        for count in (8, 4, 1) if self.lanes == 16 else (4, 1):
            end = done + (rows - done) // count * count
            yield count, self.function.loop(done, end, count)
            done = end

    def _score(self, page: Pointer, line: Value, rows: Value) -> None:
        function, shape, lanes = self.function, self.shape, self.lanes
        words, per_word, products = shape.width // shape.per_word, shape.per_word, self._products
        block_bytes = words * KEY_BLOCK * 4
        # The values of these keys have as many bytes, so each step of the loop prefetches one line.
        values = page.plus(line // per_word * (shape.width * 4) + shape.values_at)
        for count, tiles in self._tiles(rows):
            with tiles as (row, _), function.loop(0, _KEYS, _VECTORS * lanes) as (start, _):
                keys = [line + start + number * lanes for number in range(_VECTORS)]
                blocks = [
                    page.plus(key // KEY_BLOCK * block_bytes + key % KEY_BLOCK * 4) for key in keys
                ]
                zeros = [products.zero] * (count * _VECTORS)
                with function.loop(0, words, 1, zeros) as (word, sums):
                    loaded = [
                        block.load(vector(i32, lanes), word * (KEY_BLOCK * 4)) for block in blocks
                    ]
                    for number in range(_VECTORS):
                        values_line = (start // lanes + number) * (words * lanes * 4)
                        values.prefetch(values_line + word * (lanes * 4))
                    self._add_products(sums, loaded, self._queries, row * words + word, words)
                for number, key in enumerate(keys):
                    key_scale = None
                    if shape.bits == 8:
                        key_scale = page.load(self.floats, key * 4 + shape.scales_at)
                    for tiled in range(count):
                        scale = self._query_scales.load(f32, (row + tiled) * 4).broadcast(lanes)
                        if key_scale is not None:
                            scale = scale * key_scale
                        score = products.as_float(sums[tiled * _VECTORS + number]) * scale
                        target = (row + tiled) * _KEYS + start + number * lanes
                        self._scores.store(score, target * 4)

    def _add_products(
        self, sums: list[Value], words: list[Value], factors: Pointer, first: Value, row_words: int
    ) -> None:
        """Add the products of vectors of words with some rows' factors, word `first` of the first.

        `row_words` are the words of a row. The sums are those of the first row, then of the next.
        """
        products = self._products
        numbers = [products.unpacked(word) for word in words]
        for tiled in range(len(sums) // _VECTORS):
            for column, factor in enumerate(products.factors(factors, first + tiled * row_words)):
                for number in range(_VECTORS):
                    index = tiled * _VECTORS + number
                    sums[index] = products.add(sums[index], numbers[number][column], factor)

    def _weigh(self, page: Pointer, key: Value, first: Value, rows: Value) -> None:
        """Turn scores into weights e^(score - largest), and scale the sums down."""
        function, shape, lanes = self.function, self.shape, self.lanes
        past = self._args.number("past")
        window = self._args.number("window").narrowed(i32).broadcast(lanes)
        steps = function.constant(vector(i32, lanes), range(lanes))
        with function.loop(0, rows, 1) as (row, _):
            token = past + first + row // shape.shared
            scores = []
            for number in range(_KEYS // lanes):
                distance = (token - key - number * lanes).narrowed(i32).broadcast(lanes) - steps
                is_seen = distance.compare(">=", 0) & distance.compare("<", window)
                score = self._scores.load(self.floats, (row * _KEYS + number * lanes) * 4)
                scores.append(is_seen.choose(score, _MASKED))
            top = functools.reduce(function.maximum, scores)
            largest = reduced(function, top, "fmax")
            previous = self._state.load(f32, row * 8)
            largest = function.maximum(largest, previous)
            weights = [exponential(function, score - largest.broadcast(lanes)) for score in scores]
            scales = None
            if shape.bits == 8:
                at = key % PAGE * 4 + (shape.scales_at + PAGE * 4)
                scales = [
                    page.load(self.floats, at + number * lanes * 4) for number in range(len(scores))
                ]
            factors = self._weights.plus(row * (_KEYS * self._products.size))
            total, scale = self._products.store_weights(weights, scales, factors)
            self._weight_scales.store(scale, row * 4)
            factor = exponential(function, previous - largest)
            weight = self._state.load(f32, row * 8 + 4) * factor + reduced(function, total, "fadd")
            self._state.store(largest, row * 8)
            self._state.store(weight, row * 8 + 4)
            # After some keys the largest score hardly changes, and the factor is 1.
            with function.when(factor.compare("<", 1.0)):
                for start in range(0, shape.width, lanes):
                    target = (row * shape.width + start) * 4
                    sums = self._sums.load(self.floats, target)
                    self._sums.store(sums * factor.broadcast(lanes), target)

    def _add_values(
        self, page: Pointer, line: Value, rows: Value, next_page: Pointer, next_line: Value
    ) -> None:
        function, shape, lanes = self.function, self.shape, self.lanes
        products, words = self._products, _KEYS // shape.per_word
        values = page.plus(line // shape.per_word * (shape.width * 4) + shape.values_at)
        together = _VECTORS * lanes
        # The next keys have as many bytes as these values. Whoever scores them finds them cached.
        next_keys = next_page.plus(next_line * (shape.width * shape.bits // 8))
        for count, tiles in self._tiles(rows):
            with tiles as (row, _), function.loop(0, shape.width, together) as (start, _):
                targets = [
                    ((row + tiled) * shape.width + start + number * lanes) * 4
                    for tiled in range(count)
                    for number in range(_VECTORS)
                ]
                zeros = [products.zero] * len(targets)
                with function.loop(0, words, 1, zeros) as (word, sums):
                    offset = (word * shape.width + start) * 4
                    loaded = [
                        values.load(vector(i32, lanes), offset + number * lanes * 4)
                        for number in range(_VECTORS)
                    ]
                    for number in range(_VECTORS):
                        next_keys.prefetch(offset + number * lanes * 4)
                    self._add_products(sums, loaded, self._weights, row * words + word, words)
                for index, (target, total) in enumerate(zip(targets, sums, strict=True)):
                    scale = self._weight_scales.load(f32, (row + index // _VECTORS) * 4)
                    added = function.multiply_add(
                        products.as_float(total),
                        scale.broadcast(lanes),
                        self._sums.load(self.floats, target),
                    )
                    self._sums.store(added, target)

    def _end(self, first: Value, group: Value, rows: Value, split: Value, splits: Value) -> None:
        function, shape, lanes = self.function, self.shape, self.lanes
        parts, size = self._args.pointer("parts"), shape.width + 2
        with function.loop(0, rows, 1) as (row, _):
            target = (self._row(row, first, group) * splits + split) * (size * 4)
            parts.store(self._state.load(vector(f32, 2), row * 8), target)
            for start in range(0, shape.width, lanes):
                total = self._sums.load(self.floats, (row * shape.width + start) * 4)
                parts.store(total, target + (2 + start) * 4)


def _write_merge(module: Any, shape: CacheShape, lanes: int, bf16: bool) -> None:
    """Write `merge`. An item of work is a row. A head's sink counts like a part without values."""
    function = Function(module, "merge")
    args = _SIGNATURE.read_by(function)
    parts, out, splits = args.pointer("parts"), args.pointer("out"), args.number("splits")
    floats, size = vector(f32, lanes), (shape.width + 2) * 4
    vectors = shape.width // lanes
    line = function.scratch(shape.width * 4)
    with function.each_item(function.pointer, args.number("tokens") * shape.heads) as row:
        zeros = [function.constant(floats, 0.0)] * vectors
        sink = args.pointer("sinks").load(f32, row % shape.heads * 4)
        with function.loop(0, splits, 1, [sink]) as (split, largest):
            score = parts.load(f32, (row * splits + split) * size)
            largest[0] = function.maximum(score, largest[0])
        sink_weight = exponential(function, sink - largest[0])
        with function.loop(0, splits, 1, [sink_weight, *zeros]) as (split, sums):
            split_part = parts.plus((row * splits + split) * size)
            factor = exponential(function, split_part.load(f32) - largest[0])
            sums[0] = function.multiply_add(split_part.load(f32, 4), factor, sums[0])
            for number in range(vectors):
                values = split_part.load(floats, 8 + number * lanes * 4)
                sums[1 + number] = function.multiply_add(
                    values, factor.broadcast(lanes), sums[1 + number]
                )
        for number in range(vectors):
            line.store(sums[1 + number] / sums[0].broadcast(lanes), number * lanes * 4)
        with function.loop(0, shape.head_dim, 1) as (column, _):
            value = line.load(f32, column * 4)
            store_fp32(out, value, row * shape.head_dim + column, bf16)
    function.finish()
