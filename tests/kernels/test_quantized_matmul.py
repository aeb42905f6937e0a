"""The kernel against the dequantized product in double precision, for each set of instructions."""

import functools

import pytest
import torch
from matmul_tools import AnyCodes, error, random

from mixchat.kernels import quantized_matmul, units
from mixchat.kernels.compile import InstructionSet, has_feature, instruction_set, kernels_available
from mixchat.kernels.units import BYTES, MANY, VNNI, WORDS, Bits, Unit, unit_for
from mixchat.weights.matrix import nf3, nf4
from mixchat.weights.matrix.blocks import dequantize
from mixchat.weights.matrix.encode import encode_nf3, encode_nf4

pytestmark = pytest.mark.skipif(not kernels_available(), reason="the kernel needs AVX2")

QUANTIZE = {"nf4": encode_nf4, "fp4": nf4.encode_fp4, "nf3": encode_nf3}
LEVELS = {
    kind: units.level_tables(levels) for kind, levels in (nf4.LEVELS | {"nf3": nf3.LEVELS}).items()
}
KINDS = list(LEVELS)


# The most that a product may be off the exact one: by the bits that x has.
WITHIN = {"avx512": 3e-4, "avx2": 3e-4, "avx512 bytes": 1.2e-2, "avx2 bytes": 1.2e-2}


@pytest.fixture(params=list(WITHIN))
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each unit that this CPU has, for any count of tokens."""
    instructions, *_ = request.param.split()
    if instructions == "avx512" and instruction_set() != "avx512":
        pytest.skip("the CPU has no AVX-512")
    if request.param.endswith("bytes") and not has_feature(VNNI[instructions]):
        pytest.skip("the CPU does not multiply bytes")
    monkeypatch.setattr(quantized_matmul, "instruction_set", lambda: instructions)

    def unit_for(instructions: InstructionSet, bits: Bits, tokens: int) -> type[Unit]:
        table = BYTES if request.param.endswith("bytes") else WORDS
        return table[instructions, bits]

    monkeypatch.setattr(quantized_matmul, "unit_for", unit_for)
    return request.param


class Matrix:
    """A random matrix: packed, and as the numbers that its codes stand for."""

    def __init__(self, rows: int, columns: int, kind: str = "nf4") -> None:
        codes, absmax = QUANTIZE[kind](random(rows, columns).bfloat16())
        shape = self.shape = (rows, columns)
        self.kind, how = kind, (nf3 if kind == "nf3" else nf4)
        if kind == "nf3":
            self.exact = dequantize(nf3.rows_of, codes, absmax, shape, torch.float32).double()
        else:
            wide = absmax.float()
            self.exact = nf4.dequantize(codes, wide, shape, torch.float32, kind).double()
        self.bits = how.BITS
        self.codes, self.absmax = how.to_packed_layout(codes, absmax, rows, columns)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        levels = LEVELS[self.kind]
        return quantized_matmul.packed_matmul(
            x, self.codes, self.absmax, levels, self.shape, self.bits
        )


@pytest.mark.parametrize("kind", KINDS)
# The last one has streams of several bands, and an item of work that is not whole.
@pytest.mark.parametrize("shape", [(32, 64), (160, 192), (96, 1536), (256, 576), (4768, 64)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 13, 70])
def test_the_product_is_that_of_the_dequantized_matrix(
    unit: str,
    threads: int,
    kind: str,
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


def test_it_is_nearer_to_the_codes_than_levels_in_bf16_are(unit: str) -> None:
    """As bitsandbytes' kernel for AVX512-BF16 has them."""
    if unit.endswith("bytes"):
        pytest.skip("that is for speed")
    matrix, x = Matrix(256, 1024), random(4, 1024, seed=1)
    expected = x.double() @ matrix.exact.T
    codes, absmax = nf4.to_bitsandbytes_layout(matrix.codes, matrix.absmax, *matrix.shape)
    levels = nf4.LEVELS["nf4"].bfloat16().double()
    both = torch.stack((codes >> 4, codes & 15), dim=-1).view(256, 1024 // 64, 64).int()
    rounded = levels[both] * absmax.double().view(256, -1, 1)
    assert error(matrix(x), expected) < error(x.double() @ rounded.view(256, 1024).T, expected) / 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_alone_has_the_result_that_it_has_among_others(unit: str, kind: str) -> None:
    matrix, x = Matrix(160, 192, kind), random(29, 192, seed=1)
    alone = torch.cat([matrix(row) for row in x.split(1)])
    assert torch.equal(matrix(x), alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [5, 29])
def test_both_sets_of_instructions_give_the_same_bits(
    kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if instruction_set() != "avx512":
        pytest.skip("the CPU has no AVX-512")
    if tokens >= MANY and len({has_feature(name) for name in VNNI.values()}) == 2:
        pytest.skip("the CPU multiplies bytes with one of them only")
    matrix, x = Matrix(96, 256, kind), random(tokens, 256, seed=1)
    wide = matrix(x)
    monkeypatch.setattr(quantized_matmul, "instruction_set", lambda: "avx2")
    assert torch.equal(matrix(x), wide)


@pytest.mark.parametrize("kind", KINDS)
def test_any_count_of_tokens_at_once_gives_the_same_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX2 the CPU decides about it: this one would only ever try one of the two."""
    matrix, x = Matrix(96, 256, kind), random(11, 256, seed=1)
    monkeypatch.setattr(quantized_matmul, "instruction_set", lambda: "avx2")
    monkeypatch.setattr(
        quantized_matmul, "_compiled", quantized_matmul._compiled.__wrapped__
    )  # without its cache
    results = []
    for has in (True, False):
        monkeypatch.setattr(units, "has_feature", lambda name, has=has: has)
        results.append(matrix(x))
    assert torch.equal(*results)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("instructions", VNNI)
@pytest.mark.parametrize("can", [True, False])
def test_many_tokens_are_multiplied_as_bytes_where_the_cpu_can(
    bits: Bits, instructions: InstructionSet, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = {VNNI[instructions]: can}
    monkeypatch.setattr(units, "has_feature", features.__getitem__)
    few, many = (unit_for(instructions, bits, tokens) for tokens in (MANY - 1, MANY))
    assert few is WORDS[instructions, bits]
    assert many is (BYTES[instructions, bits] if can else few)


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_possible_sum_does_not_overflow(unit: str, kind: str) -> None:
    largest = {"nf3": 0xFF, "nf4": 0xFF, "fp4": 0x33}[kind]  # the level 1 everywhere
    matrix = Matrix(32, 64, kind)
    matrix.codes.fill_(largest)
    matrix.absmax.fill_(1)
    for value in (1.0, -1.0):
        result = matrix(torch.full((1, 64), value))
        torch.testing.assert_close(result, torch.full((1, 32), 64 * value), rtol=1e-6, atol=0)


class TestFourBits(AnyCodes):
    Matrix, within = Matrix, WITHIN.__getitem__


class TestThreeBits(AnyCodes):
    Matrix, within = functools.partial(Matrix, kind="nf3"), WITHIN.__getitem__
