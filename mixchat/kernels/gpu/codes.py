"""Turns the codes of a matrix into numbers on a GPU, with one function for each order of codes.

A band is some rows whose codes lie together. `kernels/cpu/` describes the order of the codes
(`four_bit_units.py`, `plane_units.py`, `trellis_units.py`). A block is some columns. Its weights in
a row share a scale.

A program has T threads, and tensors are [T, numbers of a thread]. Then all that a thread needs of a
block is in its own registers, codes are read 16 bytes at a time, and nothing crosses shared memory:

- `load` reads the thread's codes in a block, tensors [T, 4] of words of 32 bits.
- `numbers` makes of them the numbers of two columns, two tensors [T, rows of a thread].
- `column` tells the first of these columns.
- `scales` reads the scales of the thread's rows.
- `row_of` tells these rows.

Threads side by side have parts of the rows for the same columns. Then come the other columns of the
block, and then other blocks.

The levels of a type are in the registers of a warp. Thread i has level i, and threads ask each
other by a shuffle. A load from memory would need a second instruction for the address.

C = columns.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mixchat.kernels.cpu.trellis_units import FACTOR, SCALE_EXPONENT


class CodeTile(NamedTuple):
    """The share of a thread in the codes of a band."""

    band: int  # rows
    block: int  # columns
    threads: int  # that share a block of a band
    parts: int  # of the band's rows
    pairs: int  # of columns of a thread
    bits: int  # of a weight


TILES = {
    "nf4": CodeTile(32, 64, 16, 2, 4, 4),
    "mxfp4": CodeTile(32, 32, 8, 2, 4, 4),
    "int8": CodeTile(32, 64, 32, 4, 4, 8),
    "int6": CodeTile(32, 64, 32, 4, 4, 6),
    "trellis2": CodeTile(64, 64, 64, 4, 2, 2),
    "trellis3": CodeTile(64, 64, 64, 4, 2, 3),
    # Dense rows of 16 or 32 bits have no order of their own. Bands and blocks are what suits.
    "none": CodeTile(8, 8, 1, 1, 4, 16),
    "none32": CodeTile(8, 4, 1, 1, 2, 32),
}
_UPPER = tl.constexpr(-65536)  # the upper half of a word
_FACTOR = tl.constexpr(FACTOR >> 4)  # puts the subset of a window into bits 8 to 11
_EXPONENT = tl.constexpr(2.0**SCALE_EXPONENT)  # makes up for the exponent of scales of 8 bits


@triton.constexpr_function
def tile(field, type_):
    """Return a number of the tile of a type."""
    return getattr(TILES[type_], field)


@functools.cache
def lanes() -> int:
    """Return the threads of a warp: 32, or 64 on AMD's GPUs for data centers."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


