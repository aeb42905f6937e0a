"""Linear maps y = x W^T + b, dense or of codes, and the form in which a matrix is stored.

R = rows (out features), C = columns (in features).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional

from mixchat.base import gpu
from mixchat.base.errors import CheckpointError
from mixchat.base.safetensors import TensorSpec
from mixchat.kernels.cpu.compile import instruction_set
from mixchat.kernels.cpu.program import Step
from mixchat.kernels.cpu.quantized_matmul import (
    QuantizedMatrix,
    grouped_matmul_steps,
    quantized_matmul,
    quantized_matmul_steps,
)
from mixchat.kernels.cpu.units import MANY
from mixchat.weights.matrix.int6 import INT5, INT6
from mixchat.weights.matrix.int8 import INT8
from mixchat.weights.matrix.mxfp4 import MXFP4
from mixchat.weights.matrix.nf4 import FP4, NF4, Quantized4bit
from mixchat.weights.matrix.quant_type import (
    DENSE,
    BlockCodes,
    Inputs,
    Linear,
    QuantizationType,
    QuantType,
)
from mixchat.weights.matrix.trellis import TRELLIS2, TRELLIS3

# If types have the same bits, the first one is for new models.
TYPES: dict[QuantType, QuantizationType] = {
    "trellis2": TRELLIS2,
    "trellis3": TRELLIS3,
    "nf4": NF4,
    "fp4": FP4,
    "mxfp4": MXFP4,
    "int5": INT5,
    "int6": INT6,
    "int8": INT8,
    "none": DENSE,
}
Layout = Literal["bitsandbytes", "cpu-packed"]
Scales = Literal["absmax", "search", "calibrated", "given"]


def type_of_bits(bits: int, preferred: QuantType = "nf4") -> QuantType:
    """Return the type with weights of `bits` bits, `preferred` if it has them.

    A type that is only for experts is never preferred.
    """
    if TYPES[preferred].bits == bits and TYPES[preferred].for_dense_parts:
        return preferred
    return next(name for name, quantization in TYPES.items() if quantization.bits == bits)


class PackedLinear:
    """Codes in the layout of the kernel for CPUs."""

    def __init__(self, matrix: QuantizedMatrix, rows: int) -> None:
        self._matrix = matrix
        self.rows = rows  # R, without the rows of zeros that some types store

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Return the addresses of codes, absmax and bias, 0 without one."""
        return self._matrix.addresses

    def steps(self, x: torch.Tensor, out: torch.Tensor) -> tuple[Step, Step]:
        """Return the steps that write `__call__` of x [1, C] to `out` [1, R].

        The second one needs the first. They do not keep the matrix alive.
        """
        assert self.is_whole
        return quantized_matmul_steps(x, self._matrix, out)

    @property
    def is_whole(self) -> bool:
        """Return whether no rows of zeros are stored, as steps need it."""
        return self.rows == self._matrix.shape[0]

    @staticmethod
    def grouped_steps(
        matrices: Sequence[PackedLinear],
        x: torch.Tensor,
        outs: Sequence[torch.Tensor],
        x_rows: torch.Tensor | None = None,
        *,
        exact: bool,
    ) -> tuple[list[Step], list[list[Step]]]:
        """Return `grouped_matmul_steps` of these matrices."""
        assert matrices[0].is_whole
        quantized = [linear._matrix for linear in matrices]
        return grouped_matmul_steps(x, quantized, outs, x_rows, exact=exact)

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        result = quantized_matmul(x, self._matrix, exact=exact)
        return result if self.is_whole else result[..., : self.rows].contiguous()


class BiasedLinear:
    """A map and what it adds to each row, [R]."""

    def __init__(self, linear: Linear, bias: torch.Tensor) -> None:
        self._linear, self._bias = linear, bias

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        return self._linear(x, exact=exact).add_(self._bias)


def as_packed(matrix: Linear) -> PackedLinear:
    """Return a matrix that is known to be packed."""
    assert isinstance(matrix, PackedLinear)
    return matrix


