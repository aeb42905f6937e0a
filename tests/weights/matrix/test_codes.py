"""Codes of every type against what they stand for in double precision."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from matrix_tools import random

from mixchat.kernels.cpu.compile import kernels_available
from mixchat.weights.format import manifest
from mixchat.weights.matrix import encode, int8, mxfp4, quant_type, trellis
from mixchat.weights.matrix.int6 import INT6
from mixchat.weights.matrix.int8 import INT8
from mixchat.weights.matrix.linear import TYPES, LinearSpec, as_packed, type_of_bits
from mixchat.weights.matrix.mxfp4 import MXFP4
from mixchat.weights.matrix.nf4 import NF4
from mixchat.weights.matrix.quant_type import BlockCodes, Linear
from mixchat.weights.matrix.trellis import TRELLIS2, TRELLIS3, TrellisCodes

needs_kernel = pytest.mark.skipif(not kernels_available(), reason="the kernel needs AVX2")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 7, 33)
SHAPES = ((64, 128), (40, 128), (192, 64), (33, 320))


@dataclass(frozen=True)
class Kind:
    """A type of codes; `numbers` gives what codes stand for, in double precision and no hurry."""

    type: BlockCodes
    numbers: Callable[[torch.Tensor], list[float]]
    decode_error: float  # of the product of a few tokens
    prompt_error: float  # of that of many


def exact(
    kind: Kind, codes: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """The matrix that codes in rows stand for, in double precision."""
    if isinstance(kind.type, TrellisCodes):
        return exact_trellis(kind.type, codes, absmax, shape)
    count = shape[0] * shape[1]
    numbers = torch.tensor(kind.numbers(codes), dtype=torch.float64)[:count]
    scales = absmax.double() if absmax.is_floating_point() else 2.0 ** (absmax.double() - 127)
    return (numbers * scales.repeat_interleave(kind.type.blocksize)[:count]).view(shape)


def exact_trellis(
    kind: TrellisCodes, codes: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """The docstring of `trellis.py`, weight by weight."""
    (rows, columns), levels = shape, kind.levels.tolist()
    words, scales = codes.view(torch.int64).view(-1, columns, kind.bits).tolist(), absmax.tolist()
    blocks = -(-columns // 64)

    def weight(row: int, column: int) -> float:
        first, *planes = (word % 2**64 for word in words[row // 64][column])
        bit = row % 64
        index = (((first << 64 | first) >> bit) % 128 * 61 * 2**9) % 2**16 // 2**12
        for plane, word in enumerate(planes):
            index += (word >> bit) % 2 * 16 * 2**plane
        byte = scales[row * blocks + column // 64]
        return levels[index] * (byte and (8 + byte % 8) / 8 * 2.0 ** (byte // 8 - 25))

    numbers = [[weight(row, column) for column in range(columns)] for row in range(rows)]
    return torch.tensor(numbers, dtype=torch.float64)


def numbers_of_trellis(codes: torch.Tensor) -> list[float]:
    raise AssertionError("a trellis has no numbers in the order of rows")


def numbers_of_int8(codes: torch.Tensor) -> list[float]:
    return [code / 127 for code in codes.tolist()]


def numbers_of_int6(codes: torch.Tensor) -> list[float]:
    """The docstring of `int6.py`, block by block."""
    found = []
    for block in codes.view(-1, 48).tolist():
        low = [code for byte in block[:32] for code in (byte % 16, byte // 16)]
        above = int.from_bytes(bytes(block[32:]), "little")
        for place, code in enumerate(low):
            found.append((code + 16 * (above >> 2 * place & 3) - 32) / 32)
    return found


def in_two_halves(levels: torch.Tensor) -> Callable[[torch.Tensor], list[float]]:
    """Return the levels of the high half of each byte and of the low one."""
    numbers = levels.tolist()
    return lambda codes: [
        numbers[code] for byte in codes.tolist() for code in (byte // 16, byte % 16)
    ]


KINDS = [
    Kind(INT8, numbers_of_int8, 2e-4, 2e-4),
    Kind(INT6, numbers_of_int6, 2e-4, 1.2e-2),
    # Levels of 7 bits, on x86 without VNNI, have an error of 1.2e-2 with normal numbers.
    Kind(NF4, in_two_halves(NF4.levels), 4e-4, 1.6e-2),
    Kind(MXFP4, in_two_halves(MXFP4.levels), 4e-4, 1.2e-2),
    Kind(TRELLIS2, numbers_of_trellis, 1.2e-2, 1.2e-2),
    Kind(TRELLIS3, numbers_of_trellis, 1.2e-2, 1.2e-2),
]


@pytest.fixture(params=KINDS, ids=[kind.type.name for kind in KINDS])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def spec(kind: Kind, rows: int = 64, columns: int = 128) -> LinearSpec:
    return LinearSpec("w", rows, columns, kind.type.name, torch.bfloat16)


@pytest.fixture(params=["kernel", "no kernel"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether a kernel computes products. GPUs have none for some shapes."""
    if request.param == "kernel" and not kernels_available():
        pytest.skip("the kernel needs AVX2")
    if request.param == "no kernel":
        monkeypatch.setattr(LinearSpec, "has_kernel", False)
    return bool(request.param == "kernel")


