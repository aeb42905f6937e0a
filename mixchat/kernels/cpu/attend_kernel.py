"""The function `attend`: new tokens' scores of keys, and their weighted values, in parts.

It computes an online softmax (Milakov & Gimelshein, arXiv:1805.02867) in fp32. A row is a pair of
new token and head.

T = new tokens, P = tokens before them, H = heads, G = groups (of R = H / G heads), h = head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from mixchat.kernels.cpu.arithmetic import exponential, reduced
from mixchat.kernels.cpu.attention_products import Products, products_of
from mixchat.kernels.cpu.emit import Function, Pointer, Value, f32, i32, i64, vector
from mixchat.kernels.cpu.pages import KEY_BLOCK, PAGE, CacheShape, group_part
from mixchat.kernels.cpu.program import Signature

KEYS = 64  # that are scored before their values are added
SPLIT = PAGE  # keys of one item of work
_ROWS = 32  # of one item of work, unless one token has more
_PARTS = 2  # of a latent, with a scale each
# Vectors of keys, or of a value's numbers, that are computed at once. A factor that was broadcast
# then serves two products.
_VECTORS = 2
# Scores. If all keys so far are masked, the largest score is _LOWEST, and e^(masked - lowest) is 0.
# With infinities the difference would be NaN.
_MASKED = -3e38
_LOWEST = -1e38
SIGNATURE = Signature(
    "pages", "queries", "parts", "out", "past", "tokens", "splits", "per_item", "window", "sinks"
)


class AttendKernel:
    """The function `attend`, for some rows of a group and one split of up to `SPLIT` keys.

    It stores the largest score, the sum of weights and the weighted values.
    """

    def __init__(self, module: Any, shape: CacheShape, lanes: int, bf16: bool) -> None:
        self.shape = shape
        self.lanes = lanes
        self.bf16 = bf16
        self.floats = vector(f32, lanes)
        self.function = function = Function(module, "attend")
        self.args = SIGNATURE.read_by(function)
        self._counts = (8, 4, 1) if lanes == 16 else (4, 1)  # rows at once, as registers allow
        self.products: Products = products_of(function, shape, lanes)
        rows = self.rows_of(shape)
        size = self.products.size
        self.queries = function.scratch(rows * shape.width * size)
        self.query_scales = function.scratch(rows * 4 * _PARTS)
        self.scores = function.scratch(rows * KEYS * 4)
        self._weights = function.scratch(rows * KEYS * size)
        self._weight_scales = function.scratch(rows * 4)
        self._sums = function.scratch(rows * shape.value_width * 4)
        self._state = function.scratch(rows * 8)  # largest score, sum of weights

    @staticmethod
    def rows_of(shape: CacheShape) -> int:
        """Return the most rows of one item of work."""
        return max(1, _ROWS // shape.shared) * shape.shared

    def write(self) -> None:
        function = self.function
        args = self.args
        shape = self.shape
        tokens = args.number("tokens")
        splits = args.number("splits")
        per_item = args.number("per_item")
        past = args.number("past")
        all_rows = tokens * shape.shared  # of a group
        blocks = (all_rows + per_item - 1) // per_item
        with function.each_item(function.pointer, blocks * splits * shape.groups) as item:
            split = item % splits
            block_and_group = item // splits
            group = block_and_group % shape.groups
            first = block_and_group // shape.groups * per_item
            rows = function.minimum(per_item, all_rows - first)
            self._begin(first, group, rows)
            # From the window of the first token to the last token itself.
            lowest = past + first // shape.shared + 1 - args.number("window")
            start = split * SPLIT
            start_at = function.maximum(lowest // KEYS * KEYS, start)
            end = (first + rows - 1) // shape.shared + 1
            limit = function.minimum(start + SPLIT, past + end)
            with function.loop(start_at, limit, KEYS) as (key, _):
                page = group_part(args, shape, key, group)
                following = key + KEYS
                following = following.compare("<", limit).choose(following, key)
                next_page = group_part(args, shape, following, group)
                self.score(page, key % PAGE, rows)
                self._weigh(page, key, first, rows)
                self._add_values(page, key % PAGE, rows, next_page, following % PAGE)
            self._end(first, group, rows, split, splits)
        function.finish()

    def _row(self, row: Value, first: Value, group: Value) -> Value:
        shared = self.shape.shared
        number = first + row
        return number // shared * self.shape.heads + group * shared + number % shared

    def _begin(self, first: Value, group: Value, rows: Value) -> None:
        """Prepare the queries and an empty state."""
        function = self.function
        shape = self.shape
        lanes = self.lanes
        zeros = function.constant(self.floats, 0.0)
        size = self.products.size
        with function.loop(0, rows, 1) as (row, _):
            queries = self.queries.plus(row * (shape.width * size))
            # The padding to whole vectors stays 0, in queries as in pages, and adds nothing.
            for start in range(0, shape.value_width, lanes):
                self._sums.store(zeros, (row * shape.value_width + start) * 4)
            for start in range(0, shape.width * size, lanes * 4):
                queries.store(zeros, start)
            self.prepare_query(row, self._row(row, first, group) * shape.head_dim, queries)
            self._state.store(function.constant(f32, _LOWEST), row * 8)
            self._state.store(function.constant(f32, 0.0), row * 8 + 4)

    def prepare_query(self, row: Value, first: Value, target: Pointer) -> None:
        """Store a row's query, from number `first` on, as factors, and its scale.

        The scale includes the scale of scores.
        """
        source = self.args.pointer("queries")
        scale = self.products.store_query(source, first, self.bf16, target)
        self.query_scales.store(scale * self.shape.score_scale, row * 4)

    def tiles(
        self, rows: Value, counts: Sequence[int]
    ) -> Iterator[tuple[int, AbstractContextManager[tuple[Value, list[Value]]]]]:
        """Yield how many rows are computed at once, and a loop over them, with these counts."""
        done = self.function.constant(i64, 0)
        for count in counts:
            end = done + (rows - done) // count * count
            yield count, self.function.loop(done, end, count)
            done = end

    def score(self, page: Pointer, line: Value, rows: Value) -> None:
        function = self.function
        shape = self.shape
        lanes = self.lanes
        words = shape.width // shape.per_word
        per_word = shape.per_word
        products = self.products
        block_bytes = words * KEY_BLOCK * 4
        # The values of these keys have as many bytes, so each step of the loop prefetches one line.
        values = page.plus(line // per_word * (shape.width * 4) + shape.values_at)
        for count, tiles in self.tiles(rows, self._counts):
            with tiles as (row, _), function.loop(0, KEYS, _VECTORS * lanes) as (start, _):
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
                    self._add_products(sums, loaded, self.queries, row * words + word, words)
                for number, key in enumerate(keys):
                    key_scale = None
                    if shape.bits == 8:
                        key_scale = page.load(self.floats, key * 4 + shape.scales_at)
                    for tiled in range(count):
                        scale = self.query_scales.load(f32, (row + tiled) * 4).broadcast(lanes)
                        if key_scale is not None:
                            scale = scale * key_scale
                        score = products.as_float(sums[tiled * _VECTORS + number]) * scale
                        target = (row + tiled) * KEYS + start + number * lanes
                        self.scores.store(score, target * 4)

    def _add_products(
        self, sums: list[Value], words: list[Value], factors: Pointer, first: Value, row_words: int
    ) -> None:
        """Add the products of vectors of words with some rows' factors, word `first` of the first.

        `row_words` are the words of a row. The sums are those of the first row, then of the next.
        """
        products = self.products
        numbers = [products.unpacked(word) for word in words]
        for tiled in range(len(sums) // _VECTORS):
            for column, factor in enumerate(products.factors(factors, first + tiled * row_words)):
                for number in range(_VECTORS):
                    index = tiled * _VECTORS + number
                    sums[index] = products.add(sums[index], numbers[number][column], factor)

    def _weigh(self, page: Pointer, key: Value, first: Value, rows: Value) -> None:
        """Turn scores into weights e^(score - largest), and scale the sums down."""
        function = self.function
        shape = self.shape
        lanes = self.lanes
        past = self.args.number("past")
        window = self.args.number("window").narrowed(i32).broadcast(lanes)
        steps = function.constant(vector(i32, lanes), range(lanes))
        with function.loop(0, rows, 1) as (row, _):
            token = past + (first + row) // shape.shared
            scores = []
            for number in range(KEYS // lanes):
                distance = (token - key - number * lanes).narrowed(i32).broadcast(lanes) - steps
                is_seen = distance.compare(">=", 0) & distance.compare("<", window)
                score = self.scores.load(self.floats, (row * KEYS + number * lanes) * 4)
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
            factors = self._weights.plus(row * (KEYS * self.products.size))
            total, scale = self.products.store_weights(weights, scales, factors)
            self._weight_scales.store(scale, row * 4)
            factor = exponential(function, previous - largest)
            weight = self._state.load(f32, row * 8 + 4) * factor + reduced(function, total, "fadd")
            self._state.store(largest, row * 8)
            self._state.store(weight, row * 8 + 4)
            # After some keys the largest score hardly changes, and the factor is 1.
            with function.when(factor.compare("<", 1.0)):
                for start in range(0, shape.value_width, lanes):
                    target = (row * shape.value_width + start) * 4
                    sums = self._sums.load(self.floats, target)
                    self._sums.store(sums * factor.broadcast(lanes), target)

    def _add_values(
        self, page: Pointer, line: Value, rows: Value, next_page: Pointer, next_line: Value
    ) -> None:
        function = self.function
        shape = self.shape
        lanes = self.lanes
        products = self.products
        words = KEYS // shape.per_word
        values = page.plus(line // shape.per_word * (shape.width * 4) + shape.values_at)
        together = _VECTORS * lanes
        # The next keys have as many bytes as these values. Whoever scores them finds them cached.
        next_keys = next_page.plus(next_line * (shape.width * shape.bits // 8))
        for count, tiles in self.tiles(rows, self._counts):
            with tiles as (row, _), function.loop(0, shape.value_width, together) as (start, _):
                targets = [
                    ((row + tiled) * shape.value_width + start + number * lanes) * 4
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
        function = self.function
        shape = self.shape
        lanes = self.lanes
        parts = self.args.pointer("parts")
        size = shape.value_width + 2
        with function.loop(0, rows, 1) as (row, _):
            target = (self._row(row, first, group) * splits + split) * (size * 4)
            parts.store(self._state.load(vector(f32, 2), row * 8), target)
            for start in range(0, shape.value_width, lanes):
                total = self._sums.load(self.floats, (row * shape.value_width + start) * 4)
                parts.store(total, target + (2 + start) * 4)
