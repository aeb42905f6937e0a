"""`add_norm` beside the CPU's kernels."""

import pytest
import torch

from mixchat.kernels.cpu import rows
from mixchat.kernels.gpu.norm import add_norm


def difference_in_roundings(some: torch.Tensor, others: torch.Tensor) -> float:
    """Return the largest difference, in roundings of a bf16."""
    wide, expected = some.float(), others.float()
    return ((wide - expected).abs() / expected.abs().clamp(min=1e-3)).max().item() * 2**8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("count", "columns"),
    [(0, 64), (1, 48), (4, 2048), (5, 2880), (9, 2048), (64, 768), (70, 1024), (3, 8192)],
)
def test_a_sum_is_added_and_normalized_as_on_a_cpu(dtype, count, columns):
    x, weight = torch.randn(1, columns).to(dtype), torch.randn(columns).to(dtype)
    partials, finished = torch.randn(count, columns), torch.zeros(1, dtype=torch.int32)
    added = x + partials.sum(0).to(dtype)
    expected = rows.rms_norm(added, weight, 1e-5)
    normed = torch.full((columns,), torch.nan).to(dtype)
    for _ in range(2):  # the counter is 0 again
        summed = x.view(-1).clone()
        add_norm(summed, partials, weight, normed, 1e-5, finished)
        # Sums in another order may fall on the other side of a rounding, which the norm sees, too.
        assert difference_in_roundings(summed, added[0]) <= 2
        assert difference_in_roundings(normed, expected[0]) <= 4
        assert not finished.item()
    if count <= 1:  # there is one order only
        assert torch.equal(summed, added[0])


@pytest.mark.parametrize(("count", "columns"), [(1, 48), (9, 2048), (70, 1024)])
def test_a_sum_of_outputs_is_normalized_alone_and_added_with_a_factor(count, columns):
    """As Gemma 4 does, whose parts of layers have norms of their outputs."""
    x, weight = torch.randn(1, columns).bfloat16(), torch.randn(columns)
    partials, finished = torch.randn(count, columns), torch.zeros(1, dtype=torch.int32)
    unused, out = torch.randn(columns).bfloat16(), torch.full((1, columns), torch.nan)
    add_norm(unused, partials, weight, out[0], 1e-5, finished, adds=False)
    expected = rows.rms_norm(partials.sum(0, keepdim=True).bfloat16(), weight, 1e-5)
    assert difference_in_roundings(out, expected) <= 4
    assert torch.equal(out, out.bfloat16().float())
    normed, summed = torch.empty(columns).bfloat16(), x[0].clone()
    add_norm(summed, out, weight, normed, 1e-5, finished, factor=0.75)
    assert torch.equal(summed, (x + out.bfloat16())[0] * 0.75)
    assert difference_in_roundings(normed, rows.rms_norm(summed[None], weight, 1e-5)[0]) <= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_norm_is_rounded_before_it_is_multiplied_unless_weights_are_in_fp32(dtype):
    """The CPU rounds twice, as transformers does. Rounded once, a hundred numbers differ."""
    x, weight = torch.randn(1, 2048).bfloat16(), torch.randn(2048).to(dtype)
    normed, finished = torch.empty_like(x[0]), torch.zeros(1, dtype=torch.int32)
    add_norm(x.view(-1), torch.empty(0, 2048), weight, normed, 1e-5, finished)
    expected = rows.rms_norm(x, weight, 1e-5).view(-1)
    assert (normed != expected).sum() < 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [72, 16384])
def test_some_columns_of_sums_are_normalized_and_may_be_where_the_norm_goes(dtype, columns):
    partials, weight = torch.randn(3, 128 + columns), torch.randn(columns).to(dtype)
    finished, some = torch.zeros(1, dtype=torch.int32), partials[:, 96 : 96 + columns]
    expected = rows.rms_norm(some.sum(0).to(dtype)[None], weight, 1e-6)[0]
    before = partials.clone()
    add_norm(torch.empty(columns).to(dtype), some, weight, some[2], 1e-6, finished, adds=False)
    assert difference_in_roundings(some[2], expected) <= 4
    some[2] = before[2, 96 : 96 + columns]
    assert torch.equal(partials, before)
