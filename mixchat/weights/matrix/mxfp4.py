"""MXFP4, the microscaling format of 4 bits (OCP MX 1.0), with a scale for each block of 32 weights.

A code is a float of 4 bits (e2m1): a sign, two bits of exponent and one of mantissa. A weight is
that number times a power of two. `absmax` holds the exponent of the power plus 127 (E8M0) in a
byte, so that a weight takes 4.25 bits. Codes are ordered as in `nf4.py`.

Models are published in MXFP4. It has fewer levels near 0 than NF4, and coarse scales, so no other
model is quantized to it.
"""

from __future__ import annotations

import torch

from mixchat.kernels.cpu.four_bit_units import MXFP4_UNITS
from mixchat.weights.matrix.encode import each_in_threads
from mixchat.weights.matrix.nf4 import NibbleCodes, two_a_byte
from mixchat.weights.matrix.quant_type import Encoded, Inputs

LARGEST_SCALE = 252  # 2^125; the largest level, 6, times 2^126 would be no float
_BLOCKSIZE = 32
_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_BOUNDARIES = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2
_PIECE = 2**18  # weights, whose temporary tensors fit in the caches


class _Mxfp4Codes(NibbleCodes):
    name = "mxfp4"
    units = MXFP4_UNITS
    blocksize = _BLOCKSIZE
    scale_dtype = torch.uint8
    for_dense_parts = False
    levels = torch.cat((_MAGNITUDES, -_MAGNITUDES))

    def codes(
        self, weight: torch.Tensor, *, search: bool = False, inputs: Inputs | None = None
    ) -> Encoded:
        flat = weight.detach().reshape(-1)
        codes = flat.new_empty(len(flat) // 2, dtype=torch.uint8)
        absmax = codes.new_empty(len(flat) // _BLOCKSIZE)
        pieces = (flat, _PIECE), (codes, _PIECE // 2), (absmax, _PIECE // _BLOCKSIZE)
        each_in_threads(_encode_piece, *pieces)
        return codes, absmax

    def scales(self, absmax: torch.Tensor) -> torch.Tensor:
        # 2^-127 has no exponent among normal floats. It is a denormal one: half of the least normal
        # float.
        return (absmax.int() << 23).clamp(min=1 << 22).view(torch.float32)


MXFP4 = _Mxfp4Codes()


def _encode_piece(weight: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    blocks = weight.float().view(-1, _BLOCKSIZE)
    largest = blocks.abs().amax(-1).view(torch.int32)
    # The scale brings the largest weight to 3.5 to 7, which is rounded to 4 or 6. The exponent
    # begins at bit 23.
    absmax.copy_(((largest + (1 << 21) >> 23) - 2).clamp(0, LARGEST_SCALE))
    scaled = blocks / MXFP4.scales(absmax).unsqueeze(-1)
    nearest = torch.bucketize(scaled.abs(), _BOUNDARIES, out_int32=True)
    signed = nearest + 8 * torch.signbit(scaled)
    codes.copy_(two_a_byte(signed.to(torch.uint8)).view(-1))
