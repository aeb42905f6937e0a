"""Stores keys and values of the tokens seen so far in pages, as the attention kernel reads them.

A page holds 512 tokens of a layer. In it each group (the heads that share keys) has its keys, then
its values, in words of 32 bits that hold 1, 2 or 4 numbers (fp32, bf16, 8 bits):

- keys in blocks of 16 tokens, for each word of a key one vector, with a token in each lane
- values, for each word of tokens vectors, with a number of the head in each lane

With 8 bits each key and each value has a scale, after the values.

With bf16 and h = 128, take token 37 of a page. Its key's numbers 6 and 7 are the word 3 of block 2,
lane 5. Its value's number 6 is the upper half of word 18, lane 6.

T = new tokens, P = tokens before them, H = heads, G = groups, h = head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mixchat.kernels.cpu.arithmetic import as_fp32, rounded_to_bf16
from mixchat.kernels.cpu.compile import compiled_here
from mixchat.kernels.cpu.emit import Function, Pointer, Value, f32, i8, i32, i64
from mixchat.kernels.cpu.program import Arguments, Signature, Step

Bits = Literal[32, 16, 8]
PAGE = 512  # tokens, 2 MB of Mixtral in bf16, a large page of memory
KEY_BLOCK = 16  # tokens whose keys lie side by side
_WIDTH = 32  # h is padded to a multiple of this
_LARGEST = 127  # of signed 8-bit numbers
_SIGNATURE = Signature("pages", "keys", "values", "past", "tokens")


@dataclass(frozen=True)
class CacheShape:
    """The layout of keys and values in a page. `bits` is the size of a stored number."""

    heads: int
    groups: int
    head_dim: int
    bits: Bits

    @property
    def shared(self) -> int:
        """Return the heads that share a key."""
        return self.heads // self.groups

    @property
    def width(self) -> int:
        """Return the numbers of a key, with padding."""
        return -(-self.head_dim // _WIDTH) * _WIDTH

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @property
    def values_at(self) -> int:
        """Return the offset of the values in a group's part of a page, in bytes."""
        return PAGE * self.width * self.bits // 8

    @property
    def scales_at(self) -> int:
        """Return the offset of the keys' scales, in bytes. The values' scales follow."""
        return 2 * self.values_at

    @property
    def group_bytes(self) -> int:
        return self.scales_at + (2 * PAGE * 4 if self.bits == 8 else 0)

    @property
    def page_bytes(self) -> int:
        return self.groups * self.group_bytes


def store(
    shape: CacheShape, pages: torch.Tensor, past: int, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Store keys and values [T, G, h], fp32 or bf16, after the first `past` tokens.

    `pages`, int64, are the addresses of a layer's pages, which hold zeros at first.
    """
    step = store_step(shape, keys.contiguous(), values.contiguous())
    step.set(pages=pages.data_ptr(), past=past)
    step.run()


def store_step(shape: CacheShape, keys: torch.Tensor, values: torch.Tensor) -> Step:
    """Return `store` as a step. The address `pages` and `past` are still to be set."""
    tokens = keys.shape[0]
    numbers = _SIGNATURE.numbers(keys=keys.data_ptr(), values=values.data_ptr(), tokens=tokens)
    function = _compiled(shape, keys.dtype == torch.bfloat16).function("store")
    threads = 1 if tokens == 1 else None
    return Step(function, _SIGNATURE, numbers, (keys, values), threads)


def group_part(args: Arguments, shape: CacheShape, token: Value, group: Value) -> Pointer:
    """Return the address of a group's part of the token's page."""
    page = args.pointer("pages").load(i64, token // PAGE * 8)
    return args.function.address(page + group * shape.group_bytes)


@compiled_here
def _compiled(module: Any, lanes: int, shape: CacheShape, bf16: bool) -> None:
    _StoreKernel(module, shape, bf16).write()


class _StoreKernel:
    """The function `store`. An item of work is a token."""

    def __init__(self, module: Any, shape: CacheShape, bf16: bool) -> None:
        self.shape, self._bf16 = shape, bf16
        self.function = Function(module, "store")
        self._args = _SIGNATURE.read_by(self.function)

    def write(self) -> None:
        function, args, shape = self.function, self._args, self.shape
        size = shape.bits // 8
        with function.each_item(function.pointer, args.number("tokens")) as token:
            position = args.number("past") + token
            line = position % PAGE
            block = line // KEY_BLOCK * (KEY_BLOCK * shape.width * size) + line % KEY_BLOCK * 4
            word = line // shape.per_word * (shape.width * 4) + line % shape.per_word * size
            with function.loop(0, shape.groups, 1) as (group, _):
                target = group_part(args, shape, position, group)
                first = (token * shape.groups + group) * shape.head_dim
                keys, values = args.pointer("keys"), args.pointer("values")
                scale = target.plus(line * 4 + shape.scales_at)
                with self._encoded(keys, first, scale) as (number, key):
                    lane = (
                        number // shape.per_word * (KEY_BLOCK * 4) + number % shape.per_word * size
                    )
                    target.store(key, block + lane)
                with self._encoded(values, first, scale.plus(PAGE * 4)) as (number, value):
                    target.store(value, word + number * 4 + shape.values_at)
        function.finish()

    @contextmanager
    def _encoded(
        self, source: Pointer, first: Value, scale: Pointer
    ) -> Iterator[tuple[Value, Value]]:
        """Yield the index of each number of a head, and the number as it is stored.

        With 8 bits, store their scale first.
        """
        function, head_dim = self.function, self.shape.head_dim
        if self.shape.bits == 8:
            with function.loop(0, head_dim, 1, [function.constant(f32, 0.0)]) as (index, largest):
                number = as_fp32(source, first + index, self._bf16)
                largest[0] = function.maximum(function.maximum(number, -number), largest[0])
            scale.store(largest[0] * (1 / _LARGEST))
            # A head of zeros, or of numbers whose factor would be infinite, is stored as zeros.
            factor = function.constant(f32, _LARGEST) / largest[0]
            factor = largest[0].compare(">", 1e-30).choose(factor, 0.0)
        with function.loop(0, head_dim, 1) as (index, _):
            number = as_fp32(source, first + index, self._bf16)
            if self.shape.bits == 8:
                stored = function.rounded(number * factor).as_integer(i32).narrowed(i8)
            else:
                stored = number if self.shape.bits == 32 else rounded_to_bf16(number)
            yield index, stored
