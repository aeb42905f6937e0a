"""4-bit codes with one scale (`absmax`) for each block of 64 weights, and their matmul.

A code is a place in a table of 16 numbers from -1 to 1: NF4's, or FP4's (three bits of a float and
a sign), which only checkpoints quantized elsewhere bring along. A weight is its number times the
scale of its block.

Two orders of the same codes, called `layout`:

- "bitsandbytes": row after row, two codes a byte, the even column in the high nibble; `absmax` is
  one value a block, in the same order. What `quantize_4bit` gives and every device can read.
- "cpu-packed": what the kernel for CPUs (`kernels/four_bit.py`) reads, and bitsandbytes' own for
  AVX512-BF16. Rows are taken 32 at a time; for a pair of columns (2j, 2j+1) the 64 codes row0[2j],
  row0[2j+1], row1[2j], ... are one line, whose first half fills the low nibbles of 32 bytes and
  whose second half the high ones. `absmax` is transposed: [columns / 64, rows].

Both hold the same numbers in the same count of bytes, so one turns into the other without loss.
`absmax` is kept in bf16: the largest weight of a block of bf16 weights is a bf16 number. Scales
from elsewhere are rounded by `round_absmax`.

NF4 is due to Dettmers et al., QLoRA (arXiv:2305.14314).
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterator
from typing import Any, Literal

import torch

FourBit = Literal["nf4", "fp4"]
BLOCKSIZE = 64
_ROWS = 32  # rows that the packed layout interleaves
_QUANTIZE_CHUNK = 2**23  # weights; bounds quantize_4bit's temporary tensors to about 150 MB
_BAND = 2**23  # weights

# fmt: off
LEVELS: dict[FourBit, torch.Tensor] = {  # as bitsandbytes has them, in the order of the codes
    "nf4": torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]),
    "fp4": torch.tensor([
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
        0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
        -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ]),
}
# fmt: on


@functools.cache
def _package() -> Any:
    """The package bitsandbytes; imported late, because that takes two seconds."""
    # It warns that the optional package `kernels`, which would ask the hub, is not there.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return importlib.import_module("bitsandbytes")


def _functional() -> Any:
    return _package().functional


def can_pack(rows: int, columns: int) -> bool:
    """Whether a matrix of this shape has a packed layout."""
    return rows % _ROWS == 0 and columns % BLOCKSIZE == 0


def codes_size(rows: int, columns: int) -> int:
    """Bytes of the codes of a matrix."""
    return (rows * columns + 1) // 2


def absmax_size(rows: int, columns: int) -> int:
    """Count of the scales of a matrix."""
    return -(-rows * columns // BLOCKSIZE)


def quantize_fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8) and absmax (bf16) of a matrix in FP4, in the "bitsandbytes" layout.

    weight: [rows, columns], any float type. For the dense parts of a checkpoint whose other parts
    are FP4; NF4 is made by `quantizer`.
    """
    flat = weight.to(torch.bfloat16).reshape(-1)
    pieces = [
        _functional().quantize_4bit(piece, blocksize=BLOCKSIZE, quant_type="fp4")
        for piece in torch.split(flat, _QUANTIZE_CHUNK)
    ]
    codes = torch.cat([piece.view(-1) for piece, _ in pieces])
    return codes, round_absmax(torch.cat([state.absmax for _, state in pieces]))


def pack(
    codes: torch.Tensor, absmax: torch.Tensor, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the "bitsandbytes" layout to "cpu-packed"; new tensors on the same device."""
    packed = torch.empty_like(codes)
    for old, new in _bands(codes, packed, columns):
        nibbles = torch.stack((old >> 4, old & 0xF), dim=-1)  # [n * columns / 2, 2], n rows
        bands = nibbles.view(-1, _ROWS, columns // 2, 2).transpose(1, 2)
        lines = bands.reshape(-1, 2, _ROWS)  # [n * columns / 64, 2, 32]
        new.copy_((lines[:, 0] | (lines[:, 1] << 4)).view(-1))
    scales = absmax.view(rows, columns // BLOCKSIZE).T.contiguous()
    return packed, scales.view(-1)


def unpack(
    codes: torch.Tensor, absmax: torch.Tensor, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the "cpu-packed" layout to "bitsandbytes"; the inverse of `pack`."""
    flat = torch.empty_like(codes)
    for old, new in _bands(codes, flat, columns):
        packed = old.view(-1, _ROWS)
        lines = torch.stack((packed & 0xF, packed >> 4), dim=1)  # [n * columns / 64, 2, 32]
        nibbles = lines.view(-1, columns // 2, _ROWS, 2).transpose(1, 2).reshape(-1, 2)
        new.copy_((nibbles[:, 0] << 4) | nibbles[:, 1])
    scales = absmax.view(columns // BLOCKSIZE, rows).T.contiguous()
    return flat, scales.view(-1)


def _bands(
    old: torch.Tensor, new: torch.Tensor, columns: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both in pieces of some rows, a multiple of 32: bounds the temporary tensors to 16 MB."""
    rows = max(_ROWS, _BAND // columns // _ROWS * _ROWS)
    size = rows * columns // 2
    return zip(torch.split(old, size), torch.split(new, size), strict=True)


def round_absmax(absmax: torch.Tensor) -> torch.Tensor:
    """Scales as they are kept: rounded to bf16, which changes one by 1 part in 256 at most.

    The only place where taking over a quantized checkpoint loses anything. The packed kernel reads
    bf16, and bitsandbytes itself rounds so on CPUs that have it. Scales that were taken from bf16
    weights and not quantized once more (no "double quantization") are bf16 numbers: they stay.
    """
    return absmax.to(torch.bfloat16)


def quant_state(
    absmax: torch.Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.bfloat16,
    quant_type: FourBit = "nf4",
) -> Any:
    """bitsandbytes' description of a matrix, for `matmul`."""
    functional = _functional()
    return functional.QuantState(
        absmax=absmax,
        shape=torch.Size((rows, columns)),
        code=_levels_on(quant_type, absmax.device),
        blocksize=BLOCKSIZE,
        quant_type=quant_type,
        dtype=dtype,
    )


@functools.cache
def _levels_on(quant_type: FourBit, device: torch.device) -> torch.Tensor:
    return LEVELS[quant_type].to(device)


def matmul(x: torch.Tensor, codes: torch.Tensor, state: Any) -> torch.Tensor:
    """x [..., columns] times the transposed matrix: [..., rows]. Layout "bitsandbytes"."""
    rows, columns = state.shape
    if x.device.type == "cpu" and columns % BLOCKSIZE:
        # bitsandbytes' AVX512 kernel is wrong here: it lets a block begin with each row.
        weight = dequantize(codes, state.absmax, (rows, columns), x.dtype, state.quant_type)
        return torch.nn.functional.linear(x, weight)
    result: torch.Tensor = _package().matmul_4bit(x, codes.view(-1, 1), state)
    return result


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    quant_type: FourBit = "nf4",
) -> torch.Tensor:
    """The matrix of this shape as `dtype`; absmax fp32. Layout "bitsandbytes"."""
    # As one long row: on a CPU, bitsandbytes reads the blocks of others wrongly where the columns
    # are 16, 32, 48, 80, ... and compiles a kernel first where their count is odd.
    state = quant_state(absmax, 1, 2 * codes.numel(), dtype, quant_type)
    flat: torch.Tensor = _functional().dequantize_4bit(codes.view(-1, 1), state)
    return flat.view(-1)[: shape[0] * shape[1]].view(shape)
