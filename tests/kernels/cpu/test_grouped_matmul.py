"""Products of several matrices in one program, against each by itself."""

import pytest
import torch
from matmul_tools import Matrix, each_type, random, three_threads

from mixchat.kernels.cpu import quantized_matmul as kernel
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.kernels.cpu.program import Program, together
from mixchat.kernels.cpu.units import MANY
from mixchat.weights.matrix.quant_type import BlockCodes

pytestmark = pytest.mark.skipif(not kernels_available(), reason="the kernel needs AVX2")


@each_type
@pytest.mark.parametrize("exact", [False, True])
def test_products_that_are_computed_together_have_the_bits_that_they_have_alone(
    kind: BlockCodes, exact: bool
) -> None:
    # These take other instructions by turns, and are more than the trellises that share a stage.
    counts = 40, MANY + 1, 3, MANY, 1, 10, 1, 2, 30, 5
    matrices = [Matrix(192, 128, kind).packed for _ in counts]
    for seed, matrix in enumerate(matrices):
        matrix.absmax.copy_(matrix.absmax.roll(seed))
    x = random(50, 128, seed=1).bfloat16()
    numbers = torch.randint(50, (sum(counts),), generator=torch.Generator().manual_seed(2))
    outs = [torch.empty(count, 192, dtype=x.dtype) for count in counts]
    with three_threads():
        rounds, products = kernel.grouped_matmul_steps(x, matrices, outs, numbers, exact=exact)
        Program([together(*steps) for steps in (rounds, *products)]).run()
    rows = torch.split(x[numbers], counts)
    for matrix, some, out in zip(matrices, rows, outs, strict=True):
        assert torch.equal(out, kernel.quantized_matmul(some, matrix, exact=exact))
