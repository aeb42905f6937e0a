"""Random matrices for the kernels of GPUs, of each type of codes, with what they stand for."""

from typing import Any, NamedTuple

import pytest
import torch

from mixchat.base.safetensors import TensorSpec
from mixchat.kernels.gpu import codes as coded
from mixchat.kernels.gpu.product import Form, Matrix
from mixchat.weights.matrix.linear import TYPES, LinearSpec
from mixchat.weights.matrix.quant_type import QuantType

CODED: tuple[QuantType, ...] = tuple(name for name in TYPES if name != "none")
each_type = pytest.mark.parametrize("quant_type", TYPES)


class Stored(NamedTuple):
    """A matrix as it is stored, and its dense numbers in fp64 with its bias."""

    spec: LinearSpec
    tensors: list[torch.Tensor]
    dense: torch.Tensor
    bias: torch.Tensor | None

    @property
    def form(self) -> Form:
        spec = self.spec
        return Form(
            spec.quant_type,
            spec.rows,
            spec.stored_rows,
            spec.columns,
            spec.dtype == torch.float32,
        )

    @property
    def matrix(self) -> Matrix:
        absmax, codes = (
            self.tensors[:2] if self.spec.quant_type != "none" else (None, self.tensors[0])
        )
        levels = levels_of(self.spec.quant_type)
        return Matrix(self.form, codes, absmax, levels, self.bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product with x in fp64."""
        product = x.double() @ self.dense.T
        return product if self.bias is None else product + self.bias


def levels_of(quant_type: QuantType) -> torch.Tensor | None:
    levels = getattr(TYPES[quant_type], "levels", None)
    return None if levels is None else coded.level_table(levels)


def stored(
    quant_type: QuantType,
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = False,
    seed: int = 0,
) -> Stored:
    """Return a random matrix. Codes are any bits, since all mean something."""
    spec = spec_of(rows, columns, quant_type, dtype, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    tensors = [_random(tensor, quant_type, generator) for tensor in spec.tensors]
    in_fp32 = spec_of(rows, columns, quant_type, torch.float32)
    dense = tensors[0] if quant_type == "none" else in_fp32.dequantized(tensors[:2])
    return Stored(spec, tensors, dense.double(), tensors[-1] if bias else None)


def spec_of(
    rows: int, columns: int, quant_type: QuantType, dtype: torch.dtype, *, bias: bool = False
) -> LinearSpec:
    return LinearSpec("m", rows, columns, quant_type, dtype, bias=bias)


def _random(tensor: TensorSpec, quant_type: QuantType, generator: Any) -> torch.Tensor:
    """Return codes, scales or numbers. Scales in a byte are near 1."""
    first, end = 0, 256
    if tensor.name.endswith("absmax") and tensor.dtype == torch.uint8:
        # 0 is a scale, too: that of a block of zeros.
        first, end = (112, 126) if quant_type == "mxfp4" else (180, 210)
    if not tensor.dtype.is_floating_point:
        numbers = torch.randint(first, end, tensor.shape, generator=generator, dtype=torch.int16)
        if tensor.dtype == torch.int8:
            return numbers.sub_(128).clamp_(-127).to(torch.int8)
        numbers.view(-1)[0] = 0
        return numbers.to(torch.uint8)
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