def build(kind: Kind, form: LinearSpec, seed: int = 0) -> tuple[Linear, torch.Tensor]:
    """A map with random weights, and its matrix in double precision."""
    weight = random(form.rows, form.columns, seed)
    codes, absmax = kind.type.codes(weight)
    return form.build(form.encode(weight)), exact(kind, codes, absmax, weight.shape)


def test_pieces_leave_no_seam(kind, monkeypatch):
    form, weight = spec(kind, 200, 192), random(200, 192)
    whole = form.encode(weight)
    matrix = form.dequantized(whole)
    monkeypatch.setattr(quant_type, "_REORDERED", 2 * 32 * 192)
    for module in (quant_type, int8, mxfp4, encode, trellis):
        monkeypatch.setattr(module, "_PIECE", 128)
    assert all(map(torch.equal, form.encode(weight), whole))
    assert torch.equal(form.dequantized(whole), matrix)


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantizing_is_the_definition_to_rounding(kind, shape):
    codes, absmax = kind.type.codes(random(*shape))
    expected = exact(kind, codes, absmax, shape)
    tensors = kind.type.pack(codes, absmax, shape[1])
    for dtype, rounding in (
        (torch.bfloat16, 2**-8),
        (torch.float16, 2**-10),
        (torch.float32, 2**-22),
    ):
        result = replace(spec(kind, *shape), dtype=dtype).dequantized(tensors)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("search", [False, True])
def test_a_parameter_is_encoded_also_in_inference_mode(kind, search):
    weight, threads = torch.nn.Parameter(random(3, 64)), torch.get_num_threads()
    outside = kind.type.codes(weight, search=search)
    with torch.inference_mode():
        inside = kind.type.codes(weight, search=search)
    assert all(map(torch.equal, outside, inside))
    assert torch.get_num_threads() == threads


def test_a_block_of_zeros_gives_zeros(kind):
    weight = random(2, 64)
    weight[1] = 0
    form = spec(kind, 2, 64)
    again = form.dequantized(form.encode(weight))
    assert again[0].any()
    assert not again[1].any()


@pytest.mark.parametrize("rows", [1, 32, 40, 32002])
def test_rows_of_zeros_fill_up_the_last_band(kind, rows):
    """The vocabularies of some models have 32002 tokens."""
    form, band = spec(kind, rows, 64), kind.type.units.band
    assert form.stored_rows % band == 0
    assert rows <= form.stored_rows < rows + band
    scales = 64 // kind.type.blocksize * kind.type.scale_dtype.itemsize
    nbytes = form.stored_rows * (8 * kind.type.bits + scales)
    assert sum(tensor.nbytes for tensor in form.tensors) == nbytes