def level_table(levels: torch.Tensor) -> torch.Tensor:
    """Return 16, 32 or 64 levels as kernels read them, fp32 [64]."""
    return levels.float().repeat(64 // len(levels))


@triton.jit
def load(codes, row, block, place, C: tl.constexpr, TYPE: tl.constexpr):
    """Return the codes of a thread's place in a block, tensors [T, 4].

    codes: uint8, on a boundary of 16 bytes. row: the first one of the band. row, block and place
    are [T]. The place is below the threads of a block.
    """
    BITS: tl.constexpr = tile("bits", TYPE)
    words = codes.to(tl.pointer_type(tl.int32)) + row.to(tl.int64) * (BITS * C // 32)
    words += block * (tile("band", TYPE) * tile("block", TYPE) * BITS // 32)
    group = place // tile("parts", TYPE)
    part = place % tile("parts", TYPE)
    if TYPE == "trellis2" or TYPE == "trellis3":
        # 16 columns lie together, and a place has four of them.
        words += group // 4 * (32 * BITS)
        return _load_trellis(words, group % 4, part, TYPE)
    elif TYPE == "int6":
        # Lines of a group of columns follow each other. The last one has the high bits.
        LINES: tl.constexpr = 3
        return _load_lines(words + group * (LINES * 16) + part * 4, LINES, 16)
    else:
        # Places side by side have lines side by side, so that a load reads them without a gap.
        LINES: tl.constexpr = tile("pairs", TYPE)
        LINE: tl.constexpr = BITS * 2  # words
        STEP: tl.constexpr = tile("threads", TYPE) // tile("parts", TYPE) * LINE
        return _load_lines(words + group * LINE + part * 4, LINES, STEP)


@triton.jit
def _load_lines(words, LINES: tl.constexpr, STEP: tl.constexpr):
    """Return four words of each line, `STEP` words apart."""
    result = ()
    for line in tl.static_range(LINES):
        result += (tl.load(words[:, None] + (line * STEP + tl.arange(0, 4)[None, :])),)
    return result


@triton.jit
def _load_trellis(words, four_columns, part, TYPE: tl.constexpr):
    """Return the rings of columns 0 and 2 of four, then of columns 1 and 3, and the planes.

    The part is four turns of a pass. Bits are moved down, as if they were of the first turns.
    """
    four = tl.arange(0, 4)[None, :]
    words += four_columns * 4
    is_second = (part // 2)[:, None]
    turn = (part % 2 * 4)[:, None]
    result = ()
    for ring in tl.static_range(2):
        word = tl.load(words[:, None] + (ring * 16 + four))
        # The second pass begins 8 rows on. Its last windows reach into the next j's words.
        first, second = tl.split(word.reshape(word.shape[0], 2, 2))  # j = 0 and 2, j = 1 and 3
        zero, two = tl.split(first)
        after = tl.join(second, tl.join(two, zero)).reshape(word.shape)
        later = ((word >> 8) & 0x00FF00FF) | ((after << 8) & -16711936)
        result += (tl.where(is_second == 1, later, word) >> turn,)
    if TYPE == "trellis2":
        planes = tl.load((words + part // 2 * 16)[:, None] + (32 + four)) >> turn
    else:
        planes = tl.load((words + part * 16)[:, None] + (32 + four))
    result += (planes,)
    return result


@triton.jit
def column(place, pair: tl.constexpr, TYPE: tl.constexpr):
    """Return the first column of a pair of the place [T], in the block."""
    PAIRS: tl.constexpr = tile("pairs", TYPE)
    group = place // tile("parts", TYPE)
    if tile("bits", TYPE) == 4 or TYPE == "int8":
        return (group + pair * (tile("block", TYPE) // 2 // PAIRS)) * 2
    else:
        return (group * PAIRS + pair) * 2


@triton.jit
def table(levels, LANES: tl.constexpr, TYPE: tl.constexpr):
    """Return the levels, each in a thread of a warp, one or two tensors [LANES]."""
    lane = tl.arange(0, LANES)
    if TYPE == "trellis3" and LANES == 32:
        return tl.load(levels + lane), tl.load(levels + 32 + lane)
    elif tile("bits", TYPE) <= 4:
        return (tl.load(levels + lane),)
    else:
        return ()


@triton.jit
def numbers(codes, pair: tl.constexpr, levels, TYPE: tl.constexpr):
    """Return the numbers of a pair of columns, two tensors fp32 [T, rows].

    codes: from `load`. levels: from `table`.
    """
    if TYPE == "trellis2" or TYPE == "trellis3":
        even = _trellis_numbers(levels, codes[0], codes[2], pair, 0, TYPE)
        odd = _trellis_numbers(levels, codes[1], codes[2], pair, 1, TYPE)
        return even, odd
    elif TYPE == "int6":
        return _plane_numbers(codes, pair, TYPE)
    elif TYPE == "int8":
        word = codes[pair]
        even = _in_threads(tl.join(word << 24, word << 8))
        odd = _in_threads(tl.join(word << 16, word))
        return (even >> 24).to(tl.float32), (odd >> 24).to(tl.float32)
    else:
        word = codes[pair]
        even = join4(word, word >> 4, word >> 16, word >> 20) & 15
        odd = join4(word >> 8, word >> 12, word >> 24, word >> 28) & 15
        return _looked_up(levels, even), _looked_up(levels, odd)


@triton.jit
def _looked_up(levels, index):
    """Return the levels of some indices [T, n]."""
    LANES: tl.constexpr = levels[0].shape[0]
    WARPS: tl.constexpr = index.shape[0] // LANES
    COUNT: tl.constexpr = index.shape[1]
    # Each row of the gather is one number of each thread of a warp.
    rows = index.reshape(WARPS, LANES, COUNT).permute(2, 0, 1).reshape(COUNT * WARPS, LANES)
    result = tl.gather(levels[0][None, :].broadcast_to(rows.shape), rows & (LANES - 1), 1)
    if len(levels) == 2:
        upper = tl.gather(levels[1][None, :].broadcast_to(rows.shape), rows & (LANES - 1), 1)
        result = tl.where(rows & LANES == 0, result, upper)
    return result.reshape(COUNT, WARPS, LANES).permute(1, 2, 0).reshape(index.shape)


@triton.jit
def _plane_numbers(codes, pair: tl.constexpr, TYPE: tl.constexpr):
    """Return integers. Bits of both columns become floats of 16 bits, upper halves of fp32."""
    EXTRA: tl.constexpr = tile("bits", TYPE) - 4
    # The lowest bit of a code in bf16, if the code is the first bits of the mantissa.
    FIRST: tl.constexpr = 7 - tile("bits", TYPE)
    # 64 as bf16, to which the code is added. The code itself is 32 too large.
    FLOAT: tl.constexpr = 0x42804280
    OFFSET: tl.constexpr = 96.0
    low = codes[pair // 2]
    high = codes[len(codes) - 1]
    result = ()
    for half in tl.static_range(2):
        nibble = (pair % 2 * 2 + half) * 4 - FIRST
        extra = (pair * 2 + half) * EXTRA - FIRST - 4
        below = _shifted(low, nibble) & (0x000F000F << FIRST)
        above = _shifted(high, extra) & (((1 << EXTRA) - 1) * 0x00010001 << FIRST + 4)
        result += (below | above | FLOAT,)
    bits = _in_threads(tl.join(result[0], result[1]))
    even = fp32(bits << 16)
    odd = fp32(bits & _UPPER)
    return even - OFFSET, odd - OFFSET


@triton.jit
def _shifted(word, by: tl.constexpr):
    """Shift to the right, or to the left by a negative count."""
    if by < 0:
        return word << -by
    else:
        return word >> by


@triton.jit
def _trellis_numbers(
    levels, ring, planes, half: tl.constexpr, odd: tl.constexpr, TYPE: tl.constexpr
):
    """Return the numbers of a column, [T, 4 * 4], for each j and turn.

    half: of words, one for each of two columns. odd: whether these are columns 1 and 3.
    """
    PLANES: tl.constexpr = tile("bits", TYPE) - 1
    result = ()
    for turn in tl.static_range(4):
        # Both halves of a word have a window. Bits of planes go above the subsets.
        subset = ((ring >> turn) & 0x007F007F) * _FACTOR & 0x0F000F00
        above = _shifted(planes, turn * PLANES + odd * 8 - 12) & ((16 << PLANES) - 16) * 0x01000100
        result += ((subset | above) >> 8 + half * 16,)
    index = join4(result[0], result[1], result[2], result[3]) & (16 << PLANES) - 1
    return _looked_up(levels, index)


@triton.jit
def scales(absmax, row, block, place, C: tl.constexpr, TYPE: tl.constexpr):
    """Return the scales of the thread's rows, fp32 [T, rows]. `row` is as in `load`."""
    part = place % tile("parts", TYPE)
    first = row * (C // tile("block", TYPE)) + block * tile("band", TYPE)
    words = absmax.to(tl.pointer_type(tl.int32))
    if TYPE == "trellis2" or TYPE == "trellis3":
        return _trellis_scales(words + first // 4 + part * 4)
    elif TYPE == "mxfp4":
        words += first // 4 + part * 2
        low = _words(words, 2)
        high = _words(words + 4, 2)
        return fp32(_in_threads(tl.join(_exponents(low), _exponents(high))))
    elif TYPE == "int8":
        word = _words(words + first // 2 + part * 4, 4)
        return fp32(_in_threads(tl.join(word << 16, word & _UPPER))) * (1 / 127)
    else:
        # The rows of a part lie together in both halves of the band.
        COUNT: tl.constexpr = 8 // tile("parts", TYPE)
        words += first // 2 + part * COUNT
        low = _words(words, COUNT)
        high = _words(words + 8, COUNT)
        scale = fp32(join4(low << 16, high << 16, low & _UPPER, high & _UPPER))
        if TYPE == "int6":
            scale *= 2 / (1 << tile("bits", TYPE))
        return scale


@triton.jit
def _words(words, COUNT: tl.constexpr):
    """Return some words from each address on, [T, COUNT]."""
    return tl.load(words[:, None] + tl.arange(0, COUNT)[None, :])


@triton.jit
def _trellis_scales(words):
    """Return the 16 scales, floats of 8 bits, at each address, ordered by j and then by turn."""
    turns = _words(words, 4)
    bits = join4(turns << 20, turns << 12, turns << 4, turns >> 4) & 0x0FF00000
    numbers = fp32(bits) * _EXPONENT
    return _in_threads(numbers.reshape(bits.shape[0], 4, 4).permute(0, 2, 1))


@triton.jit
def _exponents(word):
    """Return the bits of powers of two, of four bytes with exponents in each word."""
    bits = join4(word << 23, word << 15, word << 7, word >> 1) & 0x7F800000
    # 2^-127 alone is too small for the exponent of a float, and has half of the least one's.
    return tl.where(bits == 0, 1 << 22, bits)


@triton.jit
def row_of(TYPE: tl.constexpr):
    """Return the rows of a band in the order of parts and their rows, int32 [band]."""
    return _row(tl.arange(0, tile("band", TYPE)), TYPE)


@triton.jit
def rows_of(part, TYPE: tl.constexpr):
    """Return the rows of parts [T] in a band, int32 [T, rows]."""
    COUNT: tl.constexpr = tile("band", TYPE) // tile("parts", TYPE)
    return _row((part * COUNT)[:, None] + tl.arange(0, COUNT)[None, :], TYPE)


@triton.jit
def _row(index, TYPE: tl.constexpr):
    if TYPE == "trellis2" or TYPE == "trellis3":
        return index // 4 % 4 * 16 + index // 16 * 4 + index % 4
    elif tile("bits", TYPE) >= 8:
        return index
    else:
        return index % 2 * 16 + index // 2


@triton.jit
def join4(a, b, c, d):
    """Return four tensors [T, ...] as [T, n], each fourth number of one of them."""
    return _in_threads(tl.join(tl.join(a, c), tl.join(b, d)))


@triton.jit
def _in_threads(numbers):
    """Return a tensor [T, ...] as [T, numbers of a thread]."""
    return numbers.reshape(numbers.shape[0], numbers.numel // numbers.shape[0])


@triton.jit
def fp32(bits):
    """Return the fp32 numbers that have these bits."""
    return bits.to(tl.float32, bitcast=True)
