"""The bases of quantization types. One object for each type holds all that depends on the type.

N = weights, B = blocks of 64 weights, R = rows (out features), C = columns (in features).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch.nn import functional

from mixchat.base.safetensors import TensorSpec
from mixchat.kernels.cpu import rows as row_kernels
from mixchat.kernels.cpu.dense import dense_matmul
from mixchat.kernels.cpu.units import BLOCK, UnitSet

BLOCKSIZE = BLOCK  # weights that share a scale, in all types but MXFP4
_REORDERED = 2**21  # weights whose codes are reordered at once
_PIECE = 2**18  # weights, whose temporary tensors fit in the caches

QuantType = Literal["nf4", "fp4", "mxfp4", "int5", "int6", "int8", "trellis2", "trellis3", "none"]
Shape = tuple[int, int]  # R, C
Encoded = tuple[torch.Tensor, torch.Tensor]  # codes and absmax
RecordRows = Callable[[torch.Tensor], object]
Way = Literal["plain", "weighted", "gptq"]  # to choose codes and scales for given inputs


class Inputs(NamedTuple):
    """Rows that a matrix is multiplied with, which its codes then suit."""

    fit: torch.Tensor  # rows [n, C] for which each way is tried
    held_out: torch.Tensor  # others [m, C], which decide between the ways
    # Called with the way taken, and the sum of squared errors of the products with `held_out` in
    # that way and in the plain one.
    chosen: Callable[[Way, float, float], object]
    # `fit` and `held_out` as they are if no matrix before this one is rounded. Products with them
    # are what the rounded matrix should come near to.
    exact: tuple[torch.Tensor, torch.Tensor] | None = None


class Linear(Protocol):
    """A map from [..., C] to [..., R].

    `exact` means batch invariant. A token's result then has the same bits however many are computed
    with it, if `LinearSpec.can_be_exact`.
    """

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor: ...


class QuantizationType(ABC):
    """A type of matrices. It makes their tensors of weights, and computes with them."""

    name: QuantType
    bits: int  # of a weight
    blocksize = BLOCKSIZE
    for_experts = True  # whether experts can have it
    for_dense_parts = True  # whether attention and head are quantized to it
    # True if attention and head of this type are calibrated with the experts.
    calibrated_dense_parts = False
    # True if experts can have it in some layers or matrices only.
    mixable = False
    # True if plain rounding to it ruins a model.
    needs_calibration = False
    # True if a GPU with room computes with it as a dense matrix.
    widened_on_gpu = False

    def stored_rows(self, rows: int, columns: int) -> int:
        return rows

    def can_pack(self, rows: int, columns: int) -> bool:
        """Return whether a matrix of this shape can have the layout "cpu-packed"."""
        return False

    def can_be_exact(self, columns: int, dtype: torch.dtype) -> bool:
        """Return whether `build`'s map can be batch invariant on a CPU."""
        return False

    @abstractmethod
    def tensors(self, name: str, shape: Shape, dtype: torch.dtype) -> list[TensorSpec]:
        """Return the tensors that hold a matrix. `dtype` is the type of dense ones."""

    @abstractmethod
    def encode(
        self, weight: torch.Tensor, dtype: torch.dtype, *, search: bool, inputs: Inputs | None
    ) -> list[torch.Tensor]:
        """Return the tensors that hold `weight` [R, C], in the layout that every device reads.

        With `search`, scales are searched. With `inputs`, codes suit them. Some types ignore both.
        """

    @abstractmethod
    def build(self, tensors: Sequence[torch.Tensor], shape: Shape) -> Linear:
        """Return the map over these tensors, which are used in place."""


def dense_linear(weight: torch.Tensor) -> Linear:
    """Return the map of a dense matrix [R, C]."""
    return functools.partial(dense_matmul, weight=weight)


