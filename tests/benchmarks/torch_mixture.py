"""A Mixtral checkpoint in torch: to train it, and to see what its matrices multiply.

Its modules have the checkpoint's names, but for `block_sparse_moe`, which is `mlp` here.

D = hidden size, E = experts, K = experts of a token, N = tokens.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import GenerationConfig

WEIGHTS = "model.safetensors"
SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "head_dim"),
)


class Expert(nn.Module):
    """A feed-forward block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """A layer's experts and its router."""

    def __init__(self, width: int, inner: int, experts: int, choices: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(experts))
        self.choices = choices

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.flatten(0, -2)  # [N, D]
        weights, chosen = self.gate(x).topk(self.choices)  # [N, K]
        weights, out = weights.softmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                scaled = expert(x[rows]) * weights[rows, places, None]
                out.index_add_(0, rows, scaled.to(out.dtype))
        return out.view_as(hidden)


def read_mixture(
    checkpoint: Path, experts: int | None = None, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """Return the model of a checkpoint of one file, or of its first experts."""
    raw = json.loads((checkpoint / "config.json").read_bytes())
    count = experts or raw["num_local_experts"]
    choices = min(count, raw["num_experts_per_tok"])
    rope = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    config = LlamaConfig(**{key: raw[key] for key in SAME if key in raw}, rope_parameters=rope)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        for layer in model.model.layers:
            layer.mlp = Mixture(raw["hidden_size"], raw["intermediate_size"], count, choices)
    state = {}
    for name, value in load_file(checkpoint / WEIGHTS).items():
        number = re.search(r"\.experts\.(\d+)\.", name)
        if number is None or int(number[1]) < count:
            some = value[:count] if name.endswith(".gate.weight") else value
            state[name.replace("block_sparse_moe", "mlp")] = some.to(dtype)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


@torch.inference_mode()
def write_text(model: LlamaForCausalLM, first: int, windows: int, length: int) -> Tensor:
    """Return windows [windows, length] that the model writes, as `mixchat calibrate` lets it."""
    torch.manual_seed(0)
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        min_length=length,
        max_length=length,
        pad_token_id=first,
    )
    start = torch.full((windows, 1), first)
    mask = torch.ones_like(start)
    return model.generate(start, attention_mask=mask, generation_config=sampling)


@torch.inference_mode()
def mean_squares(model: LlamaForCausalLM, windows: Tensor) -> dict[str, Tensor]:
    """Return the mean square of each column's inputs by the matrix's name in the checkpoint.

    It is llama.cpp's importance matrix. A matrix that no token of the windows came to is missing.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(name: str, x: Tensor) -> None:
        sums[name] = sums.get(name, 0) + x.float().pow(2).flatten(0, -2).sum(0)
        rows[name] = rows.get(name, 0) + x[..., 0].numel()

    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: add(name, given[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for window in windows:
        with torch.autocast("cpu", torch.bfloat16):
            model(window[None])
    for hook in hooks:
        hook.remove()
    return {
        f"{name.replace('.mlp.', '.block_sparse_moe.')}.weight": total / rows[name]
        for name, total in sums.items()
    }
