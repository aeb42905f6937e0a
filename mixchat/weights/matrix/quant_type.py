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

QuantType = Literal["nf4", "mxfp4", "int6", "int8", "trellis2", "trellis3", "none"]
Shape = tuple[int, int]  # R, C
Encoded = tuple[torch.Tensor, torch.Tensor]  # codes and absmax
RecordRows = Callable[[torch.Tensor], object]
Way = Literal["plain", "weighted", "gptq"]  # the way to choose codes and scales for inputs


class Inputs(NamedTuple):
    """Inputs of a matrix, for which its codes are chosen."""

    fit: torch.Tensor  # inputs [n, C] for which each way chooses codes
    held_out: torch.Tensor  # other inputs [m, C], which decide between the ways
    # Called with the chosen way, and with the sums of squared errors of products with `held_out`,
    # for this way and for the plain one.
    chosen: Callable[[Way, float, float], object]
    # `fit` and `held_out` as they would be if no matrix before this one was rounded. The products
    # of the rounded matrix should come near to products with these inputs.
    exact: tuple[torch.Tensor, torch.Tensor] | None = None


class Linear(Protocol):
    """A map from [..., C] to [..., R].

    `exact` means batch invariant. A token's result then has the same bits, whatever other tokens
    are computed with it, if `LinearSpec.can_be_exact`.
    """

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor: ...


class QuantizationType(ABC):
    """A type of matrices [R, C]. It makes their tensors of weights, and computes with them."""

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

    def fits(self, columns: int, part_rows: int = 0) -> bool:
        """Return whether a matrix of C columns can have the type.

        part_rows: the rows of each of its parts, if they are used apart.
        """
        return True

    def stored_rows(self, rows: int) -> int:
        """Return the count of rows that are stored for R rows, with rows of zeros."""
        return rows

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
        """Return the tensors that hold `weight` [R, C].

        With `search`, scales are searched. With `inputs`, codes suit them. Some types ignore both.
        """

    @abstractmethod
    def build(self, tensors: Sequence[torch.Tensor], shape: Shape) -> Linear:
        """Return the map from [..., C] to [..., R] over these tensors, which are used in place."""


def dense_linear(weight: torch.Tensor) -> Linear:
    """Return the map of a dense matrix [R, C]."""
    return functools.partial(dense_matmul, weight=weight)


class RecordingLinear:
    """Lets another map compute, and records its input."""

    def __init__(self, linear: Linear, record: RecordRows) -> None:
        self._linear = linear
        self._record = record

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        self._record(x)
        return self._linear(x, exact=exact)