class RecordingLinear:
    """Lets another map compute, and records its input."""

    def __init__(self, linear: Linear, record: RecordRows) -> None:
        self._linear, self._record = linear, record

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        self._record(x)
        return self._linear(x, exact=exact)


class _DenseType(QuantizationType):
    name, bits = "none", 16

    def can_be_exact(self, columns: int, dtype: torch.dtype) -> bool:
        return row_kernels.can_compute(dtype, columns)

    def tensors(self, name: str, shape: Shape, dtype: torch.dtype) -> list[TensorSpec]:
        return [TensorSpec(f"{name}.weight", dtype, shape)]

    def encode(
        self, weight: torch.Tensor, dtype: torch.dtype, *, search: bool, inputs: Inputs | None
    ) -> list[torch.Tensor]:
        return [weight.to(dtype)]

    def build(self, tensors: Sequence[torch.Tensor], shape: Shape) -> Linear:
        return dense_linear(tensors[0])


DENSE = _DenseType()


class BlockCodes(QuantizationType):
    """Codes with one scale (`absmax`) for each block of weights, in two layouts.

    "bitsandbytes" goes row after row. "cpu-packed" interleaves bands of 32 rows, with `absmax`
    transposed, [C / blocksize, R].
    """

    units: UnitSet  # of the kernel
    levels: torch.Tensor | None = None  # by code; None if codes are numbers themselves
    codes_dtype, scale_dtype = torch.uint8, torch.bfloat16

    @functools.cached_property
    def level_table(self) -> torch.Tensor | None:
        return None if self.levels is None else self.units.level_tables(self.levels)

    def can_pack(self, rows: int, columns: int) -> bool:
        return rows % self.units.band == 0 and columns % self.blocksize == 0

    def tensors(self, name: str, shape: Shape, dtype: torch.dtype) -> list[TensorSpec]:
        """Return absmax and codes. absmax is first, so that it is aligned."""
        rows, columns = self.stored_rows(*shape), shape[1]
        scales = absmax_size(rows, columns, self.blocksize)
        size = self.codes_size(rows, columns)
        return [
            TensorSpec(f"{name}.absmax", self.scale_dtype, (scales,)),
            TensorSpec(f"{name}.codes", self.codes_dtype, (size,)),
        ]

    def encode(
        self, weight: torch.Tensor, dtype: torch.dtype, *, search: bool, inputs: Inputs | None
    ) -> list[torch.Tensor]:
        codes, absmax = self.codes(weight, search=search, inputs=inputs)
        return [absmax, codes]

    def build(self, tensors: Sequence[torch.Tensor], shape: Shape) -> Linear:
        absmax, codes = tensors
        return functools.partial(self.matmul, codes=codes, absmax=absmax, shape=shape)

    def scales(self, absmax: torch.Tensor) -> torch.Tensor:
        """Return what the numbers of the codes are multiplied with, fp32."""
        return absmax.float()

    @abstractmethod
    def codes_size(self, rows: int, columns: int) -> int:
        """Return the bytes of the codes of so many stored rows."""

    @abstractmethod
    def codes(
        self, weight: torch.Tensor, *, search: bool = False, inputs: Inputs | None = None
    ) -> Encoded:
        """Return flat codes and absmax of `weight` [R, C], finite floats on the CPU.

        Layout "bitsandbytes".
        """

    @abstractmethod
    def matmul(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        shape: Shape,
        *,
        exact: bool = False,
    ) -> torch.Tensor:
        """Return x [..., C] times the transposed matrix, [..., R]. Layout "bitsandbytes".

        It is right on every device, and slow on a CPU.
        """

    @abstractmethod
    def dequantize(
        self, codes: torch.Tensor, absmax: torch.Tensor, shape: Shape, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the matrix as `dtype`. Layout "bitsandbytes"."""

    @abstractmethod
    def packed(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        """Return the codes of some bands as "cpu-packed", in any shape and type."""

    @abstractmethod
    def unpacked(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        """Return packed codes of some bands as "bitsandbytes"."""

    def to_packed_layout(
        self, codes: torch.Tensor, absmax: torch.Tensor, rows: int, columns: int
    ) -> Encoded:
        """Reorder from "bitsandbytes" to "cpu-packed" into new tensors. `rows` are stored ones."""
        scales = _transposed(absmax, rows, columns // self.blocksize)
        return self._reordered(self.packed, codes, columns), scales

    def to_bitsandbytes_layout(
        self, codes: torch.Tensor, absmax: torch.Tensor, rows: int, columns: int
    ) -> Encoded:
        """Reorder from "cpu-packed" to "bitsandbytes" into new tensors."""
        scales = _transposed(absmax, columns // self.blocksize, rows)
        return self._reordered(self.unpacked, codes, columns), scales

    def _reordered(
        self,
        reorder: Callable[[torch.Tensor, int], torch.Tensor],
        codes: torch.Tensor,
        columns: int,
    ) -> torch.Tensor:
        """Reorder some bands at a time, which bounds the memory."""
        result = torch.empty_like(codes)
        band = columns * self.units.band  # weights
        size = max(1, _REORDERED // band) * band * self.bits // 8
        for old, new in zip(torch.split(codes, size), torch.split(result, size), strict=True):
            reordered = reorder(old, columns)
            new.view(reordered.dtype).view(reordered.shape).copy_(reordered)
        return result


class RowCodes(BlockCodes):
    """Codes that are multiplied as dense rows, some at a time."""

    @abstractmethod
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the numbers of codes before their scale, fp32."""

    def rows_of(
        self, codes: torch.Tensor, absmax: torch.Tensor, shape: Shape, dtype: torch.dtype
    ) -> Iterator[torch.Tensor]:
        """Yield the matrix as `dtype`, some rows at a time. Layout "bitsandbytes"."""
        (rows, columns), block = shape, self.blocksize
        # `blocksize` rows end with a whole block, whatever the columns.
        size = max(1, _PIECE // (columns * block)) * block * columns
        scales = torch.split(absmax[: absmax_size(rows, columns, block)], size // block)
        for number, scale in enumerate(scales):
            start, end = number * size, min((number + 1) * size, rows * columns)
            last = start + len(scale) * block  # the end of the last block, which may be short
            numbers = self.decode(codes[start * self.bits // 8 : last * self.bits // 8])
            blocks = in_blocks(numbers[: end - start], block) * self.scales(scale).unsqueeze(-1)
            yield blocks.view(-1)[: end - start].view(-1, columns).to(dtype)

    def matmul(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        shape: Shape,
        *,
        exact: bool = False,
    ) -> torch.Tensor:
        pieces = self.rows_of(codes, absmax, shape, x.dtype)
        return torch.cat([dense_matmul(x, piece, exact=exact) for piece in pieces], dim=-1)

    def dequantize(
        self, codes: torch.Tensor, absmax: torch.Tensor, shape: Shape, dtype: torch.dtype
    ) -> torch.Tensor:
        weight = torch.empty(shape, dtype=dtype, device=codes.device)
        start = 0
        for rows in self.rows_of(codes, absmax, shape, dtype):
            weight[start : start + len(rows)] = rows
            start += len(rows)
        return weight


def absmax_size(rows: int, columns: int, blocksize: int = BLOCKSIZE) -> int:
    """Return the count of a matrix's scales."""
    return -(-rows * columns // blocksize)


def in_blocks(numbers: torch.Tensor, blocksize: int = BLOCKSIZE) -> torch.Tensor:
    """Return the numbers [N] as blocks [B, blocksize], the last one filled up with zeros."""
    return functional.pad(numbers, (0, -len(numbers) % blocksize)).view(-1, blocksize)


def _transposed(absmax: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return scales [height, width] as [width, height], in a new tensor."""
    return absmax.view(height, width).T.contiguous().view(-1)