@dataclass(frozen=True)
class LinearSpec:
    """The form in which a matrix is stored, and its bias, fp32 [R], after it."""

    name: str
    rows: int
    columns: int
    quant_type: QuantType
    layout: Layout  # requested for codes, which get it if they are `packed`
    dtype: torch.dtype  # of a dense matrix
    scales: Scales = "absmax"
    bias: bool = False

    @property
    def can_be_exact(self) -> bool:
        """Return whether CPUs can compute this matrix batch-invariantly."""
        return self.packed or TYPES[self.quant_type].can_be_exact(self.columns, self.dtype)

    @property
    def packed(self) -> bool:
        """Return whether the packed layout is requested and possible."""
        quantization = TYPES[self.quant_type]
        return self.layout == "cpu-packed" and quantization.can_pack(self.stored_rows, self.columns)

    @property
    def stored_rows(self) -> int:
        """Return the count of rows that `tensors` hold, with rows of zeros."""
        return TYPES[self.quant_type].stored_rows(self.rows, self.columns)

    @property
    def _codes(self) -> BlockCodes:
        quantization = TYPES[self.quant_type]
        assert isinstance(quantization, BlockCodes)
        return quantization

    def arithmetic(self, device: torch.device, *, exact: bool) -> str:
        """Return a name for how many rows are computed there. If it is equal, so are the bits."""
        instructions = instruction_set()
        if device.type != "cpu":
            return gpu.name(device)
        if not self.packed or instructions is None:
            return torch.backends.cpu.get_cpu_capability()
        unit = self._codes.units.unit_for(instructions, 1 if exact else MANY)
        return "bytes" if unit.x_type.width == 8 else "words"

    @property
    def tensors(self) -> list[TensorSpec]:
        """Return the tensors that hold the matrix, in order. The bias is the last one."""
        shape = self.rows, self.columns
        bias = [TensorSpec(f"{self.name}.bias", torch.float32, (self.rows,))] if self.bias else []
        return TYPES[self.quant_type].tensors(self.name, shape, self.dtype) + bias

    def encode(
        self,
        weight: torch.Tensor,
        inputs: Inputs | None = None,
        bias: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Return the tensors that hold `weight` [R, C], with codes that suit the inputs.

        `bias` [R] is needed if the spec has one.
        """
        quantization, search = TYPES[self.quant_type], self.scales == "search"
        tensors = quantization.encode(weight, self.dtype, search=search, inputs=inputs)
        return self._arranged(tensors, bias)

    def stack_quantized(
        self, matrices: Sequence[Quantized4bit], bias: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Return the tensors that hold these 4-bit matrices, one above the other.

        absmax is rounded to the type's own. Raises `CheckpointError` if one has another type, or
        ends within a block and is not the last.
        """
        quantization = self._codes
        assert sum(matrix.rows for matrix in matrices) == self.rows
        assert all(matrix.columns == self.columns for matrix in matrices)
        for matrix in matrices:
            if matrix.quantization is not quantization:
                name = matrix.quantization.name
                raise CheckpointError(f"{self.name}: a part of it is {name}, not {self.quant_type}")
        block = quantization.blocksize
        if any(matrix.rows * matrix.columns % block for matrix in matrices[:-1]):
            raise CheckpointError(
                f"{self.name}: a part of it does not end with a whole block of {block} weights"
            )
        absmax = torch.cat([matrix.absmax for matrix in matrices]).to(quantization.scale_dtype)
        return self._arranged([absmax, torch.cat([matrix.codes for matrix in matrices])], bias)

    def _arranged(
        self, tensors: list[torch.Tensor], bias: torch.Tensor | None
    ) -> list[torch.Tensor]:
        assert self.bias == (bias is not None)
        arranged = self._reordered(tensors, packed=True) if self.packed else tensors
        return arranged if bias is None else [*arranged, bias.float()]

    def _reordered(self, tensors: Sequence[torch.Tensor], *, packed: bool) -> list[torch.Tensor]:
        absmax, codes, *bias = tensors
        quantization = self._codes
        reorder = quantization.to_packed_layout if packed else quantization.to_bitsandbytes_layout
        codes, absmax = reorder(codes, absmax, self.stored_rows, self.columns)
        return [absmax, codes, *bias]

    def build(self, tensors: Sequence[torch.Tensor], *, in_place: bool = True) -> Linear:
        """Return the map over these tensors.

        With `in_place` they are used as they are. Otherwise absmax may be copied to an order that
        is read faster.
        """
        if self.bias and not self.packed:
            return BiasedLinear(replace(self, bias=False).build(tensors[:-1]), tensors[-1])
        if not self.packed:
            return TYPES[self.quant_type].build(tensors, (self.rows, self.columns))
        shape, quantization = (self.stored_rows, self.columns), self._codes
        absmax, codes, bias = *tensors[:2], tensors[2] if self.bias else None
        # The kernel adds a bias to the rows of zeros, too.
        if bias is not None and shape[0] > self.rows:
            bias = functional.pad(bias, (0, shape[0] - self.rows))
        matrix = QuantizedMatrix(
            codes, absmax, quantization.level_table, shape, quantization.units, bias
        )
        return PackedLinear(matrix if in_place else matrix.of_bands, self.rows)

    def dequantized(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the matrix [R, C] as `dtype`, the same in each layout."""
        absmax, codes, *_ = self._reordered(tensors, packed=False) if self.packed else tensors
        return self._codes.dequantize(codes, absmax, (self.rows, self.columns), self.dtype)

    def convert(self, tensors: Sequence[torch.Tensor], to: LinearSpec) -> None:
        """Rewrite these tensors in place in the layout of `to`. Lossless."""
        if self.packed == to.packed:
            return
        for tensor, new in zip(tensors, self._reordered(tensors, packed=to.packed), strict=True):
            tensor.copy_(new)
