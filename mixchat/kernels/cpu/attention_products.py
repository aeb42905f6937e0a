"""Products of keys and values with queries and weights, with the instructions of each kind of CPU.

A word of 32 bits holds 1, 2 or 4 numbers of a key, or of 1, 2 or 4 tokens' values. `pages.py` tells
their order. Numbers that meet these (a query's, or weights of tokens) are factors, in words, too:

- fp32 and bf16 keys and values: factors in fp32. AVX512-BF16 was no faster, as memory is the limit
- bf16 latents: factors in bf16, if the CPU multiplies them. All heads share a latent, so that
  products are the limit
- 8 bits: factors of 15 bits and a sign, with a scale for each query and each row of weights.
  Products are added up exactly. For h = 128 that is 127 * 32767 * 128 = 532,660,352 < 2^31
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from mixchat.kernels.cpu import compile as compiling
from mixchat.kernels.cpu.arithmetic import as_fp32, reduced, rounded_to_bf16
from mixchat.kernels.cpu.compile import CPUS
from mixchat.kernels.cpu.emit import Function, Pointer, Value, f32, i16, i32, vector
from mixchat.kernels.cpu.pages import CacheShape

_LARGEST_FACTOR = 32767  # of 15 bits and a sign
_LARGEST_NUMBER = 127  # of 8 bits
_LEAST = 1e-30  # numbers below have scales whose inverse may be infinite
# The order of factors in a word, which is the order of a word's bytes in `unpacked`.
_BYTE_ORDER = (0, 2, 1, 3)


class Products(ABC):
    """A choice of instructions, for one function that is being written."""

    size: ClassVar[int] = 4  # bytes of a factor

    def __init__(self, function: Function, shape: CacheShape, lanes: int) -> None:
        self.function = function
        self.shape = shape
        self.lanes = lanes
        self.floats = vector(f32, lanes)
        self.integers = vector(i32, lanes)
        self.zero = function.constant(self.floats, 0.0)  # an empty sum

    def store_query(self, source: Pointer, first: Value, bf16: bool, target: Pointer) -> Value:
        """Store a head's numbers, from number `first` of fp32 or bf16 on, as factors.

        Returns their scale.
        """
        step = self._step
        with self.function.loop(0, self.shape.head_dim, step) as (index, _):
            number = as_fp32(source, first + index, bf16, None if step == 1 else step)
            self._store(target, number, index)
        return self.function.constant(f32, 1.0)

    @property
    def _step(self) -> int:
        """Return how many numbers of a head are prepared at once."""
        return self.lanes if self.shape.head_dim % self.lanes == 0 else 1

    @abstractmethod
    def _store(self, target: Pointer, numbers: Value, index: Value | int) -> None:
        """Store fp32 numbers, or one, from factor `index` on."""

    def store_weights(
        self, weights: Sequence[Value], scales: Sequence[Value] | None, target: Pointer
    ) -> tuple[Value, Value]:
        """Store the weights of some tokens, times the scales of their values, as factors.

        Returns sums of the weights, and the factors' scale.
        """
        for number, weight in enumerate(weights):
            self._store(target, weight, number * self.lanes)
        return functools.reduce(Value.__add__, weights), self.function.constant(f32, 1.0)

    @abstractmethod
    def unpacked(self, words: Value) -> list[Value]:
        """Return vectors of the words' numbers, in the order of `factors`."""

    @abstractmethod
    def factors(self, source: Pointer, word: Value) -> list[Value]:
        """Load the factors that belong to a word, each in all lanes."""

    @abstractmethod
    def add(self, total: Value, numbers: Value, factor: Value) -> Value:
        """Return the sum plus the products."""

    def as_float(self, total: Value) -> Value:
        return total

    # A latent is stored as a value, so scores are sums over its columns. Then numbers of one token
    # have to be side by side in a word.

    @property
    def joined(self) -> int:
        """Return how many columns of a token are side by side in a word of factors."""
        return 4 // self.size

    @property
    def joined_type(self) -> Any:
        """Return the type of a vector of such words."""
        return self.floats

    def of_tokens(self, words: Sequence[Value]) -> list[Value]:
        """Return the numbers of each token in words of `joined` vectors of columns."""
        return self.unpacked(words[0])

    def as_factors(self, numbers: Sequence[Value]) -> Value:
        """Return fp32 numbers of `joined` vectors of columns as factors for `of_tokens`."""
        return numbers[0]

    def add_joined(self, total: Value, numbers: Value, factors: Value) -> Value:
        """Return the sum plus the products of `of_tokens` and `as_factors`."""
        return self.add(total, numbers, factors)

    def scaled(self, line: Pointer, columns: int) -> tuple[Value | None, Value]:
        """Return what fp32 numbers are multiplied by before `as_factors`, and their scale."""
        return None, self.function.constant(f32, 1.0)


