"""Linear maps y = x W^T + b, dense or of codes, and the form in which a matrix is stored.

R = rows (out features), C = columns (in features).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from mixchat.base import gpu
from mixchat.base.safetensors import TensorSpec
from mixchat.kernels.cpu.compile import instruction_set
from mixchat.kernels.cpu.program import Step
from mixchat.kernels.cpu.quantized_matmul import (
    QuantizedMatrix,
    quantized_matmul,
    quantized_matmul_steps,
)
from mixchat.kernels.cpu.units import MANY
from mixchat.weights.matrix.int6 import INT6
from mixchat.weights.matrix.int8 import INT8
from mixchat.weights.matrix.mxfp4 import MXFP4
from mixchat.weights.matrix.nf4 import NF4, Quantized4bit
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
    "mxfp4": MXFP4,
    "int6": INT6,
    "int8": INT8,
    "none": DENSE,
}
Scales = Literal["absmax", "search", "calibrated", "given"]


def type_of_bits(bits: int) -> QuantType:
    """Return the type of new matrices with weights of `bits` bits."""
    return next(name for name, quantization in TYPES.items() if quantization.bits == bits)


class PackedLinear:
    """Codes that the kernels for CPUs multiply."""

    def __init__(self, matrix: QuantizedMatrix, rows: int) -> None:
        self.matrix = matrix
        self.rows = rows  # R, without the rows of zeros that some types store

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Return the addresses of codes, absmax and bias, 0 without one."""
        return self.matrix.addresses

    @property
    def form(self) -> Hashable:
        """Return a key. The steps of matrices with equal keys differ only in `addresses`."""
        matrix = self.matrix
        levels = 0 if matrix.levels is None else matrix.levels.data_ptr()
        return matrix.shape, matrix.units.bits, levels, matrix.bias is not None

    def steps(self, x: torch.Tensor, out: torch.Tensor) -> tuple[Step, Step]:
        """Return the steps of an exact product of x [N, C], which write `out` [N, R].

        The second one needs the first. They do not keep the matrix alive.
        """
        assert self.is_whole
        return quantized_matmul_steps(x, self.matrix, out, exact=True)

    @property
    def is_whole(self) -> bool:
        """Return whether no rows of zeros are stored, as steps need it."""
        return self.rows == self.matrix.shape[0]

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        result = quantized_matmul(x, self.matrix, exact=exact)
        return result if self.is_whole else result[..., : self.rows].contiguous()


class BiasedLinear:
    """A linear map with a bias [R], which is added to each row."""

    def __init__(self, linear: Linear, bias: torch.Tensor) -> None:
        self._linear = linear
        self._bias = bias

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        return self._linear(x, exact=exact).add_(self._bias)


def as_packed(matrix: Linear) -> PackedLinear:
    """Return a matrix that is known to be packed."""
    assert isinstance(matrix, PackedLinear)
    return matrix


@dataclass(frozen=True)
class LinearSpec:
    """The form in which a matrix is stored. Its bias, fp32 [R], comes after it."""

    name: str
    rows: int
    columns: int
    quant_type: QuantType
    dtype: torch.dtype  # of a dense matrix
    scales: Scales = "absmax"
    bias: bool = False

    @property
    def has_kernel(self) -> bool:
        """Return whether CPUs multiply the matrix with a kernel for codes."""
        return self.quant_type != "none"

    @property
    def can_be_exact(self) -> bool:
        """Return whether CPUs can compute this matrix batch-invariantly."""
        return self.has_kernel or TYPES[self.quant_type].can_be_exact(self.columns, self.dtype)

    @property
    def stored_rows(self) -> int:
        """Return the count of rows that `tensors` hold, with rows of zeros."""
        return TYPES[self.quant_type].stored_rows(self.rows)

    @property
    def _codes(self) -> BlockCodes:
        quantization = TYPES[self.quant_type]
        assert isinstance(quantization, BlockCodes)
        return quantization

    def arithmetic(self, device: torch.device, *, exact: bool) -> str:
        """Return a name of the arithmetic for many rows there. Equal names give equal bits."""
        if device.type != "cpu":
            return gpu.name(device)
        if self.quant_type == "none":
            return torch.backends.cpu.get_cpu_capability()
        instructions = instruction_set()
        assert instructions is not None
        unit = self._codes.units.unit_for(instructions, 1 if exact else MANY)
        return f"{unit.x_type} times levels to {unit.level_of_one}"

    @property
    def tensors(self) -> list[TensorSpec]:
        """Return the tensors that hold the matrix, in order. The bias is the last one."""
        shape = self.rows, self.columns
        bias = [TensorSpec(f"{self.name}.bias", torch.float32, (self.rows,))] if self.bias else []
        return TYPES[self.quant_type].tensors(self.name, shape, self.dtype) + bias

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def encode(
        self, weight: torch.Tensor, inputs: Inputs | None = None, bias: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Return the tensors that hold `weight` [R, C], with codes that suit the inputs.

        `bias` [R] is needed if the spec has one.
        """
        quantization = TYPES[self.quant_type]
        search = self.scales == "search"
        tensors = quantization.encode(weight, self.dtype, search=search, inputs=inputs)
        return self._with_bias(tensors, bias)

    def stack_quantized(
        self, matrices: Sequence[Quantized4bit], bias: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Return the tensors that hold these 4-bit matrices, one above the other.

        They have the type of the spec. absmax is rounded to the type's own. bias: [R].
        """
        quantization = self._codes
        assert sum(matrix.rows for matrix in matrices) == self.rows
        assert all(matrix.columns == self.columns for matrix in matrices)
        assert all(matrix.quantization is quantization for matrix in matrices)
        absmax = torch.cat([matrix.absmax for matrix in matrices]).to(quantization.scale_dtype)
        codes = torch.cat([matrix.codes for matrix in matrices])
        return self._with_bias(quantization.pack(codes, absmax, self.columns), bias)

    def _with_bias(
        self, tensors: list[torch.Tensor], bias: torch.Tensor | None
    ) -> list[torch.Tensor]:
        assert self.bias == (bias is not None)
        return tensors if bias is None else [*tensors, bias.float()]

    def build(self, tensors: Sequence[torch.Tensor]) -> Linear:
        """Return the map [..., C] to [..., R] over these tensors, which are used in place."""
        if not self.has_kernel or tensors[0].device.type != "cpu":
            linear = TYPES[self.quant_type].build(tensors, (self.rows, self.columns))
            return BiasedLinear(linear, tensors[-1]) if self.bias else linear
        shape = (self.stored_rows, self.columns)
        quantization = self._codes
        absmax, codes, bias = *tensors[:2], tensors[2] if self.bias else None
        # The kernel adds a bias to the rows of zeros, too.
        if bias is not None and shape[0] > self.rows:
            bias = functional.pad(bias, (0, shape[0] - self.rows))
        matrix = QuantizedMatrix(
            codes, absmax, quantization.level_table, shape, quantization.units, bias
        )
        return PackedLinear(matrix, self.rows)

    def dequantized(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the matrix [R, C] as `dtype`."""
        if self.quant_type == "none":
            return tensors[0]
        return self._codes.dequantize(tensors, (self.rows, self.columns), self.dtype)
