"""Turns the codes of MXFP4 into numbers and multiplies them, with each kind of instructions.

A level is a multiple of 1/2 up to 6, and is exact in 16 bits (682 times) and in 8 (20 times). The
scale of 32 weights is the exponent of a float. 0 in its place is read as the number 0, since
2^-127 has no exponent.
"""

from __future__ import annotations

from typing import ClassVar

from mixchat.kernels.emit import Pointer, Value, f32, i8, i32, vector
from mixchat.kernels.units import Avx2, Avx2Bytes, Avx512, Avx512Bytes, Unit, UnitSet


class _Mxfp4(Unit):
    block, scale_bytes = 32, 1
    one: ClassVar[int] = 682

    def scales(self, absmax: Pointer, place: Value) -> Value:
        exponents = absmax.load(vector(i8, self.lanes), place).widened(vector(i32, self.lanes))
        return (exponents << 23).bits_as(vector(f32, self.lanes))


class _Mxfp4Bytes(_Mxfp4):
    one = 20


class Avx512Mxfp4(_Mxfp4, Avx512):
    """MXFP4 with AVX-512."""


class Avx2Mxfp4(_Mxfp4, Avx2):
    """MXFP4 with AVX2."""


class Avx512Mxfp4Bytes(_Mxfp4Bytes, Avx512Bytes):
    """MXFP4 with AVX-512, x in 8 bits."""


class Avx2Mxfp4Bytes(_Mxfp4Bytes, Avx2Bytes):
    """MXFP4 with AVX2, x in 8 bits."""


MXFP4_UNITS = UnitSet(
    4,
    words={"avx512": Avx512Mxfp4, "avx2": Avx2Mxfp4},
    bytes={"avx512": Avx512Mxfp4Bytes, "avx2": Avx2Mxfp4Bytes},
)
