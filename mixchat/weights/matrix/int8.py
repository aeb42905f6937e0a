"""8-bit codes with one scale (`absmax`) for each block of 64 weights.

A code is an integer from -127 to 127, and a weight is code / 127 times `absmax`, the largest
magnitude in its block, rounded to bf16. Rows are taken 32 at a time. For a pair of columns
(2j, 2j+1) the 64 codes row0[2j], row0[2j+1], row1[2j], ... are one line of 64 bytes.

R = rows, C = columns.
"""

from __future__ import annotations

import torch

from mixchat.kernels.cpu.units import BAND, EIGHT_BITS
from mixchat.weights.matrix.encode import each_in_threads
from mixchat.weights.matrix.quant_type import BLOCKSIZE, BlockCodes, Encoded, Inputs

_LARGEST = 127  # code
_PIECE = 2**18  # weights, whose temporary tensors fit in the caches


class _Int8Codes(BlockCodes):
    name = "int8"
    bits = 8
    units = EIGHT_BITS
    codes_dtype = torch.int8
    for_experts = False

    def codes(
        self, weight: torch.Tensor, *, search: bool = False, inputs: Inputs | None = None
    ) -> Encoded:
        flat = weight.detach().reshape(-1)
        codes = flat.new_empty(len(flat), dtype=torch.int8)
        absmax = flat.new_empty(len(flat) // BLOCKSIZE, dtype=torch.bfloat16)
        pieces = (flat, _PIECE), (codes, _PIECE), (absmax, _PIECE // BLOCKSIZE)
        each_in_threads(_encode_piece, *pieces)
        return codes, absmax

    def packed(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        pairs = codes.view(torch.int16)  # of codes
        return pairs.view(-1, BAND, columns // 2).transpose(1, 2)

    def decode(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        pairs = codes.view(-1, columns // 2, BAND, 2).transpose(1, 2)
        return pairs.reshape(-1, columns) / _LARGEST


INT8 = _Int8Codes()


def _encode_piece(weight: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    blocks = weight.float().view(-1, BLOCKSIZE)
    absmax.copy_(blocks.abs().amax(-1))
    scale = absmax.float().unsqueeze(-1)
    scaled = blocks / scale.masked_fill_(scale == 0, 1)
    scaled.mul_(_LARGEST).round_().clamp_(-_LARGEST, _LARGEST)
    codes.copy_(scaled.view(-1))
