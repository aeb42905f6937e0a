"""The mixture in torch computes what transformers' Mixtral does, and a router tells kinds apart."""

import json

import pytest
import torch
from part_experts import manual, train_router
from torch_mixture import mean_squares, read_mixture
from transformers import MixtralConfig, MixtralForCausalLM


@pytest.fixture
def checkpoint(tmp_path):
    """Return a tiny model of four experts."""
    return made(tmp_path / "mixture", 4, 2)


def made(folder, experts, choices):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=experts, num_experts_per_tok=choices,
        max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(raw | {"rope_theta": 1e4}))
    return folder


@torch.inference_mode()
def test_the_mixture_in_torch_computes_what_transformers_does(checkpoint):
    ids = torch.randint(40, (1, 12))
    expected = MixtralForCausalLM.from_pretrained(checkpoint)(ids).logits
    torch.testing.assert_close(read_mixture(checkpoint)(ids).logits, expected)


@torch.inference_mode()
def test_mean_squares_count_the_tokens_that_chose_an_expert(checkpoint):
    model, seen = read_mixture(checkpoint), []
    expert = model.model.layers[1].mlp.experts[2].w1
    expert.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    found = mean_squares(model, torch.randint(40, (3, 12)))
    rows = torch.cat(seen).float()
    assert 0 < len(rows) < 36
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    torch.testing.assert_close(found[name], rows.pow(2).mean(0))
    assert found["lm_head.weight"].shape == (16,)


def test_the_first_expert_alone_computes_all_tokens(checkpoint):
    one = read_mixture(checkpoint, experts=1).model.layers[0].mlp
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(one(x), one.experts[0](x))


def test_a_router_tells_kinds_apart():
    torch.manual_seed(0)
    kinds = torch.arange(3).repeat_interleave(50)
    inputs = torch.randn(150, 8) * 0.1
    inputs[torch.arange(150), kinds] += 30
    inputs[:, 7] = 0  # of the padding
    router = train_router(inputs, kinds, 3)
    assert ((inputs @ router.T).argmax(-1) == kinds).all()
    assert not router[:, 7].any()


def test_a_manual_page_loses_its_marks():
    page = '.\\" comment\n.SH NAME\nls \\- list \\fBfiles\\fR'
    assert list(manual([page])) == ["NAME\nls - list files"]
