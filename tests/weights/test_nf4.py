import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixchat.weights import nf4
from mixchat.weights.linear import LinearSpec

needs_kernel = pytest.mark.skipif(
    not nf4.has_packed_kernel(), reason="the packed kernel needs a CPU with AVX512-BF16"
)


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(torch.bfloat16)


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """The oracle: bitsandbytes there and back, in fp32."""
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    state.dtype = torch.float32
    return bnb.dequantize_4bit(codes, state)


def test_codes_and_scales_are_those_of_bitsandbytes() -> None:
    weight = random_weight(96, 128)
    expected, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, absmax = nf4.quantize(weight)
    assert torch.equal(codes, expected.view(-1))
    # Exactly, not nearly: the largest of 64 bf16 numbers is a bf16 number.
    assert torch.equal(absmax.float(), state.absmax)


def test_large_matrices_are_quantized_in_pieces_without_a_seam(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_weight(64, 192)
    whole = nf4.quantize(weight)
    monkeypatch.setattr(nf4, "_QUANTIZE_CHUNK", 64 * 7)
    for one, other in zip(whole, nf4.quantize(weight), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("rows", "columns"), [(5, 6), (3, 66), (1, 2), (7, 130)])
def test_odd_shapes_are_handled_as_bitsandbytes_does(rows: int, columns: int) -> None:
    weight = random_weight(rows, columns)
    codes, absmax = nf4.quantize(weight)
    assert codes.shape == (nf4.codes_size(rows, columns),)
    assert absmax.shape == (nf4.absmax_size(rows, columns),)
    state = nf4.quant_state(absmax.float(), rows, columns, dtype=torch.float32)
    assert torch.equal(bnb.dequantize_4bit(codes.view(-1, 1), state), dequantized(weight))


@needs_kernel
@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (96, 192), (64, 1536)])
def test_the_packed_layout_is_that_of_bitsandbytes(rows: int, columns: int) -> None:
    """The only use of its private converter: our own must give the same bytes."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    weight = random_weight(rows, columns)
    packed, scales = nf4.pack(*nf4.quantize(weight), rows, columns)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    expected, state = _convert_weight_packed_for_cpu(codes, state)
    assert torch.equal(packed, expected.view(-1))
    assert torch.equal(scales.view(state.absmax.shape), state.absmax)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_packing_loses_nothing(bands: int, blocks: int, seed: int) -> None:
    rows, columns = 32 * bands, 64 * blocks
    codes, absmax = nf4.quantize(random_weight(rows, columns, seed))
    again = nf4.unpack(*nf4.pack(codes, absmax, rows, columns), rows, columns)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], absmax)


def test_a_code_lies_where_the_layout_says() -> None:
    """Row 3, column 10 is code 2 * 3 + 0 of line 5: low nibble of byte 6 of that line."""
    rows, columns = 32, 64
    codes = torch.zeros(rows * columns // 2, dtype=torch.uint8)
    codes[(3 * columns + 10) // 2] = 0xF0  # an even column is the high nibble
    packed, _ = nf4.pack(codes, torch.ones(32, dtype=torch.bfloat16), rows, columns)
    assert packed.nonzero().tolist() == [[5 * 32 + 6]]
    assert packed[5 * 32 + 6] == 0x0F


@needs_kernel
@pytest.mark.parametrize("tokens", [1, 2, 5, 33])
def test_the_packed_matmul_equals_the_dequantized_one_to_bf16_rounding(tokens: int) -> None:
    weight, x = random_weight(96, 192), random_weight(tokens, 192, seed=1)
    packed, absmax = nf4.pack(*nf4.quantize(weight), 96, 192)
    result = nf4.matmul_packed(x, packed, nf4.quant_state(absmax.view(3, 96), 96, 192))
    exact = x.double() @ dequantized(weight).double().T
    scale = x.double().abs() @ dequantized(weight).double().abs().T
    assert ((result.double() - exact).abs() <= 2**-8 * scale.clamp(min=1)).all()


def test_the_portable_matmul_is_exact_in_fp32() -> None:
    weight, x = random_weight(40, 192), random_weight(5, 192, seed=1).float()
    codes, absmax = nf4.quantize(weight)
    result = nf4.matmul(x, codes, nf4.quant_state(absmax.float(), 40, 192, dtype=torch.float32))
    torch.testing.assert_close(result, x @ dequantized(weight).T, rtol=1e-5, atol=1e-4)


def spec(layout: str, rows: int = 64, columns: int = 128) -> LinearSpec:
    return LinearSpec("w", rows, columns, "nf4", layout, torch.bfloat16)  # type: ignore[arg-type]


@needs_kernel
def test_both_layouts_of_a_linear_map_give_the_same_result_to_rounding() -> None:
    weight, x = random_weight(64, 128), random_weight(3, 128, seed=1)
    portable, packed = (
        spec(layout).build(spec(layout).encode(weight)) for layout in ("bitsandbytes", "cpu-packed")
    )
    torch.testing.assert_close(portable(x), packed(x), rtol=0.02, atol=0.1)


@pytest.mark.parametrize(
    "layouts", [("bitsandbytes", "cpu-packed"), ("cpu-packed", "bitsandbytes")]
)
def test_converting_in_place_gives_what_encoding_gives(layouts: tuple[str, str]) -> None:
    weight = random_weight(64, 128)
    tensors = spec(layouts[0]).encode(weight)
    spec(layouts[0]).convert(tensors, spec(layouts[1]))
    for one, other in zip(tensors, spec(layouts[1]).encode(weight), strict=True):
        assert torch.equal(one, other)


def test_a_shape_the_packed_layout_cannot_take_stays_portable() -> None:
    wished = spec("cpu-packed", rows=40, columns=128)
    assert not wished.packed
    tensors = wished.encode(random_weight(40, 128))
    before = [tensor.clone() for tensor in tensors]
    wished.convert(tensors, spec("bitsandbytes", rows=40))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_sizes_announced_are_sizes_written() -> None:
    for shape in ((64, 128), (40, 66), (3, 2)):
        linear = spec("cpu-packed", *shape)
        for announced, tensor in zip(
            linear.tensors, linear.encode(random_weight(*shape)), strict=True
        ):
            assert announced.shape == tuple(tensor.shape)
            assert announced.dtype == tensor.dtype


def test_switching_torch_to_avx2_switches_the_packed_kernel_off() -> None:
    import os
    import subprocess
    import sys

    code = "from mixchat.weights.nf4 import has_packed_kernel; print(has_packed_kernel())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "False"
