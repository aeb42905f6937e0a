"""8-bit codes against the definition, computed slowly in double precision."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixchat.errors import CheckpointError
from mixchat.kernels.compile import available
from mixchat.weights.matrix import int8
from mixchat.weights.matrix.bnb_format import Quantized4bit
from mixchat.weights.matrix.encode import encode_nf4
from mixchat.weights.matrix.linear import Int8Linear, Layout, Linear, LinearSpec

LAYOUTS: tuple[Layout, Layout] = ("bitsandbytes", "cpu-packed")
needs_kernel = pytest.mark.skipif(not available(), reason="the kernel needs AVX2")
each_layout = pytest.mark.parametrize(
    "layout", ["bitsandbytes", pytest.param("cpu-packed", marks=needs_kernel)]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
TOKENS = (1, 2, 7, 16, 33)
SHAPES = ((64, 128), (96, 64), (40, 128), (64, 96), (5, 6), (3, 65), (1, 1))


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


def each_absmax(absmax: torch.Tensor, count: int) -> torch.Tensor:
    """The scale of each of `count` weights, in double precision."""
    return absmax.double().repeat_interleave(64)[:count]


def exact(codes: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The matrix that codes in rows stand for, in double precision."""
    count = shape[0] * shape[1]
    return (codes[:count].double() / 127 * each_absmax(absmax, count)).view(shape)


def spec(layout: Layout, rows: int = 64, columns: int = 128) -> LinearSpec:
    return LinearSpec("w", rows, columns, "int8", layout, torch.bfloat16)


