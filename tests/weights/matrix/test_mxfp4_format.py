"""Matrices of a checkpoint in MXFP4 against transformers' reading, and damaged ones."""

import pytest
import torch
from matrix_tools import swapped
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mixchat.base.errors import CheckpointError
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.mxfp4 import MXFP4
from mixchat.weights.matrix.mxfp4_format import (
    component_names,
    component_specs,
    is_quantized,
    read_matrix,
)

EXPERTS, ROWS, COLUMNS = 3, 64, 96  # of a gate and an up that alternate
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def stored() -> Tensors:
    """The tensors of a stack X."""
    generator = torch.Generator().manual_seed(0)
    specs = component_specs("X", (EXPERTS, COLUMNS, ROWS))
    tensors = {
        spec.name: torch.randint(256, spec.shape, generator=generator).to(spec.dtype)
        for spec in specs
    }
    tensors["X_scales"] %= 253
    return tensors


def part(stored: Tensors, name: str) -> torch.Tensor:
    whole, _, rest = name.partition("[")
    return stored[whole][int(rest[:-1])]


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_a_part_of_a_stack_is_what_transformers_reads(stored, expert):
    matrix = read_matrix(f"X[{expert}]", lambda name: part(stored, name))
    expected = convert_moe_packed_tensors(stored["X_blocks"], stored["X_scales"])[expert]
    assert expected.shape == (COLUMNS, ROWS)
    assert torch.equal(matrix.dense(torch.bfloat16), expected.T)


def test_rows_that_alternate_are_taken_over_one_above_the_other(stored):
    matrix = read_matrix("X[1]", lambda name: part(stored, name))
    gate, up = (matrix.cut(range(first, ROWS, 2)) for first in (0, 1))
    spec = LinearSpec("w13", ROWS, COLUMNS, "mxfp4", torch.float32)
    tensors = spec.stack_quantized([gate, up])
    whole = matrix.dense(torch.float32)
    assert torch.equal(spec.dequantized(tensors), torch.cat((whole[::2], whole[1::2])))
    nibbles = swapped(part(stored, "X_blocks[1]").reshape(ROWS, -1))
    by_rows = torch.cat((nibbles[::2], nibbles[1::2])).reshape(-1)
    scales = torch.cat([cut.absmax for cut in (gate, up)])
    assert all(map(torch.equal, tensors, MXFP4.pack(by_rows, scales, COLUMNS)))


@pytest.mark.parametrize(
    ("scale", "said"), [(255, "NaN"), (254, "a scale that is too large"), (253, "too large")]
)
def test_a_scale_without_finite_weights_is_refused(stored, scale, said):
    part(stored, "X_scales[2]")[5, 1] = scale
    with pytest.raises(CheckpointError, match=rf"^X_scales\[2\]: holds .*{said}$"):
        read_matrix("X[2]", lambda name: part(stored, name))
    assert read_matrix("X[1]", lambda name: part(stored, name)).rows == ROWS


def test_names_say_which_tensors_are_in_mxfp4():
    assert component_names("X[7]") == ("X_blocks[7]", "X_scales[7]")
    assert component_names("X") == ("X_blocks", "X_scales")
    for available in (["X_blocks", "X_scales"], ["X_blocks"], ["X_scales"]):
        assert is_quantized("X[7]", available)
    for available in (["X"], ["X", "X_blocks", "X_scales"], ["X_bias"]):
        assert not is_quantized("X[7]", available)


def test_a_block_across_two_rows_is_refused():
    with pytest.raises(CheckpointError, match=r"^X: 80 columns in MXFP4 are not whole blocks"):
        component_specs("X", (4, 80, 64))
