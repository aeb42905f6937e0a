"""Random matrices for the kernel, of each type of codes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mixchat.kernels.cpu import quantized_matmul as kernel
from mixchat.kernels.cpu.quantized_matmul import QuantizedMatrix
from mixchat.weights.matrix.int6 import INT6
from mixchat.weights.matrix.int8 import INT8
from mixchat.weights.matrix.mxfp4 import MXFP4
from mixchat.weights.matrix.nf4 import NF4
from mixchat.weights.matrix.quant_type import BlockCodes
from mixchat.weights.matrix.trellis import TRELLIS2, TRELLIS3

EVEN = (INT8, INT6)  # levels, with x in 15 bits and a sign if not in bytes
IN_BYTES = (TRELLIS2, TRELLIS3)  # for any count of tokens
TYPES = {kind.name: kind for kind in (NF4, MXFP4, *EVEN, *IN_BYTES)}
each_type = pytest.mark.parametrize("kind", TYPES.values(), ids=list(TYPES))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def three_threads() -> Iterator[None]:
    """Let kernels run on three threads instead of the one that the tests use."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class Matrix:
    """A random matrix: packed, and as the numbers that its codes stand for."""

    def __init__(self, rows: int, columns: int, kind: BlockCodes = NF4) -> None:
        self.rows = kind.stored_rows(rows)
        shape = self.rows, columns
        absmax, codes = kind.pack(*kind.codes(random(*shape).bfloat16()), columns)
        self.exact = kind.dequantize([absmax, codes], shape, torch.float32).double()
        self.packed = QuantizedMatrix(codes, absmax, kind.level_table, shape, kind.units)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return kernel.quantized_matmul(x, self.packed)