def assert_coded(weight: torch.Tensor) -> None:
    """Check that each scale is the largest magnitude in bf16, and each code the nearest."""
    flat = weight.reshape(-1).double()
    codes, absmax = int8.encode_int8(weight)
    stored = int8.stored_rows(*weight.shape) * weight.shape[1]
    assert (codes.dtype, codes.shape) == (torch.int8, (stored,))
    assert absmax.shape == (-(-stored // 64),)
    largest = torch.stack([block.abs().max() for block in weight.reshape(-1).split(64)])
    assert not codes[len(flat) :].any()
    assert not absmax[len(largest) :].any()
    codes, absmax = codes[: len(flat)], absmax[: len(largest)]
    assert torch.equal(absmax, largest.to(torch.bfloat16))
    scale = each_absmax(absmax, len(flat))
    nearest = (flat * 127 / scale.where(scale != 0, 1)).clamp(-127, 127)
    assert ((codes.double() - nearest).abs() <= 0.5 + 1e-4).all()


# Blocks of any bits: short ones, odd counts, zeros of both signs, denormals, extremes.
any_bits = st.binary(min_size=2, max_size=400).map(
    lambda data: np.frombuffer(data[: len(data) // 2 * 2], np.uint16)
)


@settings(max_examples=200, deadline=None)
@given(any_bits)
@example(np.zeros(64, np.uint16))
@example(np.zeros(65, np.uint16))
@example(np.arange(64, dtype=np.uint16))  # denormals only
@example(np.full(64, 0x7F7F, np.uint16))  # the largest there are
def test_each_code_is_the_nearest_to_its_weight(bits: np.ndarray) -> None:
    finite = np.where(bits & 0x7F80 == 0x7F80, bits & ~np.uint16(0x0080), bits)
    assert_coded(torch.from_numpy(finite.view(np.int16)).view(torch.bfloat16).view(1, -1))


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_every_type_and_shape_are_coded(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    assert_coded(random(*shape).to(dtype))


def test_a_scale_that_was_rounded_down_keeps_the_largest_weight_at_127() -> None:
    weight = torch.full((1, 64), 1.0001)  # 1 in bf16: 127.01 codes
    codes, absmax = int8.encode_int8(weight)
    assert codes[:64].tolist() == [127] * 64
    assert absmax[0] == 1


def test_a_block_of_zeros_gives_zeros() -> None:
    weight = random(2, 64)
    weight[1] = 0
    codes, absmax = int8.encode_int8(weight)
    assert not codes[64:128].any()
    assert absmax[1] == 0
    again = int8.dequantize(codes, absmax, (2, 64), torch.float32)
    assert torch.equal(again[1], torch.zeros(64))


def test_8_bits_cost_less_than_a_hundredth_of_a_weight() -> None:
    weight = random(256, 1024)
    again = int8.dequantize(*int8.encode_int8(weight), (256, 1024), torch.float32)
    assert (again - weight).norm() < 0.006 * weight.norm()


def test_a_parameter_is_encoded_also_in_inference_mode() -> None:
    weight = torch.nn.Parameter(random(3, 64))
    outside, before = int8.encode_int8(weight), torch.get_num_threads()
    with torch.inference_mode():
        inside = int8.encode_int8(weight)
    assert torch.equal(outside[0], inside[0])
    assert torch.equal(outside[1], inside[1])
    assert torch.get_num_threads() == before


def test_pieces_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(200, 33)
    codes, absmax = int8.encode_int8(weight)
    matrix = int8.dequantize(codes, absmax, (200, 33), torch.float32)
    monkeypatch.setattr(int8, "_PIECE", 128)
    again = int8.encode_int8(weight)
    assert torch.equal(codes, again[0])
    assert torch.equal(absmax, again[1])
    assert len(list(int8.dequantized_rows(codes, absmax, (200, 33), torch.float32))) == 4
    assert torch.equal(int8.dequantize(codes, absmax, (200, 33), torch.float32), matrix)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantizing_is_the_definition_to_rounding(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    codes, absmax = int8.encode_int8(random(*shape))
    result = int8.dequantize(codes, absmax, shape, dtype)
    assert result.dtype == dtype
    expected = exact(codes, absmax, shape)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-22}[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=rounding, atol=1e-7)


def test_a_code_lies_where_the_layout_says() -> None:
    """Row 35, column 10: the second band, whose lines follow 64 / 2 lines of the first; there code
    2 * 3 + 0 of line 5. Its scale, of block 0 of row 35, is number 35 of 64."""
    codes, absmax = torch.zeros(64 * 64, dtype=torch.int8), torch.zeros(64, dtype=torch.bfloat16)
    codes[35 * 64 + 10] = -5
    absmax[35] = 1
    packed, scales = int8.to_packed_layout(codes, absmax, 64, 64)
    assert packed.nonzero().tolist() == [[(32 + 5) * 64 + 6]]
    assert packed.min() == -5
    assert scales.nonzero().tolist() == [[35]]


def test_scales_of_a_block_of_columns_lie_together() -> None:
    absmax = torch.arange(32 * 3).to(torch.bfloat16)  # three blocks in each row
    _, scales = int8.to_packed_layout(torch.zeros(32 * 192, dtype=torch.int8), absmax, 32, 192)
    assert scales[:3].tolist() == [0, 3, 6]
    assert scales[32:35].tolist() == [1, 4, 7]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_packing_loses_nothing(bands: int, blocks: int, seed: int) -> None:
    rows, columns = 32 * bands, 64 * blocks
    codes, absmax = int8.encode_int8(random(rows, columns, seed))
    packed = int8.to_packed_layout(codes, absmax, rows, columns)
    again = int8.to_bitsandbytes_layout(*packed, rows, columns)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], absmax)


@each_layout
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_announced_are_sizes_written(layout: Layout, shape: tuple[int, int]) -> None:
    linear = spec(layout, *shape)
    written = linear.encode(random(*shape))
    assert [one.shape for one in linear.tensors] == [tuple(tensor.shape) for tensor in written]
    assert [one.dtype for one in linear.tensors] == [torch.bfloat16, torch.int8]
    assert [tensor.dtype for tensor in written] == [torch.bfloat16, torch.int8]


@pytest.mark.parametrize("rows", [64, 70])
@pytest.mark.parametrize("layouts", [LAYOUTS, LAYOUTS[::-1]])
def test_converting_in_place_gives_what_encoding_gives(
    layouts: tuple[Layout, Layout], rows: int
) -> None:
    weight = random(rows, 128)
    old, new = (spec(layout, len(weight)) for layout in layouts)
    tensors = old.encode(weight)
    assert not torch.equal(tensors[1], new.encode(weight)[1])
    old.convert(tensors, new)
    for one, other in zip(tensors, new.encode(weight), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("rows", "stored"), [(1, 32), (32, 32), (40, 64), (32002, 32032)])
def test_rows_of_zeros_fill_up_the_last_band(rows: int, stored: int) -> None:
    """The vocabularies of some models have 32002 tokens."""
    asked = spec("cpu-packed", rows)
    assert asked.packed
    assert asked.can_be_exact
    assert asked.stored_rows == stored
    assert spec("bitsandbytes", rows).tensors == asked.tensors


def test_a_shape_the_packed_layout_cannot_take_stays_portable() -> None:
    asked = spec("cpu-packed", columns=96)
    assert not asked.packed
    assert not asked.can_be_exact
    tensors = asked.encode(random(64, 96))
    before = [tensor.clone() for tensor in tensors]
    asked.convert(tensors, spec("bitsandbytes", columns=96))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def build(linear: LinearSpec, seed: int = 0) -> tuple[Linear, torch.Tensor]:
    """A map with random weights, and its matrix in double precision."""
    weight = random(linear.rows, linear.columns, seed)
    codes, absmax = int8.encode_int8(weight)
    return linear.build(linear.encode(weight)), exact(codes, absmax, weight.shape)


@each_layout
@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_that_of_the_exact_matrix_to_rounding(
    layout: Layout, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    linear, matrix = build(spec(layout, *shape))
    for tokens in TOKENS:
        x = random(tokens, shape[1], seed=tokens).to(dtype)
        result, expected = linear(x), x.double() @ matrix.T
        assert (result.dtype, result.shape) == (dtype, (tokens, shape[0]))
        # Weights and result are rounded.
        within = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2e-4}[dtype]
        assert (result.double() - expected).norm() <= within * expected.norm()


@each_layout
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_visible_and_to_its_token(layout: Layout, bad: float) -> None:
    linear, _ = build(spec(layout))
    x = random(3, 128)
    x[1, 77] = bad
    finite = linear(x).isfinite()
    assert finite[::2].all()
    assert not finite[1].any()


def test_dequantizing_piece_by_piece_gives_the_rows_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int8, "_PIECE", 64 * 128)  # 64 rows at a time
    linear, matrix = build(spec("bitsandbytes", 200, 128))
    assert isinstance(linear, Int8Linear)
    x = random(2, 128, seed=1)
    torch.testing.assert_close(linear(x).double(), x.double() @ matrix.T, rtol=1e-4, atol=1e-4)


def test_the_whole_matrix_is_dequantized_to_the_type_of_dense_ones() -> None:
    linear = spec("bitsandbytes", 40, 66)
    weight = random(40, 66)
    whole = linear.dequantized(linear.encode(weight))
    assert whole.dtype == torch.bfloat16
    expected = exact(*int8.encode_int8(weight), (40, 66))
    torch.testing.assert_close(whole.double(), expected, rtol=2**-8, atol=0)


@each_layout
def test_the_map_reads_its_tensors_anew_each_time(layout: Layout) -> None:
    """A slot is filled again with other bytes."""
    one, other = random(64, 128), random(64, 128, seed=1)
    tensors = spec(layout).encode(one)
    linear, x = spec(layout).build(tensors), random(1, 128, seed=2)
    for old, new in zip(tensors, spec(layout).encode(other), strict=True):
        old.copy_(new)
    torch.testing.assert_close(linear(x), x @ other.T, rtol=0.01, atol=0.5)


def test_a_part_in_4_bits_cannot_be_taken_over_as_it_is() -> None:
    part = Quantized4bit("nf4", 64, 128, *encode_nf4(random(64, 128)))
    with pytest.raises(CheckpointError, match=r"^w: a part of it is nf4, not int8$"):
        spec("bitsandbytes").stack_quantized([part])
