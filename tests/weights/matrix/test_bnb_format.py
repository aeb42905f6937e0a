"""Matrices that bitsandbytes has quantized: read as it reads them, and refused where damaged."""

import bitsandbytes as bitsandbytes_package
import bitsandbytes.functional as bnb
import pytest
import torch
from bnb_tensors import COLUMNS, NAME, ROWS, STATE, described, description, oracle, quantized, read
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mixchat.base.errors import CheckpointError
from mixchat.weights.matrix.bnb_format import component_names, is_quantized, quant_type, read_matrix

nested_or_not = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
TYPES = ("nf4", "fp4")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@nested_or_not
@pytest.mark.parametrize("kind", TYPES)
def test_every_form_is_read_as_bitsandbytes_reads_it(kind, nested, storage):
    tensors, expected = quantized(kind, nested, storage)
    matrix = read(tensors)
    assert (matrix.rows, matrix.columns) == (ROWS, COLUMNS)
    assert (matrix.codes.dtype, matrix.codes.shape) == (torch.uint8, (ROWS * COLUMNS // 2,))
    assert (matrix.absmax.dtype, matrix.absmax.shape) == (torch.float32, (ROWS * COLUMNS // 64,))
    assert torch.equal(matrix.dense(torch.float32), expected)


@pytest.mark.parametrize("storage", [torch.int8, torch.float64], ids=str)
def test_rare_storage_types_are_the_same_bytes(storage):
    tensors, expected = quantized()
    tensors[NAME] = tensors[NAME].view(-1).view(storage).view(-1, 1)
    assert torch.equal(read(tensors).dense(torch.float32), expected)


@settings(max_examples=150)
@given(
    rows=st.integers(1, 9),
    half=st.integers(1, 70) | st.sampled_from([500, 512]),
    kind=st.sampled_from(TYPES),
    nested=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    blocksize=st.sampled_from([64, 128, 256, 1024]),
    seed=st.integers(0, 2**31),
)
def test_every_shape_is_read_as_bitsandbytes_reads_it(
    rows, half, kind, nested, dtype, blocksize, seed
):
    """Larger blocks become blocks of 64 without loss."""
    shape = (rows, 2 * half)
    tensors, _ = quantized(kind, nested, shape=shape, dtype=dtype, blocksize=blocksize, seed=seed)
    matrix = read(tensors, shape)
    assert matrix.absmax.shape == (-(-rows * 2 * half // 64),)
    assert torch.equal(matrix.dense(dtype), oracle(tensors, dtype))


def test_an_odd_count_of_weights_leaves_half_a_byte():
    even, expected = quantized(shape=(1, 36), nested=False)
    even[STATE] = description({**described(even), "shape": [5, 7]})
    matrix = read(even, (5, 7)).dense(torch.float32)
    assert torch.equal(matrix.view(-1), expected.view(-1)[:35])


@nested_or_not
def test_what_a_linear_layer_saves_is_read(nested, tmp_path):
    """`save_pretrained` writes a module's state dict to a file: this is Linear4bit's own."""
    name = NAME.removesuffix(".weight")
    layer = bitsandbytes_package.nn.Linear4bit(
        COLUMNS, ROWS, bias=False, compress_statistics=nested, quant_type="nf4"
    ).to("cpu")
    saved = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    save_file(saved, tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(component_names(NAME, tensors)) == set(tensors)
    expected = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(read(tensors).dense(torch.float32), expected)


@pytest.mark.parametrize("nested_dtype", ["bfloat16", "float16"])
def test_a_nested_absmax_in_half_precision_is_read_as_bitsandbytes_reads_it(nested_dtype):
    """bitsandbytes writes one where a model has run on a CPU before it was saved."""
    tensors, _ = quantized()
    tensors[STATE] = description({**described(tensors), "nested_dtype": nested_dtype})
    assert torch.equal(read(tensors).dense(torch.float32), oracle(tensors))


@pytest.mark.parametrize("kind", TYPES)
@nested_or_not
def test_names_alone_tell_what_belongs_together(kind, nested):
    tensors, _ = quantized(kind, nested, shape=(2, 64))
    available = {*tensors, "model.norm.weight", f"{NAME}.SCB", NAME.replace("w1", "w2")}
    names = component_names(NAME, available)
    assert names[0] == NAME
    assert len(names) == (6 if nested else 4)
    assert set(names) == set(tensors)
    assert is_quantized(NAME, available)
    assert quant_type(NAME, available) == kind


def test_a_dense_matrix_is_itself_alone():
    available = {NAME, f"{NAME}_absmax", "absmax"}
    assert component_names(NAME, available) == (NAME,)
    assert not is_quantized(NAME, available)
    assert quant_type(NAME, available) is None
    with pytest.raises(CheckpointError, match="not quantized by bitsandbytes"):
        read_matrix(NAME, {}.__getitem__, available, rows=2, columns=64)