class _InFloats(Products):
    """fp32, or bf16 that is widened."""

    def _store(self, target: Pointer, numbers: Value, index: Value | int) -> None:
        target.store(numbers, index * 4)

    def unpacked(self, words: Value) -> list[Value]:
        # bf16 is the upper half of fp32.
        halves = (words,) if self.shape.bits == 32 else (words << 16, words & 0xFFFF0000)
        return [half.bits_as(self.floats) for half in halves]

    def factors(self, source: Pointer, word: Value) -> list[Value]:
        count = self.shape.per_word
        return [
            source.load(f32, (word * count + number) * 4).broadcast(self.lanes)
            for number in range(count)
        ]

    def add(self, total: Value, numbers: Value, factor: Value) -> Value:
        return self.function.multiply_add(numbers, factor, total)


class _InBf16(Products):
    """bf16 with AVX512-BF16, twice as fast as fp32, and nothing has to be widened."""

    size = 2

    def _store(self, target: Pointer, numbers: Value, index: Value | int) -> None:
        target.store(rounded_to_bf16(numbers), index * 2)

    def store_weights(
        self, weights: Sequence[Value], scales: Sequence[Value] | None, target: Pointer
    ) -> tuple[Value, Value]:
        # The sum is of rounded weights, so that the weights of a token's values add up to 1.
        rounded = [rounded_to_bf16(weight) for weight in weights]
        for number, weight in enumerate(rounded):
            target.store(weight, number * self.lanes * 2)
        weights = [(w.widened(self.integers) << 16).bits_as(self.floats) for w in rounded]
        return functools.reduce(Value.__add__, weights), self.function.constant(f32, 1.0)

    def unpacked(self, words: Value) -> list[Value]:
        return [words]

    def factors(self, source: Pointer, word: Value) -> list[Value]:
        return [source.load(i32, word * 4).broadcast(self.lanes)]

    def add(self, total: Value, numbers: Value, factor: Value) -> Value:
        # LLVM reads this declaration, of before it had bf16, as its own.
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return self.function.call(name, self.floats, total, numbers, factor)

    @property
    def joined_type(self) -> Any:
        return self.integers

    def of_tokens(self, words: Sequence[Value]) -> list[Value]:
        first, second = words
        return [first & 0xFFFF | second << 16, first >> 16 | second & 0xFFFF0000]

    def as_factors(self, numbers: Sequence[Value]) -> Value:
        first, second = (rounded_to_bf16(part).widened(self.integers) for part in numbers)
        return first | second << 16


