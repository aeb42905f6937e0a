"""A linear map y = x W^T whose matrix is dense or NF4: how it is stored, and how it is computed.

R = rows (out features), C = columns (in features).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch.nn import functional

from mixchat.weights import nf4
from mixchat.weights.safetensors import TensorSpec

QuantType = Literal["nf4", "none"]
Layout = Literal["bitsandbytes", "cpu-packed"]


class Linear(Protocol):
    """Maps [..., C] to [..., R]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class DenseLinear:
    """A matrix as it is: weight [R, C]."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight)


class NF4Linear:
    """NF4 in bitsandbytes' own layout: right on every device, slow on a CPU."""

    def __init__(self, codes: torch.Tensor, absmax: torch.Tensor, rows: int, columns: int) -> None:
        self._codes, self._absmax, self._shape = codes, absmax, (rows, columns)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # The bytes under `absmax` change when another expert moves into the slot: widen them now.
        state = nf4.quant_state(self._absmax.float(), *self._shape, dtype=x.dtype)
        return nf4.matmul(x, self._codes, state)


class PackedNF4Linear:
    """NF4 in the layout of the AVX512-BF16 kernel: as fast as memory can be read."""

    def __init__(self, codes: torch.Tensor, absmax: torch.Tensor, rows: int, columns: int) -> None:
        self._codes = codes
        scales = absmax.view(columns // nf4.BLOCKSIZE, rows)
        self._state = nf4.quant_state(scales, rows, columns)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nf4.matmul_packed(x, self._codes, self._state)


@dataclass(frozen=True)
class LinearSpec:
    """How a matrix is stored. `dtype` is that of a dense one; `layout` the wish for an NF4 one."""

    name: str
    rows: int
    columns: int
    quant_type: QuantType
    layout: Layout
    dtype: torch.dtype

    @property
    def packed(self) -> bool:
        """Whether the codes are in the packed layout: wished for, and the shape allows it."""
        wished = self.quant_type == "nf4" and self.layout == "cpu-packed"
        return wished and nf4.can_pack(self.rows, self.columns)

    @property
    def tensors(self) -> list[TensorSpec]:
        """The tensors that hold the matrix, in their order (absmax first keeps it aligned)."""
        if self.quant_type == "none":
            return [TensorSpec(f"{self.name}.weight", self.dtype, (self.rows, self.columns))]
        codes = nf4.codes_size(self.rows, self.columns)
        scales = nf4.absmax_size(self.rows, self.columns)
        return [
            TensorSpec(f"{self.name}.absmax", torch.bfloat16, (scales,)),
            TensorSpec(f"{self.name}.codes", torch.uint8, (codes,)),
        ]

    def encode(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """The tensors that hold `weight` [R, C]."""
        if self.quant_type == "none":
            return [weight.to(self.dtype)]
        codes, absmax = nf4.quantize(weight)
        if self.packed:
            codes, absmax = nf4.pack(codes, absmax, self.rows, self.columns)
        return [absmax, codes]

    def build(self, tensors: Sequence[torch.Tensor]) -> Linear:
        """The map over these tensors, which are used in place."""
        if self.quant_type == "none":
            return DenseLinear(tensors[0])
        kind = PackedNF4Linear if self.packed else NF4Linear
        absmax, codes = tensors
        return kind(codes, absmax, self.rows, self.columns)

    def convert(self, tensors: Sequence[torch.Tensor], to: LinearSpec) -> None:
        """Rewrite these tensors in place from this layout to that of `to`; nothing is lost."""
        if self.packed == to.packed:
            return
        reorder = nf4.unpack if self.packed else nf4.pack
        absmax, codes = tensors
        new_codes, new_absmax = reorder(codes, absmax, self.rows, self.columns)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)
