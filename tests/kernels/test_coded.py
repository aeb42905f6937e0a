"""The kernel against the dequantized product in double precision, for each set of instructions."""

import pytest
import torch
from coded_tools import AnyCodes, error, random

from mixchat.kernels import coded
from mixchat.kernels.compile import has_feature, instruction_set
from mixchat.kernels.units import MANY, UnitName, unit_for
from mixchat.weights.matrix import nf4
from mixchat.weights.matrix.encode import encode_nf4

pytestmark = pytest.mark.skipif(not coded.available(), reason="the kernel needs AVX2")

QUANTIZE = {"nf4": encode_nf4, "fp4": nf4.encode_fp4}
LEVELS = {kind: coded.level_tables(nf4.LEVELS[kind]) for kind in nf4.LEVELS}


# How far a product may be from the exact one: by the bits that x has.
WITHIN: dict[UnitName, float] = {"avx512": 3e-4, "avx2": 3e-4, "avx512 bytes": 1.2e-2}


@pytest.fixture(params=list(WITHIN))
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> UnitName:
    """Each unit that this CPU has, for any count of tokens."""
    if request.param != "avx2" and instruction_set() != "avx512":
        pytest.skip("the CPU has no AVX-512")
    if request.param == "avx512 bytes" and not has_feature("avx512vnni"):
        pytest.skip("the CPU does not multiply bytes")
    instructions = request.param.split()[0]
    monkeypatch.setattr(coded, "instruction_set", lambda: instructions)
    monkeypatch.setattr(coded, "unit_for", lambda instructions, tokens: request.param)
    return request.param


class Matrix:
    """A random matrix: packed, and as the numbers that its codes stand for."""

    def __init__(self, rows: int, columns: int, kind: nf4.FourBit = "nf4") -> None:
        codes, absmax = QUANTIZE[kind](random(rows, columns).bfloat16())
        shape = self.shape = (rows, columns)
        self.kind = kind
        self.exact = nf4.dequantize(codes, absmax.float(), shape, torch.float32, kind).double()
        self.codes, self.absmax = nf4.to_packed_layout(codes, absmax, rows, columns)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return coded.packed_matmul(x, self.codes, self.absmax, LEVELS[self.kind], self.shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(32, 64), (160, 192), (96, 1536), (256, 576)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 13, 70])
def test_the_product_is_that_of_the_dequantized_matrix(
    unit: UnitName,
    threads: int,
    kind: nf4.FourBit,
    shape: tuple[int, int],
    tokens: int,
) -> None:
    matrix, x = Matrix(*shape, kind), random(tokens, shape[1], seed=1)
    expected = x.double() @ matrix.exact.T
    assert error(matrix(x), expected) < WITHIN[unit]
    # In bf16 it is the rounding of the result that counts.
    rounded = x.bfloat16()
    expected = rounded.double() @ matrix.exact.T
    assert error(matrix(rounded), expected.bfloat16().double()) < 1e-3 + WITHIN[unit]
    assert matrix(rounded).dtype == torch.bfloat16


def test_it_is_nearer_to_the_codes_than_levels_in_bf16_are(unit: UnitName) -> None:
    """As bitsandbytes' kernel for AVX512-BF16 has them."""
    if unit == "avx512 bytes":
        pytest.skip("that is for speed")
    matrix, x = Matrix(256, 1024), random(4, 1024, seed=1)
    expected = x.double() @ matrix.exact.T
    codes, absmax = nf4.to_bitsandbytes_layout(matrix.codes, matrix.absmax, *matrix.shape)
    levels = nf4.LEVELS["nf4"].bfloat16().double()
    both = torch.stack((codes >> 4, codes & 15), dim=-1).view(256, 1024 // 64, 64).int()
    rounded = levels[both] * absmax.double().view(256, -1, 1)
    assert error(matrix(x), expected) < error(x.double() @ rounded.view(256, 1024).T, expected) / 4


def test_a_token_alone_has_the_result_that_it_has_among_others(
    unit: UnitName,
) -> None:
    matrix, x = Matrix(160, 192), random(29, 192, seed=1)
    alone = torch.cat([matrix(row) for row in x.split(1)])
    assert torch.equal(matrix(x), alone)


def test_both_sets_of_instructions_give_the_same_to_the_last_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if instruction_set() != "avx512":
        pytest.skip("the CPU has no AVX-512")
    matrix, x = Matrix(96, 256), random(5, 256, seed=1)
    wide = matrix(x)
    monkeypatch.setattr(coded, "instruction_set", lambda: "avx2")
    torch.testing.assert_close(matrix(x), wide, rtol=1e-5, atol=1e-5)


def test_many_tokens_are_multiplied_as_bytes_where_the_cpu_can() -> None:
    few, many = (unit_for("avx512", tokens) for tokens in (MANY - 1, MANY))
    assert few == "avx512"
    assert many == ("avx512 bytes" if has_feature("avx512vnni") else "avx512")
    assert unit_for("avx2", MANY) == "avx2"


def test_the_largest_possible_sum_does_not_overflow(unit: UnitName) -> None:
    codes = torch.full((32 * 64 // 2,), 0xFF, dtype=torch.uint8)  # the level 1 everywhere
    absmax = torch.ones(32, dtype=torch.bfloat16)
    for value in (1.0, -1.0):
        x = torch.full((1, 64), value)
        result = coded.packed_matmul(x, codes, absmax, LEVELS["nf4"], (32, 64))
        torch.testing.assert_close(result, torch.full((1, 32), 64 * value), rtol=1e-6, atol=0)


class TestFourBits(AnyCodes):
    Matrix, within = Matrix, WITHIN.__getitem__