class _WordProducts(Products):
    """8 bits times 16 bits, as `WordUnit` multiplies."""

    size = 2

    def __init__(self, function: Function, shape: CacheShape, lanes: int) -> None:
        super().__init__(function, shape, lanes)
        self.zero = function.constant(self.integers, 0)
        self.words = vector(i16, 2 * lanes)
        # A sum over all numbers of a head must not overflow.
        most = (2**31 - 1) // (_LARGEST_NUMBER * shape.width)
        self._largest_query = min(_LARGEST_FACTOR, most)
        instructions = compiling.instruction_set()
        assert instructions is not None
        self._add_words = CPUS[instructions].add_words

    def store_query(self, source: Pointer, first: Value, bf16: bool, target: Pointer) -> Value:
        function = self.function
        step = self._step
        count, least = (None, i32(0)) if step == 1 else (step, None)
        integers: Any = i32 if step == 1 else self.integers
        start = function.constant(integers, 0) if least is None else Value(function, least)
        # Bits of magnitudes rise like the numbers. NaN comes last, and makes every score NaN.
        with function.loop(0, self.shape.head_dim, step, [start]) as (index, largest):
            number = as_fp32(source, first + index, bf16, count)
            bits = number.bits_as(integers) & 0x7FFFFFFF
            largest[0] = function.maximum(bits, largest[0])
        bits = largest[0]
        if step > 1:
            bits = function.call(f"llvm.vector.reduce.umax.v{step}i32", i32, bits)
        factor, scale = self._scaled(bits.bits_as(f32), self._largest_query)
        with function.loop(0, self.shape.head_dim, step) as (index, _):
            number = as_fp32(source, first + index, bf16, count)
            self._store(target, number * (factor if step == 1 else factor.broadcast(step)), index)
        return scale

    def store_weights(
        self, weights: Sequence[Value], scales: Sequence[Value] | None, target: Pointer
    ) -> tuple[Value, Value]:
        assert scales is not None
        function = self.function
        # The scales of values belong to the products, and not to the sum of weights.
        scaled = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
        largest = functools.reduce(function.maximum, scaled)
        factor, scale = self._scaled(reduced(function, largest, "fmax"), _LARGEST_FACTOR)
        for number, weight in enumerate(scaled):
            self._store(target, weight * factor.broadcast(self.lanes), number * self.lanes)
        return functools.reduce(Value.__add__, weights), scale

    def _scaled(self, largest: Value, integer: int) -> tuple[Value, Value]:
        """Return the factor that makes `integer` of the largest number, and the scale."""
        factor = self.function.constant(f32, integer) / largest
        factor = largest.compare(">", _LEAST).choose(factor, 0.0)
        return factor, largest * (1 / integer)

    def _store(self, target: Pointer, numbers: Value, index: Value | int) -> None:
        rounded = self.function.rounded(numbers)
        if rounded.type == f32:
            # The inverse of _BYTE_ORDER is the same order, which swaps both bits of an index.
            assert isinstance(index, Value)
            at = (index & ~3) | (index & 1) << 1 | (index >> 1) & 1
            target.store(rounded.as_integer(i32).narrowed(i16), at * 2)
            return
        short = rounded.as_integer(self.integers).narrowed(vector(i16, self.lanes))
        order = [first + at for first in range(0, self.lanes, 4) for at in _BYTE_ORDER]
        target.store(short.shuffled(order), index * 2)

    def unpacked(self, words: Value) -> list[Value]:
        if self._add_words is None:
            return [(words << 24 - 8 * at).arithmetic_shift(24) for at in _BYTE_ORDER]
        pairs = words.bits_as(self.words)
        return [(pairs << 8).arithmetic_shift(8), pairs.arithmetic_shift(8)]

    def factors(self, source: Pointer, word: Value) -> list[Value]:
        if self._add_words is None:
            shorts = (source.load(i16, word * 8 + 2 * number) for number in range(4))
            return [short.sign_extended(i32).broadcast(self.lanes) for short in shorts]
        pairs = (source.load(i32, word * 8 + 4 * number) for number in range(2))
        return [pair.broadcast(self.lanes).bits_as(self.words) for pair in pairs]

    def add(self, total: Value, numbers: Value, factor: Value) -> Value:
        if self._add_words is None:
            return total + numbers * factor
        # With VNNI, LLVM joins both to one instruction.
        return total + self.function.call(self._add_words, self.integers, numbers, factor)

    def as_float(self, total: Value) -> Value:
        return total.as_float(vector(f32, total.type.count))

    @property
    def joined_type(self) -> Any:
        return self.words

    def of_tokens(self, words: Sequence[Value]) -> list[Value]:
        tokens = []
        for token in range(4):
            # The token's byte comes to the top of each half of a word, and its sign from there.
            first, second = (word << 24 - 8 * token for word in words)
            halves = (first >> 16 & 0xFF00) | (second & 0xFF000000)
            tokens.append(halves.bits_as(self.words).arithmetic_shift(8))
        return tokens

    def as_factors(self, numbers: Sequence[Value]) -> Value:
        first, second = (self.function.rounded(part).as_integer(self.integers) for part in numbers)
        return (first & 0xFFFF | second << 16).bits_as(self.words)

    def add_joined(self, total: Value, numbers: Value, factors: Value) -> Value:
        if self._add_words is not None:
            return self.add(total, numbers, factors)
        for shift in (16, 0):
            first, second = (
                (words.bits_as(self.integers) << shift).arithmetic_shift(16)
                for words in (numbers, factors)
            )
            total = total + first * second
        return total

    def scaled(self, line: Pointer, columns: int) -> tuple[Value | None, Value]:
        start = self.function.constant(self.integers, 0)
        with self.function.loop(0, columns, self.lanes, [start]) as (column, largest):
            bits = line.load(self.integers, column * 4) & 0x7FFFFFFF
            largest[0] = self.function.maximum(bits, largest[0])
        name = f"llvm.vector.reduce.umax.v{self.lanes}i32"
        bits = self.function.call(name, i32, largest[0])
        return self._scaled(bits.bits_as(f32), self._largest_query)


def products_of(function: Function, shape: CacheShape, lanes: int) -> Products:
    """Return the products for the bits of a cache."""
    if shape.bits == 8:
        return _WordProducts(function, shape, lanes)
    has_bf16 = lanes == 16 and compiling.has_feature("avx512bf16")
    if shape.latent_dim and shape.bits == 16 and has_bf16:
        return _InBf16(function, shape, lanes)
    return _InFloats(function, shape, lanes)
