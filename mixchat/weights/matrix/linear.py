"""Linear maps y = x W^T whose matrix is dense or of codes: how they are stored and computed.

R = rows (out features), C = columns (in features).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch.nn import functional

from mixchat.base import gpu
from mixchat.base.errors import CheckpointError
from mixchat.base.safetensors import TensorSpec
from mixchat.kernels import dense, quantized_matmul, rows
from mixchat.kernels.compile import instruction_set, multiplies_bf16
from mixchat.kernels.program import Step
from mixchat.kernels.units import MANY, Bits, level_tables, unit_for
from mixchat.weights.matrix import int8, nf3, nf4
from mixchat.weights.matrix.blocks import BLOCKSIZE, RowsOf, absmax_size, can_pack, dequantize
from mixchat.weights.matrix.bnb_format import Quantized4bit
from mixchat.weights.matrix.encode import encode_nf3, encode_nf4
from mixchat.weights.matrix.gptq import Inputs

QuantType = Literal["nf3", "nf4", "fp4", "int8", "none"]
Layout = Literal["bitsandbytes", "cpu-packed"]
Scales = Literal["absmax", "search", "calibrated", "given"]


_MANY = 32  # tokens from which on it pays to widen the weights to fp32
_WIDENED = 2**23  # weights that are widened at once


class Linear(Protocol):
    """A map from [..., C] to [..., R].

    `exact` means batch invariant: where `LinearSpec.can_be_exact`, a token's result has the same
    bits however many are computed with it. One alone is always computed like that.
    """

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor: ...


class _Codes(Protocol):
    """The interface that the modules of the types of codes have in common."""

    BITS: Bits

    def stored_rows(self, rows: int, columns: int) -> int: ...
    def codes_size(self, rows: int, columns: int) -> int: ...
    def to_packed_layout(
        self, codes: torch.Tensor, absmax: torch.Tensor, rows: int, columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    def to_bitsandbytes_layout(
        self, codes: torch.Tensor, absmax: torch.Tensor, rows: int, columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


_LEVELS: dict[QuantType, torch.Tensor] = {
    "nf3": nf3.LEVELS,
    "nf4": nf4.LEVELS["nf4"],
    "fp4": nf4.LEVELS["fp4"],
}
_CODES: dict[QuantType, _Codes] = {"nf3": nf3, "nf4": nf4, "fp4": nf4, "int8": int8}


class DenseLinear:
    """A dense matrix: weight [R, C]."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        tokens = x.shape[:-1].numel()
        if (exact or tokens == 1) and dense.can_multiply(x, self._weight):
            return dense.exact_matmul(x, self._weight)
        if x.device.type != "cpu" or x.dtype == torch.float32:
            return functional.linear(x, self._weight)
        if tokens == 1:
            with _without_onednn():
                return functional.linear(x, self._weight)
        # Hardly any CPU has instructions for fp16.
        if tokens >= _MANY and (x.dtype == torch.float16 or not multiplies_bf16()):
            return self._in_fp32(x)
        return functional.linear(x, self._weight)

    def _in_fp32(self, x: torch.Tensor) -> torch.Tensor:
        """Compute in fp32: on CPUs without instructions for 16 bits it is up to four times as fast.

        Some rows at a time, to have no fp32 copy of the whole matrix in memory.
        """
        wide, height = x.float(), max(1, _WIDENED // self._weight.shape[1])
        pieces = (
            functional.linear(wide, piece.float()) for piece in torch.split(self._weight, height)
        )
        return torch.cat([piece.to(x.dtype) for piece in pieces], dim=-1)


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Compute without oneDNN.

    For one token in bf16, torch's own product is as fast as memory can be read; oneDNN's is half as
    fast on CPUs with AVX512-BF16. `torch.backends.mkldnn.flags` warns about GPUs.
    """
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


class FourBitLinear:
    """4-bit codes in bitsandbytes' own layout: correct on every device, slow on a CPU."""

    def __init__(
        self,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        shape: tuple[int, int],
        quant_type: nf4.FourBit,
    ) -> None:
        self._codes, self._absmax, self._shape = codes, absmax, shape
        self._quant_type = quant_type

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        # Not earlier: the bytes of `absmax` change when another expert moves into the slot.
        absmax = self._absmax.float()
        return nf4.bitsandbytes_matmul(x, self._codes, absmax, self._shape, self._quant_type)


class RowsLinear:
    """Codes row after row, which are dequantized first: right on every device, slow on a CPU.

    Some rows at a time get the type of x: there is no such copy of the whole matrix.
    """

    def __init__(
        self, codes: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int], rows_of: RowsOf
    ) -> None:
        self._codes, self._absmax, self._shape, self._rows_of = codes, absmax, shape, rows_of

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        pieces = self._rows_of(self._codes, self._absmax, self._shape, x.dtype)
        return torch.cat([DenseLinear(piece)(x, exact=exact) for piece in pieces], dim=-1)


