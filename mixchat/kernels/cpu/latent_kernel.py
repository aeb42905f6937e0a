"""The function `attend` for latents, which are keys whose first numbers are their values.

All heads share a latent. It is stored once, as a value, so that a score is a sum over the lanes of
vectors of columns. For some tokens the numbers are brought side by side, and then serve all rows.

A latent has two parts, the numbers of its value, and numbers of its key, which rotate.
"""

from __future__ import annotations

from typing import Any

from mixchat.kernels.cpu.arithmetic import as_fp32, totals
from mixchat.kernels.cpu.attend_kernel import KEYS, AttendKernel
from mixchat.kernels.cpu.emit import Pointer, Value, f32, i32, vector
from mixchat.kernels.cpu.pages import PAGE, CacheShape

_ROWS = 32  # of one item of work
_TOKENS = 4  # whose scores are computed at once


class LatentKernel(AttendKernel):
    """It has no blocks of keys, and splits the heads of a token if there are many."""

    def __init__(self, module: Any, shape: CacheShape, lanes: int, bf16: bool) -> None:
        super().__init__(module, shape, lanes, bf16)
        self._query = self.function.scratch(shape.width * 4)  # fp32
        self._tokens = self.function.scratch(shape.width * self.products.size * _TOKENS)
        self._parts = [(0, shape.value_width), (shape.value_width, shape.width)]

    @staticmethod
    def rows_of(shape: CacheShape) -> int:
        return _ROWS

    def prepare_query(self, row: Value, first: Value, target: Pointer) -> None:
        function = self.function
        shape = self.shape
        lanes = self.lanes
        products = self.products
        self._load_query(first)
        for part, (start, end) in enumerate(self._parts):
            factor, scale = products.scaled(self._query.plus(start * 4), end - start)
            with function.loop(start, end, lanes * products.joined) as (column, _):
                numbers = [
                    self._query.load(self.floats, (column + number * lanes) * 4)
                    for number in range(products.joined)
                ]
                if factor is not None:
                    numbers = [number * factor.broadcast(lanes) for number in numbers]
                target.store(products.as_factors(numbers), column * products.size)
            self.query_scales.store(scale * shape.score_scale, (row * 2 + part) * 4)

    def _load_query(self, first: Value) -> None:
        """Store a query in fp32, with the padding of a latent."""
        function = self.function
        shape = self.shape
        lanes = self.lanes
        zeros = function.constant(self.floats, 0.0)
        for start in range(0, shape.width, lanes):
            self._query.store(zeros, start * 4)
        counts = shape.latent_dim, shape.head_dim - shape.latent_dim
        for count, (start, _) in zip(counts, self._parts, strict=True):
            step = 1 if count % lanes else lanes
            with function.loop(0, count, step) as (index, _):
                number = first + index
                source = self.args.pointer("queries")
                loaded = as_fp32(source, number, self.bf16, None if step == 1 else step)
                self._query.store(loaded, (index + start) * 4)
            first = first + count

    def score(self, page: Pointer, line: Value, rows: Value) -> None:
        with self.function.loop(0, KEYS, _TOKENS) as (token, _):
            self._join(page, line + token)
            for count, tiles in self.tiles(rows, (self.lanes // _TOKENS, 1)):
                with tiles as (row, _):
                    self._score_tile(page, line, token, row, count)

    def _join(self, page: Pointer, line: Value) -> None:
        """Store the numbers of some tokens for `add_joined`, vectors of all tokens in turn."""
        function = self.function
        shape = self.shape
        lanes = self.lanes
        products = self.products
        words = page.plus(line // shape.per_word * (shape.width * 4))
        with function.loop(0, shape.width, lanes * products.joined) as (column, _):
            tokens = []
            for row in range(_TOKENS // shape.per_word):
                loaded = [
                    words.load(vector(i32, lanes), (column + row * shape.width + at * lanes) * 4)
                    for at in range(products.joined)
                ]
                tokens += products.of_tokens(loaded)
            for number, token in enumerate(tokens):
                offset = column * (products.size * _TOKENS) + number * lanes * 4
                self._tokens.store(token, offset)

    def _score_tile(self, page: Pointer, line: Value, token: Value, row: Value, count: int) -> None:
        """Store the scores of some tokens for `count` rows."""
        function = self.function
        shape = self.shape
        products = self.products
        # Floats of both parts are added up together.
        parts = self._parts if shape.bits == 8 else [(0, shape.width)]
        scores: list[Value] = []
        for part, (start, end) in enumerate(parts):
            sums = self._products(row, count, start, end)
            total = products.as_float(totals(function, sums))
            for tiled in range(count):
                lanes = range(tiled * _TOKENS, (tiled + 1) * _TOKENS)
                of_row = total.shuffled(lanes)
                scale = self.query_scales.load(f32, ((row + tiled) * 2 + part) * 4)
                scale = scale.broadcast(_TOKENS)
                if shape.bits == 8:
                    at = shape.scales_at + (0 if part else PAGE * 4)
                    scale = scale * page.load(vector(f32, _TOKENS), (line + token) * 4 + at)
                if part:
                    scores[tiled] = function.multiply_add(of_row, scale, scores[tiled])
                else:
                    scores.append(of_row * scale)
        for tiled, score in enumerate(scores):
            self.scores.store(score, ((row + tiled) * KEYS + token) * 4)

    def _products(self, row: Value, count: int, start: int, end: int) -> list[Value]:
        """Return sums over columns, of `_TOKENS` tokens with the first row, then the next."""
        function = self.function
        shape = self.shape
        lanes = self.lanes
        products = self.products
        zeros = [products.zero] * (count * _TOKENS)
        size = products.size
        with function.loop(start, end, lanes * products.joined, zeros) as (column, sums):
            tokens = [
                self._tokens.load(
                    products.joined_type, column * (size * _TOKENS) + number * lanes * 4
                )
                for number in range(_TOKENS)
            ]
            for tiled in range(count):
                offset = ((row + tiled) * shape.width + column) * size
                factors = self.queries.load(products.joined_type, offset)
                for number, numbers in enumerate(tokens, tiled * _TOKENS):
                    sums[number] = products.add_joined(sums[number], numbers, factors)
        return sums
