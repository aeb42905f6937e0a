"""The kernel against the dequantized product in double precision, for each set of instructions.

The one instruction of units for bytes is emulated on CPUs without it. So is that of the units of
AVX-512 for codes of 5, 6 and 8 bits, and of a trellis. LLVM cuts their vectors in halves.
"""

import functools
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from matmul_tools import EVEN, IN_BYTES, Matrix, each_type, random, three_threads
from neon_tools import compile_emulated

from mixchat.kernels.cpu import compile as compiling
from mixchat.kernels.cpu import object_cache, units
from mixchat.kernels.cpu import quantized_matmul as kernel
from mixchat.kernels.cpu.compile import (
    CPUS,
    InstructionSet,
    compiled_here,
    has_feature,
    instruction_set,
    kernels_available,
)
from mixchat.kernels.cpu.emit import Value, i32, vector
from mixchat.kernels.cpu.four_bit_units import FOUR_BITS
from mixchat.kernels.cpu.plane_units import InBytes, PlaneDigits
from mixchat.kernels.cpu.quantized_matmul import QuantizedMatrix
from mixchat.kernels.cpu.trellis_units import Trellis
from mixchat.kernels.cpu.units import MANY, Digits, Unit, UnitSet
from mixchat.weights.matrix.int6 import INT6
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.mxfp4 import MXFP4
from mixchat.weights.matrix.nf4 import NF4
from mixchat.weights.matrix.quant_type import BlockCodes, QuantType
from mixchat.weights.matrix.trellis import TRELLIS3

pytestmark = pytest.mark.skipif(not kernels_available(), reason="the kernel needs AVX2")

X86: tuple[InstructionSet, ...] = ("avx512", "avx2")
IS_ARM = instruction_set() == "neon"
FORMS = ("words", "bytes") if IS_ARM else ("words", "bytes", "short bytes", "alone")
WAYS = [f"{own} {form}" for form in FORMS for own in (["neon"] if IS_ARM else X86)]
x86_alone = pytest.mark.skipif(IS_ARM, reason="this is no x86 CPU")


