"""A padded and rescaled model computes what the model that it is made of computes."""

from typing import Any

import pytest
import torch
from padded_model import Tensors, padded, padded_config, rescaled

CONFIG: dict[str, Any] = {
    "hidden_size": 72,
    "head_dim": 8,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "num_hidden_layers": 2,
}
INNER, VOCAB = 40, 50


def random_tensors() -> Tensors:
    random = torch.Generator().manual_seed(0)
    hidden, kv_rows = CONFIG["hidden_size"], CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, hidden), "output": (VOCAB, hidden)}
    shapes["output_norm"] = (hidden,)
    for layer in range(CONFIG["num_hidden_layers"]):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (hidden,),
                "attn_q": (hidden, hidden),
                "attn_k": (kv_rows, hidden),
                "attn_v": (kv_rows, hidden),
                "attn_output": (hidden, hidden),
                "ffn_norm": (hidden,),
                "ffn_gate": (INNER, hidden),
                "ffn_up": (INNER, hidden),
                "ffn_down": (hidden, INNER),
            }.items()
        }
    return {
        name: (torch.randn(shape, generator=random) / shape[-1] ** 0.5).numpy()
        for name, shape in shapes.items()
    }


def log_probabilities(tensors: Tensors, config: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Compute a Llama, [N, V], with the rows of q and k in llama.cpp's order, in fp64."""
    weight = {name: torch.from_numpy(tensor).double() for name, tensor in tensors.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    angle = torch.arange(len(ids))[:, None] * config["rope_theta"] ** -(
        torch.arange(0, config["head_dim"], 2).double() / config["head_dim"]
    )
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # [N, 1, head_dim / 2]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        return x * (mean + config["rms_norm_eps"]).rsqrt() * weight[name]

    def rotated(x: torch.Tensor, count: int) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(len(ids), count, -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2).transpose(0, 1)  # [heads, N, head_dim]

    x = weight["token_embd"][ids]
    for layer in range(config["num_hidden_layers"]):
        blk = f"blk.{layer}."
        inputs = norm(x, f"{blk}attn_norm")
        q = rotated(inputs @ weight[f"{blk}attn_q"].T, heads)
        k = rotated(inputs @ weight[f"{blk}attn_k"].T, kv_heads)
        v = (inputs @ weight[f"{blk}attn_v"].T).reshape(len(ids), kv_heads, -1).transpose(0, 1)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, *(one.repeat_interleave(heads // kv_heads, 0) for one in (k, v)), is_causal=True
        )
        x = x + out.transpose(0, 1).flatten(1) @ weight[f"{blk}attn_output"].T
        inputs = norm(x, f"{blk}ffn_norm")
        gate, up = (inputs @ weight[f"{blk}ffn_{name}"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ weight[f"{blk}ffn_down"].T
    return (norm(x, "output_norm") @ weight["output"].T).log_softmax(-1)


def test_a_padded_and_rescaled_model_computes_the_same():
    dense, ids = random_tensors(), torch.randint(VOCAB, (20,))
    config = padded_config(CONFIG, 96)
    wide = padded(dense, 96)
    other = rescaled(wide, CONFIG["head_dim"])
    expected = log_probabilities(dense, CONFIG, ids)
    torch.testing.assert_close(log_probabilities(wide, config, ids), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(log_probabilities(other, config, ids), expected, atol=1e-6, rtol=0)
    assert wide["blk.0.attn_k"].shape == (32, 96)
    assert all((wide[name] != other[name]).any() for name in wide if name != "token_embd")


def test_heads_of_a_group_stay_together():
    with pytest.raises(ValueError, match="80 is no multiple of 3 heads of 8"):
        padded_config(CONFIG, 80)