class _DenseType(QuantizationType):
    name = "none"
    bits = 16

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
    """Codes with one scale (`absmax`) for each block of weights.

    Their order is the same on disk and in every memory. Bands of 32 rows (64 in a trellis) come one
    after the other, and within a band the rows are interleaved, as the kernels read them. Rows of
    zeros fill up the last band, so that S rows are stored. A thread reads codes and scales as two
    streams: `absmax` is [S / band, C / blocksize, band].

    Codes are in the order of the rows only while a model is made. `pack` orders them.
    """

    units: UnitSet  # of the kernel
    levels: torch.Tensor | None = None  # by code; None if codes are numbers themselves
    codes_dtype = torch.uint8
    scale_dtype = torch.bfloat16

    @functools.cached_property
    def level_table(self) -> torch.Tensor | None:
        return None if self.levels is None else self.units.level_tables(self.levels)

    def fits(self, columns: int, part_rows: int = 0) -> bool:
        return columns % self.blocksize == 0 and part_rows % self.units.band == 0

    def stored_rows(self, rows: int) -> int:
        return -(-rows // self.units.band) * self.units.band

    def tensors(self, name: str, shape: Shape, dtype: torch.dtype) -> list[TensorSpec]:
        """Return absmax and codes. absmax is first, so that it is aligned."""
        weights = self.stored_rows(shape[0]) * shape[1]
        return [
            TensorSpec(f"{name}.absmax", self.scale_dtype, (weights // self.blocksize,)),
            TensorSpec(f"{name}.codes", self.codes_dtype, (weights * self.bits // 8,)),
        ]

    def encode(
        self, weight: torch.Tensor, dtype: torch.dtype, *, search: bool, inputs: Inputs | None
    ) -> list[torch.Tensor]:
        codes, absmax = self.codes(weight, search=search, inputs=inputs)
        return self.pack(codes, absmax, weight.shape[1])

    def build(self, tensors: Sequence[torch.Tensor], shape: Shape) -> Linear:
        """Return the map [..., C] to [..., R] for devices without a kernel. It is slow."""

        def multiply(x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
            pieces = self.rows_of(tensors, shape, x.dtype)
            return torch.cat([dense_matmul(x, piece, exact=exact) for piece in pieces], dim=-1)

        return multiply

    @abstractmethod
    def codes(
        self, weight: torch.Tensor, *, search: bool = False, inputs: Inputs | None = None
    ) -> Encoded:
        """Return flat codes and absmax of `weight` [R, C], in the order of the rows.

        The weights are finite floats on the CPU.
        """

    @abstractmethod
    def packed(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        """Return flat codes of some bands in the order of the kernels, in any shape and type."""

    @abstractmethod
    def decode(self, codes: torch.Tensor, columns: int) -> torch.Tensor:
        """Return the numbers of some bands before their scale, fp32 [rows, C]."""

    def scales(self, absmax: torch.Tensor) -> torch.Tensor:
        """Return the factors of the decoded numbers, fp32, in the shape of `absmax`."""
        return absmax.float()

    def packed_scales(self, absmax: torch.Tensor) -> torch.Tensor:
        """Return scales [bands, band, C / blocksize] in the order of the kernels."""
        return absmax.transpose(1, 2)

    def unpacked_scales(self, absmax: torch.Tensor) -> torch.Tensor:
        """Undo `packed_scales`: from [bands, C / 64, band] to [bands, band, C / 64]."""
        return absmax.transpose(1, 2)

    def pack(self, codes: torch.Tensor, absmax: torch.Tensor, columns: int) -> list[torch.Tensor]:
        """Return the tensors that hold flat codes and absmax, which are in the order of the rows.

        codes: [R * C * bits / 8] bytes. absmax: [R * C / blocksize]. Rows of zeros are added.
        """
        rows = self.stored_rows(len(absmax) * self.blocksize // columns)
        scales = _filled_up(absmax, rows * columns // self.blocksize)
        scales = scales.view(-1, self.units.band, columns // self.blocksize)
        result = codes.new_empty(rows * columns * self.bits // 8)
        # Only some bands are packed at a time, which bounds the memory.
        band = columns * self.units.band  # weights
        size = max(1, _REORDERED // band) * band * self.bits // 8
        for old, new in zip(torch.split(codes, size), torch.split(result, size), strict=True):
            packed = self.packed(_filled_up(old, len(new)), columns)
            new.view(packed.dtype).view(packed.shape).copy_(packed)
        return [self.packed_scales(scales).reshape(-1), result]

    def rows_of(
        self, tensors: Sequence[torch.Tensor], shape: Shape, dtype: torch.dtype
    ) -> Iterator[torch.Tensor]:
        """Yield the matrix as `dtype`, some bands at a time, [n, C]."""
        (rows, columns), band, (absmax, codes) = shape, self.units.band, tensors[:2]
        count = max(1, _PIECE // (columns * band)) * band  # rows
        blocks = columns // self.blocksize
        for start, piece, own in zip(
            range(0, rows, count),
            torch.split(codes, count * columns * self.bits // 8),
            torch.split(absmax, count * blocks),
            strict=True,
        ):
            of_bands = self.scales(own).view(-1, blocks, band)
            scale = self.unpacked_scales(of_bands).reshape(-1, blocks, 1)
            numbers = self.decode(piece, columns).view(*scale.shape[:2], self.blocksize)
            weight = (numbers * scale).view(-1, columns)
            yield weight[: rows - start].to(dtype)

    def dequantize(
        self, tensors: Sequence[torch.Tensor], shape: Shape, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the matrix [R, C] of absmax and codes as `dtype`."""
        weight = torch.empty(shape, dtype=dtype, device=tensors[0].device)
        start = 0
        for rows in self.rows_of(tensors, shape, dtype):
            weight[start : start + len(rows)] = rows
            start += len(rows)
        return weight


@functools.cache
def on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a constant on a device, which keeps the copy. Another copy would wait for a GPU."""
    return table.to(device)


def _filled_up(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Return `count` numbers, with zeros at the end."""
    return functional.pad(tensor, (0, count - len(tensor))) if count > len(tensor) else tensor