def choose(instructions: InstructionSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel be compiled for a set of instructions."""
    for module in (compiling, kernel):
        monkeypatch.setattr(module, "instruction_set", lambda: instructions)


def compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what was compiled, for a CPU with other features. The files do not know of them."""
    monkeypatch.setattr(object_cache, "data_dir", lambda: Path(os.devnull))
    monkeypatch.setattr(kernel, "_compiled", compiled_here(kernel._compiled.__wrapped__))


class Emulation(Unit):
    """Multiplies in instructions of any CPU."""

    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        count = 32 // self.x_type.width  # of products in a lane
        narrow, wide = (vector(kind, self.lanes * count) for kind in (self.x_type, i32))
        numbers = x.broadcast(self.lanes).bits_as(narrow).sign_extended(wide)
        levels = levels.bits_as(narrow)
        products = (levels.sign_extended(wide) if count == 2 else levels.widened(wide)) * numbers
        for first in range(count):
            sums = sums + products.shuffled([*range(first, self.lanes * count, count)])
        return sums


class ByteEmulation(Unit):
    """Products of bytes in instructions of any CPU."""

    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        fours = x if x.type == sums.type else x.broadcast(self.lanes)
        for bit in range(0, 32, 8):
            signed = (fours << 24 - bit).arithmetic_shift(24)
            sums = sums + (levels.bits_as(sums.type) >> bit & 0xFF) * signed
        return sums


class TrellisEmulation(ByteEmulation):
    _level_of = Trellis._level_of

    def looked_up(self, table: Value, places: Value) -> Value:
        choices = [table.shuffled([code] * 64) for code in range(16)]
        for bit in range(4):
            is_one = (places << 7 - bit).compare("<", 0)
            choices = [
                is_one.choose(*pair[::-1]) for pair in zip(choices[::2], choices[1::2], strict=True)
            ]
        return choices[0]


class PlaneDigitsEmulation(ByteEmulation):
    with_high_bits = InBytes.with_high_bits


@functools.cache
def emulated(unit: type[Unit]) -> type[Unit]:
    name = f"Emulated{unit.__name__}"
    if issubclass(unit, Digits):
        emulation = PlaneDigitsEmulation if issubclass(unit, PlaneDigits) else ByteEmulation
        return type(name, (emulation, unit), {})
    if not issubclass(unit, Trellis):
        return type(name, (Emulation, unit), {})
    few = classmethod(lambda cls: (2, 1))  # which compile faster
    stored = type(f"Stored{name}", (ByteEmulation, unit.multiplier()), {"widths": few})
    members = {"multiplier": classmethod(lambda cls: stored)}
    return type(name, (TrellisEmulation, unit), members)


def unit_of(kind: BlockCodes, instructions: InstructionSet, form: str) -> type[Unit] | None:
    """Return the unit of a form, or None if these codes have none."""
    if form == "words":
        return kind.units.words[instructions]
    choices = (kind.units.alone if form == "alone" else kind.units.many).get(instructions, ())
    return next(iter(choices[form == "short bytes" :]), None)


@pytest.fixture(params=WAYS)
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each unit, for any count of tokens. Those that this CPU lacks are emulated if possible."""
    instructions, form = request.param.split(maxsplit=1)
    kind = request.node.callspec.params.get("kind", NF4)
    found = unit_of(kind, instructions, form)
    if found is None:
        pytest.skip(f"these codes have no unit for {form}")
    has_set = instructions != "avx512" or instruction_set() == "avx512"
    if not has_set and kind not in (*EVEN, *IN_BYTES):
        pytest.skip("the CPU has no AVX-512")
    if not has_set or not all(map(has_feature, found.needs)):
        found = emulated(found)
    if has_set:
        choose(instructions, monkeypatch)
    monkeypatch.setattr(UnitSet, "unit_for", lambda *_: found)
    return request.param


def within(unit: str, kind: BlockCodes) -> float:
    """Return how far a product may be off the exact one, by the bits that x has."""
    if unit.endswith("bytes") or kind in IN_BYTES:
        return 1.7e-2 if unit.endswith("short bytes") and kind is NF4 else 1.2e-2
    return 7e-5 if kind in (*EVEN, MXFP4) else 3e-4


def dtypes(unit: str) -> list[torch.dtype]:
    """Return the types of x. For bf16 all is compiled again, so it comes with some of the units.

    No unit knows how x is read and results are written.
    """
    narrow = (
        [torch.bfloat16] if unit not in ("avx512 bytes", "avx2 words", "avx512 short bytes") else []
    )
    return [torch.float32, *narrow, torch.float16]


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


@each_type
def test_the_product_is_that_of_the_dequantized_matrix(unit: str, kind: BlockCodes) -> None:
    # The last one has streams of several bands, and an item of work that is not whole.
    for shape in ((32, 64), (160, 192), (96, 1536), (4768, 64)):
        matrix = Matrix(*shape, kind)
        for tokens in (1, 2, 3, 7, 8, 70):
            x = random(tokens, shape[1], seed=1)
            for numbers in map(x.to, dtypes(unit)):
                result, expected = matrix(numbers), numbers.double() @ matrix.exact.T
                assert (result.dtype, result.shape) == (numbers.dtype, (tokens, matrix.rows))
                # In 16 bits it is the rounding of the result that counts.
                rounded = expected.to(numbers.dtype).double()
                rounding = 1e-3 if numbers.dtype != torch.float32 else 0
                assert error(result, rounded) < within(unit, kind) + rounding


def test_it_is_nearer_to_the_codes_than_levels_in_bf16_are(unit: str) -> None:
    """As bitsandbytes' kernel for AVX512-BF16 has them."""
    if unit.endswith("bytes"):
        pytest.skip("that is for speed")
    matrix, x = Matrix(256, 1024), random(4, 1024, seed=1)
    expected = x.double() @ matrix.exact.T
    scales = matrix.packed.absmax.double().view(8, 16, 32).transpose(1, 2).reshape(256, 16)
    scales = scales.repeat_interleave(64, -1)
    rounded = (matrix.exact / scales).bfloat16().double() * scales
    assert error(matrix(x), expected) < error(x.double() @ rounded.T, expected) / 4


@each_type
def test_a_token_alone_has_the_result_that_it_has_among_others(
    unit: str, kind: BlockCodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the other tokens nor the threads change a bit."""
    monkeypatch.setattr(kernel, "_X_BYTES", 1)  # an item of work has 8 tokens
    matrix, x = Matrix(160, 192, kind), random(70, 192, seed=1)
    with three_threads():
        whole = matrix(x)
    assert torch.equal(whole, torch.cat([matrix(row) for row in x.split(1)]))
    assert torch.equal(whole[5:38], matrix(x[5:38]))


@x86_alone
@pytest.mark.parametrize("instructions", X86)
@pytest.mark.parametrize("kind", [INT6, MXFP4], ids=["int6", "mxfp4"])
def test_a_lone_token_has_the_bits_of_words(
    kind: BlockCodes, instructions: InstructionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_set = instructions != "avx512" or instruction_set() == "avx512"
    if not has_set and kind is MXFP4:
        pytest.skip("the CPU has no AVX-512")
    matrix, x = Matrix(160, 192, kind), random(3, 192, seed=1)
    x[0, 5], x[1, 64:128] = 50, 0
    words, (unit,) = matrix(x), kind.units.alone[instructions]
    if has_set:
        choose(instructions, monkeypatch)
    if not has_set or not all(map(has_feature, unit.needs)):
        unit = emulated(unit)
    monkeypatch.setattr(UnitSet, "unit_for", lambda *_: unit)
    assert torch.equal(torch.cat([matrix(row) for row in x.split(1)]), words)


def test_only_a_lone_token_has_a_unit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, words = INT6.units.alone, INT6.units.words
    monkeypatch.setattr(units, "has_feature", lambda name: True)
    for instructions in X86:
        assert [INT6.units.unit_for(instructions, 1, True)] == alone[instructions]
        assert INT6.units.unit_for(instructions, 1, False) is words[instructions]
    assert INT6.units.unit_for("neon", 1, True) is words["neon"]
    monkeypatch.setattr(units, "has_feature", lambda name: name not in ("avx512vbmi", "avxvnni"))
    for instructions in X86:
        assert INT6.units.unit_for(instructions, 1, True) is words[instructions]


@x86_alone
@each_type
@pytest.mark.parametrize("tokens", [5, 29])  # fewer than MANY, and as many
def test_both_sets_of_instructions_give_the_same_bits(
    kind: BlockCodes, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, x = Matrix(96, 256, kind), random(tokens, 256, seed=1)
    result = matrix(x)
    many = bool(kind.units.many) and tokens >= MANY
    if many and len({kind.units.unit_for(name, tokens).level_of_one for name in X86}) == 2:
        pytest.skip("levels have 8 bits with one of them only")
    if instruction_set() == "avx512":
        choose("avx2", monkeypatch)
    elif kind in (*EVEN, *IN_BYTES) and not many:
        unit = emulated(kind.units.words["avx512"])
        monkeypatch.setattr(UnitSet, "unit_for", lambda *_: unit)
    else:
        pytest.skip("the CPU has no AVX-512")
    assert torch.equal(matrix(x), result)


@x86_alone
@each_type
@pytest.mark.parametrize("multiplies_bytes", [True, False])
def test_neon_gives_the_bits_of_x86(
    kind: BlockCodes, multiplies_bytes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not multiplies_bytes and kind not in IN_BYTES:
        pytest.skip("few tokens are multiplied in words, whatever the CPU has")
    own = CPUS[instruction_set() or "avx2"].multiplies_bytes
    # A CPU without an instruction that adds products of bytes rounds many tokens otherwise.
    as_many = not kind.units.many or (own and multiplies_bytes)
    matrix = Matrix(96, 256, kind)
    inputs = [random(tokens, 256, seed=1) for tokens in ((5, 29) if as_many else (5,))]
    results = [matrix(x) for x in inputs]
    compile_again(monkeypatch)
    choose("neon", monkeypatch)
    monkeypatch.setattr(compiling, "compile_module", compile_emulated)
    for module in (compiling, units):
        monkeypatch.setattr(module, "has_feature", lambda name: multiplies_bytes)
    assert all(map(torch.equal, map(matrix, inputs), results))


@x86_alone
@pytest.mark.parametrize("kind", [NF4, MXFP4], ids=["nf4", "mxfp4"])
def test_any_count_of_tokens_at_once_gives_the_same_bits(
    kind: BlockCodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX2 the CPU decides about it: this one would only ever try one of the two."""
    matrix, x = Matrix(96, 256, kind), random(11, 256, seed=1)
    choose("avx2", monkeypatch)
    results = []
    for has in (True, False):
        compile_again(monkeypatch)
        monkeypatch.setattr(compiling, "has_feature", lambda name, has=has: has)
        results.append(matrix(x))
    assert torch.equal(*results)


@x86_alone
@pytest.mark.parametrize("kind", [TRELLIS3], ids=["trellis3"])  # has the planes of trellis2
@pytest.mark.parametrize(
    ("instructions", "missing"),
    [("avx512", "avx512vnni"), ("avx512", "avx512vbmi"), ("avx2", "avxvnni")],
)
def test_a_trellis_gives_the_same_bits_on_every_cpu(
    kind: BlockCodes,
    instructions: InstructionSet,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if instructions == "avx512" and instruction_set() != "avx512":
        pytest.skip("the CPU has no AVX-512")
    matrix, x = Matrix(128, 256, kind), random(3, 256, seed=1)
    results = [matrix(x), torch.cat([matrix(row) for row in x.split(1)])]
    choose(instructions, monkeypatch)
    compile_again(monkeypatch)
    for module in (compiling, units):
        monkeypatch.setattr(
            module, "has_feature", lambda name: name != missing and has_feature(name)
        )
    results += [matrix(x), torch.cat([matrix(row) for row in x.split(1)])]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("instructions", X86)
@pytest.mark.parametrize("can", [True, False])
def test_many_tokens_are_multiplied_as_bytes(
    instructions: InstructionSet, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = {CPUS[instructions].feature: can}
    monkeypatch.setattr(units, "has_feature", features.__getitem__)
    few, many = (FOUR_BITS.unit_for(instructions, tokens) for tokens in (MANY - 1, MANY))
    assert few is FOUR_BITS.words[instructions]
    assert many is FOUR_BITS.many[instructions][0 if can else 1]
    assert many.level_of_one == (127 if can else 63)


@each_type
def test_the_largest_possible_sum_does_not_overflow(unit: str, kind: BlockCodes) -> None:
    extremes: dict[str, list[tuple[int, float]]] = {
        "mxfp4": [(0x77, 6 / 4)],  # 6 times 2^-9
        "int8": [(127, 1), (-127, -1)],
        "int6": [(0xFF, 31 / 32), (0, -1)],
        "trellis2": [(0, -63 / 64)],
        "trellis3": [(0, -63 / 64)],
    }
    scales = {"mxfp4": 127 - 9, "trellis2": 144, "trellis3": 144}
    matrix = Matrix(32, 64, kind)
    matrix.packed.absmax.fill_(scales.get(kind.name, 2**-7))
    numbers = extremes.get(kind.name, [(0xFF, 1)])
    for (codes, number), value in itertools.product(numbers, (1.0, -1.0, 3e38)):
        matrix.packed.codes.fill_(codes)
        expected = torch.full((5, matrix.rows), number * 64 * value * 2**-7)
        torch.testing.assert_close(matrix(torch.full((5, 64), value)), expected, rtol=1e-6, atol=0)


@each_type
def test_blocks_of_very_different_size_keep_their_precision(unit: str, kind: BlockCodes) -> None:
    """One large number in x must not cost the others their digits: models have such."""
    matrix, x = Matrix(64, 256, kind), random(2, 256, seed=1)
    assert torch.equal(matrix(torch.zeros(2, 256)), torch.zeros(2, matrix.rows))
    x[:, 64:128] *= 1e4
    x[:, 128:192] *= 1e-4
    assert error(matrix(x), x.double() @ matrix.exact.T) < within(unit, kind)
    x[:, 64:128] = 0
    assert error(matrix(x), x.double() @ matrix.exact.T) < within(unit, kind)


@pytest.mark.parametrize("kind", [MXFP4], ids=["mxfp4"])  # for the unit
def test_weights_of_mxfp4_are_multiplied_as_they_are(unit: str, kind: BlockCodes) -> None:
    """Each code, and scales from the least to the largest, are exact in the kernel's integers."""
    codes = (17 * torch.arange(16, dtype=torch.uint8)).repeat(32 * 3)
    exponents = torch.arange(32 * 3).view(32, 3).T.reshape(-1).to(torch.uint8) + 80
    shape, (absmax, packed) = (32, 96), kind.pack(codes, exponents, 96)
    matrix = QuantizedMatrix(packed, absmax, kind.level_table, shape, kind.units)
    weight = kind.dequantize([absmax, packed], shape, torch.float32)
    result = kernel.quantized_matmul(torch.eye(96), matrix)
    torch.testing.assert_close(result, weight.T, rtol=1e-6, atol=0)


@each_type
def test_what_is_no_number_stays_visible_and_to_its_token(unit: str, kind: BlockCodes) -> None:
    for dtype, bad in itertools.product(dtypes(unit), (torch.nan, torch.inf)):
        matrix, x = Matrix(32, 128, kind), random(3, 128, seed=1).to(dtype)
        good = matrix(x)
        x[1, 77] = bad
        result = matrix(x)
        assert not result[1].isfinite().any()
        assert torch.equal(result[::2], good[::2])


def test_the_shape_and_type_of_x_are_kept() -> None:
    matrix = Matrix(64, 64)
    assert matrix(random(6, 64).view(2, 3, 64)).shape == (2, 3, 64)
    assert matrix(random(1, 64)[0]).shape == (64,)
    assert matrix(random(0, 64)).shape == (0, 64)
    assert matrix(random(6, 128)[:, ::2]).shape == (6, 64)
    assert matrix(random(1, 64).half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("quant_type", "asked"),
    [("int8", False), ("int6", True), ("trellis2", False), ("trellis3", False)],
)
def test_a_map_with_one_unit_is_exact(quant_type: QuantType, asked: bool) -> None:
    """Codes of 8 bits have no bytes for many tokens, and those of a trellis always have them."""
    spec = LinearSpec("w", 96, 128, quant_type, torch.bfloat16)
    assert spec.can_be_exact
    linear: Any = spec.build(spec.encode(random(96, 128)))
    x = random(40, 128, seed=1).bfloat16()
    assert torch.equal(linear(x, exact=asked), torch.cat([linear(row) for row in x.split(1)]))
