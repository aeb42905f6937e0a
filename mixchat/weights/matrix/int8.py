"""8-bit codes with one scale (`absmax`) for each block of 64 weights, in two layouts.

A code is an integer from -127 to 127, and a weight is code / 127 times `absmax`, the largest
magnitude in its block, rounded to bf16. The layouts are as in `nf4.py`, with one code a byte:

- "bitsandbytes": row after row.
- "cpu-packed": rows are taken 32 at a time. For a pair of columns (2j, 2j+1) the 64 codes
  row0[2j], row0[2j+1], row1[2j], ... are one line of 64 bytes.

If whole blocks make up a row, rows of zeros fill up the last band, so that a head of 32002 rows can
be packed, too. S rows are stored.

N = weights, R = rows, C = columns.
"""

from __future__ import annotations

import torch

from mixchat.kernels.cpu.units import BAND, EIGHT_BITS
from mixchat.weights.matrix.encode import each_in_threads
from mixchat.weights.matrix.quant_type import (
    BLOCKSIZE,
    Encoded,
    Inputs,
    RowCodes,
    absmax_size,
    in_blocks,
)

_LARGEST = 127  # code
_PIECE = 2**18  # weights, whose temporary tensors fit in the caches


class _Int8Codes(RowCodes):
    name, bits, units, codes_dtype = "int8", 8, EIGHT_BITS, torch.int8
    for_experts, widened_on_gpu = False, True

    def stored_rows(self, rows: int, columns: int) -> int:
        return in_whole_bands(rows, columns)

    def codes_size(self, rows: int, columns: int) -> int:
        return rows * columns

    def codes(
        self, weight: torch.Tensor, *, search: bool = False, inputs: Inputs | None = None
    ) -> Encoded:
        """Return int8 codes [S * C] and absmax."""
        flat = weight.detach().reshape(-1)
        rows, columns = weight.shape
        stored = self.stored_rows(rows, columns)
        codes = flat.new_zeros(stored * columns, dtype=torch.int8)
        absmax = flat.new_zeros(absmax_size(stored, columns), dtype=torch.bfloat16)
        each_in_threads(
            _encode_piece,
            torch.split(flat, _PIECE),
            torch.split(codes[: len(flat)], _PIECE),
            torch.split(absmax[: absmax_size(rows, columns)], _PIECE // BLOCKSIZE),
        )
        return codes, absmax

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes / _LARGEST

    def packed(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        pairs = codes.view(torch.int16)  # of codes
        return pairs.view(-1, BAND, columns // 2).transpose(1, 2)

    def unpacked(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        return codes.view(torch.int16).view(-1, columns // 2, BAND).transpose(1, 2)


INT8 = _Int8Codes()


def in_whole_bands(rows: int, columns: int) -> int:
    """Return the count of rows with those that fill up the last band, if blocks allow it."""
    return -(-rows // BAND) * BAND if columns % BLOCKSIZE == 0 else rows


@torch.inference_mode()  # a caller's holds for its own thread only
def _encode_piece(weight: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    blocks = in_blocks(weight.float())
    absmax.copy_(blocks.abs().amax(-1))
    scale = absmax.float().unsqueeze(-1)
    scaled = blocks / scale.masked_fill_(scale == 0, 1)
    scaled.mul_(_LARGEST).round_().clamp_(-_LARGEST, _LARGEST)
    codes.copy_(scaled.view(-1)[: len(weight)])
