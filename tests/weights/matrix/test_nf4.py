import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixchat.base.errors import CheckpointError
from mixchat.kernels.compile import kernels_available
from mixchat.weights.matrix import nf4
from mixchat.weights.matrix.blocks import absmax_size
from mixchat.weights.matrix.bnb_format import Quantized4bit
from mixchat.weights.matrix.encode import encode_nf4
from mixchat.weights.matrix.linear import Layout, LinearSpec, QuantType

needs_kernel = pytest.mark.skipif(not kernels_available(), reason="the kernel needs AVX2")

each_type = pytest.mark.parametrize("kind", ["nf4", "fp4"])
QUANTIZE = {"nf4": encode_nf4, "fp4": nf4.encode_fp4}


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(torch.bfloat16)


def dequantized(weight: torch.Tensor, kind: str = "nf4") -> torch.Tensor:
    """The oracle: bitsandbytes there and back, in fp32; as one row, which it always reads right."""
    codes, state = bnb.quantize_4bit(weight.view(1, -1), blocksize=64, quant_type=kind)
    state.dtype = torch.float32
    return bnb.dequantize_4bit(codes, state).view(weight.shape)


@each_type
def test_the_levels_are_those_of_bitsandbytes(kind: nf4.FourBit) -> None:
    assert torch.equal(nf4.LEVELS[kind], bnb.get_4bit_type(kind, device="cpu"))


@each_type
def test_codes_and_scales_are_those_of_bitsandbytes(kind: str) -> None:
    weight = random_weight(96, 128)
    expected, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind)
    codes, absmax = QUANTIZE[kind](weight)
    assert torch.equal(codes, expected.view(-1))
    # Exactly, not nearly: the largest of 64 bf16 numbers is a bf16 number.
    assert torch.equal(absmax.float(), state.absmax)