def test_scales_lie_by_bands_then_by_blocks_of_columns(kind):
    band, columns = kind.type.units.band, 3 * kind.type.blocksize
    absmax = torch.arange(2 * band * 3).to(kind.type.scale_dtype)  # 3 blocks in each of 2 bands
    codes, _ = kind.type.codes(torch.zeros(2 * band, columns))
    scales, _ = kind.type.pack(codes, absmax, columns)
    of_bands = absmax.view(2, band, 3)
    for number, block in enumerate(scales.split(band)):
        expected = of_bands[number // 3, :, number % 3]
        if isinstance(kind.type, TrellisCodes):  # its rows are in the order of its kernel
            block, expected = block.sort().values, expected.sort().values
        assert torch.equal(block, expected)


def test_sizes_announced_are_sizes_written(kind):
    for shape in SHAPES:
        form = spec(kind, *shape)
        written = form.encode(random(*shape))
        assert [one.shape for one in form.tensors] == [tuple(tensor.shape) for tensor in written]
        assert [one.dtype for one in form.tensors] == [tensor.dtype for tensor in written]


def test_a_type_takes_whole_blocks_of_columns_and_parts_of_whole_bands(kind):
    block, band = kind.type.blocksize, kind.type.units.band
    assert kind.type.fits(3 * block)
    assert kind.type.fits(3 * block, 5 * band)
    assert not kind.type.fits(3 * block + block // 2)
    assert not kind.type.fits(3 * block, 5 * band + band // 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("kernel")
def test_a_product_is_that_of_the_exact_matrix_to_rounding(kind, shape):
    linear, matrix = build(kind, spec(kind, *shape))
    for tokens, dtype in product(TOKENS, DTYPES):
        x = random(tokens, shape[1], seed=tokens).to(dtype)
        result, expected = linear(x), x.double() @ matrix.T
        assert (result.dtype, result.shape) == (dtype, (tokens, shape[0]))
        # Weights and result are rounded, and so is x where codes are multiplied.
        within = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 0}[dtype]
        within += kind.prompt_error if tokens >= 16 else kind.decode_error
        assert (result.double() - expected).norm() <= within * expected.norm()


@pytest.mark.usefixtures("kernel")
def test_what_is_no_number_stays_visible_and_to_its_token(kind):
    linear, _ = build(kind, spec(kind))
    x = random(3, 128)
    for bad in (torch.nan, torch.inf):
        x[1, 77] = bad
        finite = linear(x).isfinite()
        assert finite[::2].all()
        assert not finite[1].any()


@pytest.mark.usefixtures("kernel")
def test_the_map_reads_its_tensors_anew_each_time(kind):
    """A slot is filled again with other bytes."""
    one, other = random(64, 128), random(64, 128, seed=1)
    tensors = spec(kind).encode(one)
    linear, x = spec(kind).build(tensors), random(1, 128, seed=2)
    for old, new in zip(tensors, spec(kind).encode(other), strict=True):
        old.copy_(new)
    _, matrix = build(kind, spec(kind), seed=1)
    expected = x.double() @ matrix.T
    assert (linear(x).double() - expected).norm() <= 0.012 * expected.norm()


@pytest.mark.parametrize("shape", [(64, 128), (7, 64)])
def test_a_bias_is_added_to_each_row_and_read_anew(kind, kernel, shape):
    plain = spec(kind, *shape)
    biased, weight = replace(plain, bias=True), random(*shape)
    tensors = biased.encode(weight, bias=torch.zeros(shape[0]))
    assert [one.shape for one in biased.tensors] == [tuple(tensor.shape) for tensor in tensors]
    assert biased.tensors[-1].name == "w.bias"
    linear, without = biased.build(tensors), plain.build(plain.encode(weight))
    # For bf16 a kernel is compiled of its own, which adds a bias to each type in one way.
    narrow = [torch.bfloat16] if not kernel or kind.type in (NF4, TRELLIS3) else []
    for tokens, dtype in product(TOKENS, [*narrow, torch.float16, torch.float32]):
        x, bias = random(tokens, shape[1], seed=tokens).to(dtype), random(1, shape[0], tokens)
        if biased.stored_rows == shape[0] or not kernel:
            tensors[-1].copy_(bias[0])
        else:  # filled up with zeros, it is a copy
            linear = biased.build(biased.encode(weight, bias=bias[0]))
        expected = without(x.float() if kernel else x).double() + bias
        rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}[dtype]
        assert linear(x).dtype == dtype
        torch.testing.assert_close(linear(x).double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, False), (torch.float32, True)])
@needs_kernel
def test_the_steps_of_a_packed_map_have_its_bits(kind, dtype, bias):
    form = replace(spec(kind), bias=bias)
    packed = as_packed(
        form.build(form.encode(random(64, 128), bias=random(1, 64)[0] if bias else None))
    )
    assert (packed.addresses[2] != 0) == bias
    x, out = random(1, 128).to(dtype), torch.empty(1, 64, dtype=dtype)
    for step in packed.steps(x, out):
        step.run()
    assert torch.equal(out, packed(x))


def test_each_type_is_known_by_its_name_and_to_manifests():
    assert all(kind.name == name for name, kind in TYPES.items())
    experts = {name for name, kind in TYPES.items() if kind.for_experts}
    assert set(manifest._QUANTIZATION["quant_type"]) == experts


def test_a_type_is_found_by_its_bits():
    names = {16: "none", 8: "int8", 6: "int6", 4: "nf4", 3: "trellis3", 2: "trellis2"}
    assert {bits: type_of_bits(bits) for bits in names} == names