class PackedLinear:
    """Codes in the layout of the kernel for CPUs: as fast as memory can be read."""

    def __init__(self, codes: torch.Tensor, absmax: torch.Tensor, spec: LinearSpec) -> None:
        self._codes, self._absmax, self._rows = codes, absmax, spec.rows
        self._shape = (spec.stored_rows, spec.columns)
        self._levels, self._bits = _level_tables(spec.quant_type), _CODES[spec.quant_type].BITS

    @property
    def rows(self) -> int:
        """Return R, without rows of zeros."""
        return self._rows

    @property
    def addresses(self) -> tuple[int, int]:
        """Return the addresses of codes and absmax."""
        return self._codes.data_ptr(), self._absmax.data_ptr()

    def steps(self, x: torch.Tensor, out: torch.Tensor) -> tuple[Step, Step]:
        """Return the steps that write x [1, C] times the matrix to `out` [1, R].

        The second one needs the first. They do not keep the matrix alive. None has rows of zeros.
        """
        assert out.shape[-1] == self._shape[0]
        return quantized_matmul.matmul_steps(
            x,
            self._codes,
            self._absmax,
            self._levels,
            self._shape,
            self._bits,
            out,
        )

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        result = quantized_matmul.packed_matmul(
            x,
            self._codes,
            self._absmax,
            self._levels,
            self._shape,
            self._bits,
            exact=exact,
        )
        if self._rows == self._shape[0]:
            return result
        return result[..., : self._rows].contiguous()  # without those of zeros


def as_packed(matrix: Linear) -> PackedLinear:
    """Return a matrix that is known to be packed."""
    assert isinstance(matrix, PackedLinear)
    return matrix


@functools.cache
def _level_tables(quant_type: QuantType) -> torch.Tensor | None:
    """Return the levels in the form that the kernel reads: the same for every matrix."""
    levels = _LEVELS.get(quant_type)
    return None if levels is None else level_tables(levels)


