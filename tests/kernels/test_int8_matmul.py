"""The kernel for 8-bit codes against the product in double precision, for each unit.

The unit for AVX-512 is tested on every CPU: its one instruction is emulated, and LLVM cuts its
vectors in halves.
"""

import pytest
import torch
from matmul_tools import AnyCodes, error, random

from mixchat.kernels import quantized_matmul
from mixchat.kernels.compile import instruction_set, kernels_available
from mixchat.kernels.emit import Value, i16, i32, vector
from mixchat.kernels.units import WORDS, Avx512Int8
from mixchat.weights.matrix import int8
from mixchat.weights.matrix.linear import LinearSpec

pytestmark = pytest.mark.skipif(not kernels_available(), reason="the kernel needs AVX2")

WITHIN = 7e-5  # of the result: x has 15 bits and a sign
TOKENS = (1, 2, 3, 4, 7, 8, 13, 16, 33, 70)


class Emulated(Avx512Int8):
    """The unit for AVX-512, in instructions of any CPU."""

    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        wide = vector(i32, 32)
        pairs = x.broadcast(16).bits_as(vector(i16, 32))
        products = levels.sign_extended(wide) * pairs.sign_extended(wide)
        even, odd = (products.shuffled([*range(first, 32, 2)]) for first in (0, 1))
        return sums + even + odd


@pytest.fixture(params=["avx512", "avx2", "emulated"])
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each unit that this CPU has, and AVX-512's without AVX-512."""
    if request.param == "avx512" and instruction_set() != "avx512":
        pytest.skip("the CPU has no AVX-512")
    if request.param == "emulated":
        monkeypatch.setitem(WORDS, (instruction_set(), 8), Emulated)
    else:
        monkeypatch.setattr(quantized_matmul, "instruction_set", lambda: request.param)
    return request.param


class Matrix:
    """A random matrix: packed, and as the numbers that its codes stand for."""

    def __init__(self, rows: int, columns: int) -> None:
        self.codes, self.absmax = int8.encode_int8(random(rows, columns))
        self.shape = (rows, columns)

    @property
    def exact(self) -> torch.Tensor:
        each = self.absmax.double().repeat_interleave(64)
        return (self.codes.double() / 127 * each).view(self.shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        packed = int8.to_packed_layout(self.codes, self.absmax, *self.shape)
        return quantized_matmul.packed_matmul(x, *packed, None, self.shape, int8.BITS)


@pytest.mark.parametrize("shape", [(32, 64), (160, 192), (96, 1536), (256, 576)])
def test_the_product_is_that_of_the_exact_matrix(
    unit: str, threads: int, shape: tuple[int, int]
) -> None:
    matrix = Matrix(*shape)
    for tokens in TOKENS:
        x = random(tokens, shape[1], seed=1)
        for numbers in (x, x.bfloat16(), x.half()):
            result, expected = matrix(numbers), numbers.double() @ matrix.exact.T
            assert (result.dtype, result.shape) == (numbers.dtype, (tokens, shape[0]))
            # In 16 bits it is the rounding of the result that counts.
            rounded = expected.to(numbers.dtype).double()
            assert error(result, rounded) < WITHIN + (1e-3 if numbers is not x else 0)


def test_a_token_has_the_same_bits_alone_and_among_others(
    unit: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_matmul, "_X_BYTES", 1)  # an item of work has 8 tokens
    matrix, x = Matrix(160, 192), random(70, 192, seed=1)
    together = matrix(x)
    assert torch.equal(together, torch.cat([matrix(row) for row in x.split(1)]))
    assert torch.equal(together[5:38], matrix(x[5:38]))


def test_both_sets_of_instructions_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix, x = Matrix(96, 256), random(5, 256, seed=1)
    result = matrix(x)
    monkeypatch.setitem(WORDS, (instruction_set(), 8), Emulated)
    assert torch.equal(matrix(x), result)


@pytest.mark.parametrize("code", [127, -127])
@pytest.mark.parametrize("value", [1.0, -1.0, 3e38])
def test_the_largest_possible_sum_does_not_overflow(unit: str, code: int, value: float) -> None:
    matrix = Matrix(32, 64)
    matrix.codes.fill_(code)
    matrix.absmax.fill_(2**-7)
    expected = torch.full((5, 32), 64 * value * code / 127 * 2**-7)
    torch.testing.assert_close(matrix(torch.full((5, 64), value)), expected, rtol=1e-6, atol=0)


def test_a_map_is_exact_without_being_asked_for_it() -> None:
    spec = LinearSpec("w", 96, 128, "int8", "cpu-packed", torch.bfloat16)
    assert spec.can_be_exact
    linear, x = spec.build(spec.encode(random(96, 128))), random(40, 128, seed=1).bfloat16()
    assert torch.equal(linear(x), torch.cat([linear(row) for row in x.split(1)]))


class TestInt8(AnyCodes):
    Matrix, within = Matrix, staticmethod(lambda unit: WITHIN)
