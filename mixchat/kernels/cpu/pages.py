"""Stores keys and values of the tokens seen so far in pages, as the attention kernel reads them.

A page holds 512 tokens of a layer. In it each group (the heads that share keys) has its keys, then
its values, in words of 32 bits that hold 1, 2 or 4 numbers (fp32, bf16, 8 bits):

- keys in blocks of 16 tokens, for each word of a key one vector, with a token in each lane
- values, for each word of tokens vectors, with a number of the head in each lane

With 8 bits each key and each value has a scale, after the values.

Latents are keys whose first numbers are their values (`latent_dim`). They are stored once, as
values, with the numbers of their keys after the numbers of their values.

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
    """The layout of keys and values in a page. `bits` is the size of a stored number.

    latent_dim: the numbers of a key that are its value, 0 if values are apart. Then `groups` is 1.
    scale: multiplies the scores, None for 1 / sqrt(head_dim).
    """

    heads: int
    groups: int
    head_dim: int
    bits: Bits
    latent_dim: int = 0
    scale: float | None = None

    @property
    def shared(self) -> int:
        """Return the heads that share a key."""
        return self.heads // self.groups

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def key_dim(self) -> int:
        """Return the numbers of a key that are stored as such, a latent's without its value."""
        return self.head_dim - self.latent_dim

    @property
    def value_dim(self) -> int:
        """Return the numbers of a value."""
        return self.latent_dim or self.head_dim

    @property
    def value_width(self) -> int:
        """Return the numbers of a value, with padding."""
        return _padded(self.value_dim)

    @property
    def width(self) -> int:
        """Return the numbers of a key, with padding. A latent has it after both of its parts."""
        return _padded(self.key_dim) + (self.value_width if self.latent_dim else 0)

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @property
    def values_at(self) -> int:
        """Return the offset of the values in a group's part of a page, in bytes."""
        return 0 if self.latent_dim else PAGE * self.width * self.bits // 8

    @property
    def scales_at(self) -> int:
        """Return the offset of the keys' scales, in bytes. The values' scales follow."""
        return self.values_at + PAGE * self.width * self.bits // 8

    @property
    def group_bytes(self) -> int:
        return self.scales_at + (2 * PAGE * 4 if self.bits == 8 else 0)

    @property
    def page_bytes(self) -> int:
        return self.groups * self.group_bytes


def _padded(columns: int) -> int:
    return -(-columns // _WIDTH) * _WIDTH


def store(
    shape: CacheShape, pages: torch.Tensor, past: int, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Store keys and values [T, G, h], fp32 or bf16, after the first `past` tokens.

    `pages`, int64, are the addresses of a layer's pages, which hold zeros at first. Latents have
    keys [T, 1, key_dim] and values [T, 1, value_dim].
    """
    step = store_step(shape, keys.contiguous(), values.contiguous())
    step.set(pages=pages.data_ptr(), past=past)
    step.run()


def store_step(shape: CacheShape, keys: torch.Tensor, values: torch.Tensor) -> Step:
    """Return `store` as a step. The address `pages` and `past` are still to be set."""
    tokens = keys.shape[0]
    function = _compiled(shape, keys.dtype == torch.bfloat16).function("store")
    threads = 1 if tokens == 1 else None
    return _SIGNATURE.step(function, threads, keys=keys, values=values, tokens=tokens)


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
        self.shape = shape
        self._bf16 = bf16
        self.function = Function(module, "store")
        self._args = _SIGNATURE.read_by(self.function)

    def write(self) -> None:
        function = self.function
        args = self._args
        shape = self.shape
        keys = args.pointer("keys")
        values = args.pointer("values")
        with function.each_item(function.pointer, args.number("tokens")) as token:
            position = args.number("past") + token
            line = position % PAGE
            with function.loop(0, shape.groups, 1) as (group, _):
                target = group_part(args, shape, position, group)
                number = token * shape.groups + group
                first = number * shape.key_dim
                of_value = number * shape.value_dim
                if shape.latent_dim:
                    self._store_row(keys, first, shape.key_dim, target, line, shape.value_width)
                else:
                    self._store_block(keys, first, target, line)
                self._store_row(values, of_value, shape.value_dim, target, line, 0)
        function.finish()

    def _store_block(self, keys: Pointer, first: Value, target: Pointer, line: Value) -> None:
        shape = self.shape
        size = self.shape.bits // 8
        block = line // KEY_BLOCK * (KEY_BLOCK * shape.width * size) + line % KEY_BLOCK * 4
        scale = target.plus(line * 4 + shape.scales_at)
        with self._encoded(keys, first, shape.head_dim, scale) as (number, key):
            word = number // shape.per_word * (KEY_BLOCK * 4)
            target.store(key, block + word + number % shape.per_word * size)

    def _store_row(
        self, source: Pointer, first: Value, count: int, target: Pointer, line: Value, column: int
    ) -> None:
        """Store `count` numbers of a value, or from a column on those of a latent's key alone."""
        shape = self.shape
        size = self.shape.bits // 8
        word = line // shape.per_word * (shape.width * 4) + line % shape.per_word * size
        scale = target.plus(line * 4 + shape.scales_at + (0 if column else PAGE * 4))
        with self._encoded(source, first, count, scale) as (number, value):
            target.store(value, word + number * 4 + (shape.values_at + column * 4))

    @contextmanager
    def _encoded(
        self, source: Pointer, first: Value, count: int, scale: Pointer
    ) -> Iterator[tuple[Value, Value]]:
        """Yield the index of each of `count` numbers, and the number as it is stored.

        With 8 bits, store their scale first.
        """
        function = self.function
        if self.shape.bits == 8:
            with function.loop(0, count, 1, [function.constant(f32, 0.0)]) as (index, largest):
                number = as_fp32(source, first + index, self._bf16)
                largest[0] = function.maximum(function.maximum(number, -number), largest[0])
            scale.store(largest[0] * (1 / _LARGEST))
            # Numbers that are all 0, or whose factor would be infinite, are stored as zeros.
            factor = function.constant(f32, _LARGEST) / largest[0]
            factor = largest[0].compare(">", 1e-30).choose(factor, 0.0)
        with function.loop(0, count, 1) as (index, _):
            number = as_fp32(source, first + index, self._bf16)
            if self.shape.bits == 8:
                stored = function.rounded(number * factor).as_integer(i32).narrowed(i8)
            else:
                stored = number if self.shape.bits == 32 else rounded_to_bf16(number)
            yield index, stored
