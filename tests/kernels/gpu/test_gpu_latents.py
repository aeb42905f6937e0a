"""The kernels of latent attention beside what it does on a CPU."""

import pytest
import torch
from gpu_matrices import Stored, stored
from gpu_tools import addresses_of, length_of

from mixchat.base.rope_parameters import RopeParameters
from mixchat.engine.layers.operations import RMSNorm
from mixchat.engine.layers.rope import RotaryEmbedding
from mixchat.kernels.gpu.kv_store import KVTensors
from mixchat.kernels.gpu.latents import latent_heads
from mixchat.kernels.gpu.product import head_products
from mixchat.weights.matrix.quant_type import QuantType

CPU = torch.device("cpu")
EPS = 1e-6
WITHIN = {torch.bfloat16: 2**-7, torch.float16: 2**-8, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("heads", "width", "latent", "turning", "splits", "apart", "past"),
    [(3, 192, 512, 64, 1, True, 5), (4, 24, 48, 16, 9, False, 0), (2, 64, 64, 48, 2, True, 9)],
)
def test_a_token_s_queries_latent_and_key(
    dtype, bits, heads, width, latent, turning, splits, apart, past
):
    # The last position is the last of the tables, too.
    rotation = RotaryEmbedding(RopeParameters(1e4), turning, 10, dtype, CPU)
    norm = RMSNorm(torch.randn(latent).to(dtype), EPS)
    own = heads * (width + turning)
    latents = torch.randn(splits, (40 if apart else own) + latent + turning)
    queries = torch.randn(2, own) if apart else latents
    number_type = torch.int8 if bits == 8 else dtype
    scales = torch.zeros(2, 1, 10) if bits == 8 else None
    numbers, rotating = (torch.zeros(1, 10, n).to(number_type) for n in (latent, turning))
    tensors = KVTensors(numbers[None], scales, rotating)
    kept, whole = torch.zeros(heads, width).to(dtype), torch.zeros(heads, latent + turning)
    whole = whole.to(dtype)
    told = norm.weight, EPS, rotation.tables, length_of(past)
    latent_heads(queries, latents, *told, tensors, kept, whole)

    row, token = queries.sum(0).to(dtype), latents.sum(0).to(dtype)
    position, within = slice(past, past + 1), {"rtol": WITHIN[dtype], "atol": WITHIN[dtype]}
    torch.testing.assert_close(kept, row[: heads * width].view(kept.shape), **within)
    turned = rotation(row[heads * width : own].view(1, heads, turning), position)[0]
    torch.testing.assert_close(whole[:, latent:], turned, **within)
    assert not whole[:, :latent].any()
    value = norm(token[-latent - turning : -turning][None])[0].float()
    key = rotation(token[-turning:].view(1, 1, -1), position).view(-1).float()
    if bits == 8:
        within = {"rtol": 0.04, "atol": 0.04}
    for number, (expected, place) in enumerate(((key, rotating), (value, numbers))):
        factor = 1.0 if scales is None else scales[number, 0, past]
        torch.testing.assert_close(place[0, past].float() * factor, expected, **within)
        assert (place != 0).any(-1).sum() == 1


@pytest.mark.parametrize("quant_type", ["none", "int8", "int6", "nf4"])
@pytest.mark.parametrize(("height", "columns"), [(64, 192), (96, 64), (64, 512), (40, 64)])
def test_each_head_has_its_own_matrix(quant_type: QuantType, height, columns):
    heads: list[Stored] = [stored(quant_type, height, columns, seed=n) for n in range(3)]
    x = torch.randn(3, columns).bfloat16()
    out = torch.full((3, height + 16), torch.nan).bfloat16()
    matrices = [head.matrix for head in heads]
    codes = [matrix.codes for matrix in matrices]
    scales = [m.codes if m.absmax is None else m.absmax for m in matrices]
    with addresses_of(*codes, *scales) as addresses:
        head_products(x, addresses.view(2, 3), matrices[0].form, matrices[0].levels, out)
    for row, head, result in zip(x, heads, out, strict=True):
        expected = head(row).float()
        assert (result[:height] - expected).abs().max() < 2**-7 * expected.abs().max()
    assert out[:, height:].isnan().all()