@dataclass(frozen=True)
class LinearSpec:
    """The form in which a matrix is stored.

    `dtype` is that of a dense matrix; `layout` is requested for a matrix of codes, and `packed`
    says whether it gets it.
    """

    name: str
    rows: int
    columns: int
    quant_type: QuantType
    layout: Layout
    dtype: torch.dtype
    scales: Scales = "absmax"

    @property
    def can_be_exact(self) -> bool:
        """Return whether the kernels for CPUs can compute this matrix batch-invariantly."""
        if self.quant_type != "none":
            return self.packed
        return rows.can_compute(self.dtype, self.columns)

    @property
    def packed(self) -> bool:
        """Return whether the packed layout is requested, and possible for the shape."""
        requested = self.quant_type != "none" and self.layout == "cpu-packed"
        return requested and can_pack(self.stored_rows, self.columns)

    @property
    def stored_rows(self) -> int:
        """Return the count of rows that `tensors` hold: with 8 bits, some more can be of zeros."""
        if self.quant_type == "none":
            return self.rows
        return _CODES[self.quant_type].stored_rows(self.rows, self.columns)

    def arithmetic(self, device: torch.device, *, exact: bool) -> str:
        """Return a name for how many rows are computed there: alike, they have the same bits.

        The kernels add up integers, so they do not depend on the width of a CPU's registers.
        """
        instructions = instruction_set()
        if device.type != "cpu":
            return gpu.name(device)
        if not self.packed or instructions is None:
            return torch.backends.cpu.get_cpu_capability()
        bits = _CODES[self.quant_type].BITS
        unit = unit_for(instructions, bits, 1 if exact else MANY)
        return "bytes" if unit.x_type.width == 8 else "words"

    @property
    def tensors(self) -> list[TensorSpec]:
        """Return the tensors that hold the matrix, in order (absmax first keeps it aligned)."""
        if self.quant_type == "none":
            return [TensorSpec(f"{self.name}.weight", self.dtype, (self.rows, self.columns))]
        scales = absmax_size(self.stored_rows, self.columns)
        codes = _CODES[self.quant_type].codes_size(self.stored_rows, self.columns)
        kind = torch.int8 if self.quant_type == "int8" else torch.uint8
        return [
            TensorSpec(f"{self.name}.absmax", torch.bfloat16, (scales,)),
            TensorSpec(f"{self.name}.codes", kind, (codes,)),
        ]

    def encode(self, weight: torch.Tensor, inputs: Inputs | None = None) -> list[torch.Tensor]:
        """Return the tensors that hold `weight` [R, C].

        inputs: codes of 3 or 4 bits are chosen for the least error of products with them.
        """
        if self.quant_type == "none":
            return [weight.to(self.dtype)]
        if self.quant_type == "int8":
            return self._arranged(*int8.encode_int8(weight))
        if self.quant_type == "fp4":
            return self._arranged(*nf4.encode_fp4(weight))
        if self.quant_type == "nf3":
            return self._arranged(*encode_nf3(weight, inputs=inputs))
        search = self.scales == "search"
        return self._arranged(*encode_nf4(weight, search=search, inputs=inputs))

    def stack_quantized(self, matrices: Sequence[Quantized4bit]) -> list[torch.Tensor]:
        """Return the tensors that hold these 4-bit matrices, one above the other, as they are.

        Their rows add up to R, each has C columns. No code changes; absmax is rounded to bf16.
        Raises `CheckpointError` where one is of another type than this, or where one above another
        does not end with a whole block.
        """
        assert sum(matrix.rows for matrix in matrices) == self.rows
        assert all(matrix.columns == self.columns for matrix in matrices)
        for matrix in matrices:
            if matrix.quant_type != self.quant_type:
                raise CheckpointError(
                    f"{self.name}: a part of it is {matrix.quant_type}, not {self.quant_type}"
                )
        if any(matrix.rows * matrix.columns % BLOCKSIZE for matrix in matrices[:-1]):
            raise CheckpointError(
                f"{self.name}: a part of it does not end with a whole block of 64 weights"
            )
        absmax = nf4.round_absmax(torch.cat([matrix.absmax for matrix in matrices]))
        return self._arranged(torch.cat([matrix.codes for matrix in matrices]), absmax)

    def _arranged(self, codes: torch.Tensor, absmax: torch.Tensor) -> list[torch.Tensor]:
        return self._reordered(codes, absmax, True) if self.packed else [absmax, codes]

    def _reordered(
        self, codes: torch.Tensor, absmax: torch.Tensor, packed: bool
    ) -> list[torch.Tensor]:
        """Return absmax and codes in the packed layout, or out of it."""
        how = _CODES[self.quant_type]
        reorder = how.to_packed_layout if packed else how.to_bitsandbytes_layout
        codes, absmax = reorder(codes, absmax, self.stored_rows, self.columns)
        return [absmax, codes]

    def build(self, tensors: Sequence[torch.Tensor]) -> Linear:
        """Return the map over these tensors, which are used in place."""
        if self.quant_type == "none":
            return DenseLinear(tensors[0])
        absmax, codes = tensors
        if self.packed:
            return PackedLinear(codes, absmax, self)
        if self.quant_type == "int8" or self.quant_type == "nf3":
            rows_of = int8.rows_of if self.quant_type == "int8" else nf3.rows_of
            return RowsLinear(codes, absmax, (self.rows, self.columns), rows_of)
        return FourBitLinear(codes, absmax, (self.rows, self.columns), self.quant_type)

    def dequantized(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the matrix [R, C] as `dtype`, out of 8-bit codes that are not `packed`.

        On a GPU that has room for it, `DenseLinear` is faster with it.
        """
        assert self.quant_type == "int8"
        assert not self.packed
        absmax, codes = tensors
        shape = (self.rows, self.columns)
        return dequantize(int8.rows_of, codes, absmax, shape, self.dtype)

    def convert(self, tensors: Sequence[torch.Tensor], to: LinearSpec) -> None:
        """Rewrite these tensors in place from this layout to that of `to`; nothing is lost."""
        if self.packed == to.packed:
            return
        absmax, codes = tensors
        new_absmax, new_codes = self._reordered(codes, absmax, to.packed)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)