@each_type
def test_large_matrices_are_quantized_in_pieces_without_a_seam(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    weight = random_weight(64, 192)
    whole = QUANTIZE[kind](weight)
    monkeypatch.setattr(nf4, "_CHUNK", 64 * 7)
    for one, other in zip(whole, QUANTIZE[kind](weight), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("rows", "columns"), [(5, 6), (3, 66), (1, 2), (7, 130), (5, 16), (8, 96)])
def test_odd_shapes_are_handled_as_bitsandbytes_does(rows: int, columns: int) -> None:
    weight = random_weight(rows, columns)
    codes, absmax = encode_nf4(weight)
    assert codes.shape == (nf4.codes_size(rows, columns),)
    assert absmax.shape == (absmax_size(rows, columns),)
    result = nf4.dequantize(codes, absmax.float(), (rows, columns), torch.float32)
    assert torch.equal(result, dequantized(weight))


@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (96, 192), (64, 1536)])
def test_the_packed_layout_is_that_of_bitsandbytes(rows: int, columns: int) -> None:
    """The only use of its private converter: our own must give the same bytes."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    weight = random_weight(rows, columns)
    packed, scales = nf4.to_packed_layout(*encode_nf4(weight), rows, columns)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    expected, state = _convert_weight_packed_for_cpu(codes, state)
    assert torch.equal(packed, expected.view(-1))
    assert torch.equal(scales.view(state.absmax.shape), state.absmax)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_packing_loses_nothing(bands: int, blocks: int, seed: int) -> None:
    rows, columns = 32 * bands, 64 * blocks
    codes, absmax = encode_nf4(random_weight(rows, columns, seed))
    again = nf4.to_bitsandbytes_layout(
        *nf4.to_packed_layout(codes, absmax, rows, columns), rows, columns
    )
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], absmax)


def test_a_code_lies_where_the_layout_says() -> None:
    """Row 3, column 10 is code 2 * 3 + 0 of line 5: low nibble of byte 6 of that line."""
    rows, columns = 32, 64
    codes = torch.zeros(rows * columns // 2, dtype=torch.uint8)
    codes[(3 * columns + 10) // 2] = 0xF0  # an even column is the high nibble
    packed, _ = nf4.to_packed_layout(codes, torch.ones(32, dtype=torch.bfloat16), rows, columns)
    assert packed.nonzero().tolist() == [[5 * 32 + 6]]
    assert packed[5 * 32 + 6] == 0x0F


@each_type
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("columns", [192, 16, 96, 66, 7])
def test_the_portable_matmul_is_exact_in_fp32(tokens: int, columns: int, kind: nf4.FourBit) -> None:
    weight, x = random_weight(40, columns), random_weight(tokens, columns, seed=1).float()
    codes, absmax = QUANTIZE[kind](weight)
    result = nf4.bitsandbytes_matmul(x, codes, absmax.float(), (40, columns), kind)
    torch.testing.assert_close(result, x @ dequantized(weight, kind).T, rtol=1e-5, atol=1e-4)


@each_type
@pytest.mark.parametrize("columns", [128, 96, 66])
def test_dequantizing_is_that_of_bitsandbytes(kind: nf4.FourBit, columns: int) -> None:
    weight = random_weight(40, columns)
    codes, absmax = QUANTIZE[kind](weight)
    result = nf4.dequantize(codes, absmax.float(), (40, columns), torch.float32, kind)
    assert torch.equal(result, dequantized(weight, kind))


def test_rounding_a_scale_changes_it_by_one_part_in_256_at_most() -> None:
    scales = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 3 + 1e-3
    change = (nf4.round_absmax(scales).float() - scales).abs()
    assert (change <= scales / 256).all()
    assert torch.equal(nf4.round_absmax(scales.bfloat16().float()), scales.bfloat16())


def spec(layout: Layout, rows: int = 64, columns: int = 128, kind: QuantType = "nf4") -> LinearSpec:
    return LinearSpec("w", rows, columns, kind, layout, torch.bfloat16)


@needs_kernel
@each_type
def test_both_layouts_of_a_linear_map_give_the_same_result_to_rounding(kind: QuantType) -> None:
    weight, x = random_weight(64, 128), random_weight(3, 128, seed=1)
    specs = [spec("bitsandbytes", kind=kind), spec("cpu-packed", kind=kind)]
    portable, packed = (one.build(one.encode(weight)) for one in specs)
    torch.testing.assert_close(portable(x), packed(x), rtol=0.02, atol=0.1)
    expected = x.float() @ dequantized(weight, kind).T
    torch.testing.assert_close(portable(x).float(), expected, rtol=0.02, atol=0.1)


def part(weight: torch.Tensor, kind: nf4.FourBit = "nf4", *, nested: bool = False) -> Quantized4bit:
    """A matrix as bitsandbytes has quantized it."""
    codes, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    absmax = state.absmax
    if nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    return Quantized4bit(kind, *weight.shape, codes.view(-1), absmax)


@each_type
@pytest.mark.parametrize("layout", ["bitsandbytes", "cpu-packed"])
def test_taking_over_matrices_gives_what_encoding_the_whole_gives(
    kind: nf4.FourBit, layout: Layout
) -> None:
    weight = random_weight(96, 128)
    linear = spec(layout, rows=96, kind=kind)
    parts = [part(rows, kind) for rows in weight.split([32, 48, 16])]
    taken = linear.stack_quantized(parts)
    assert [tensor.dtype for tensor in taken] == [torch.bfloat16, torch.uint8]
    for one, other in zip(taken, linear.encode(weight), strict=True):
        assert torch.equal(one, other)


@each_type
def test_a_nested_absmax_is_taken_over_to_bf16_rounding(kind: nf4.FourBit) -> None:
    weight = random_weight(64, 128)
    one = part(weight, kind, nested=True)
    linear = spec("bitsandbytes", kind=kind)
    absmax, codes = linear.stack_quantized([one])
    assert torch.equal(codes, one.codes)
    assert torch.equal(absmax, one.absmax.bfloat16())
    x = random_weight(5, 128, seed=1).float()
    expected = x @ nf4.dequantize(codes, absmax.float(), (64, 128), torch.float32, kind).T
    torch.testing.assert_close(linear.build([absmax, codes])(x), expected, rtol=1e-5, atol=1e-4)


def test_a_part_must_end_with_a_whole_block_where_another_follows() -> None:
    whole, broken = part(random_weight(2, 96)), part(random_weight(1, 96))
    linear = spec("bitsandbytes", rows=3, columns=96)
    absmax, codes = linear.stack_quantized([whole, broken])
    assert (absmax.shape, codes.shape) == ((5,), (144,))
    with pytest.raises(CheckpointError, match=r"^w: a part of it does not end with a whole block"):
        linear.stack_quantized([broken, whole])


def test_a_part_of_another_type_is_refused() -> None:
    parts = [part(random_weight(32, 128)), part(random_weight(32, 128), "fp4")]
    with pytest.raises(CheckpointError, match=r"^w: a part of it is fp4, not nf4$"):
        spec("bitsandbytes").stack_quantized(parts)


@pytest.mark.parametrize(
    "layouts", [("bitsandbytes", "cpu-packed"), ("cpu-packed", "bitsandbytes")]
)
@each_type
def test_converting_in_place_gives_what_encoding_gives(
    layouts: tuple[Layout, Layout], kind: QuantType
) -> None:
    weight = random_weight(64, 128)
    old, new = (spec(layout, kind=kind) for layout in layouts)
    tensors = old.encode(weight)
    old.convert(tensors, new)
    for one, other in zip(tensors, new.encode(weight), strict=True):
        assert torch.equal(one, other)


def test_a_shape_the_packed_layout_cannot_take_stays_portable() -> None:
    asked = spec("cpu-packed", rows=40, columns=128)
    assert not asked.packed
    tensors = asked.encode(random_weight(40, 128))
    before = [tensor.clone() for tensor in tensors]
    asked.convert(tensors, spec("bitsandbytes", rows=40))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_sizes_announced_are_sizes_written() -> None:
    for shape in ((64, 128), (40, 66), (3, 2)):
        linear = spec("cpu-packed", *shape)
        for announced, tensor in zip(
            linear.tensors, linear.encode(random_weight(*shape)), strict=True
        ):
            assert announced.shape == tuple(tensor.shape)
            assert announced.dtype == tensor.dtype
