"""Tools that tests of engines share."""

from collections.abc import Sequence
from typing import Any

import torch

from mixchat.base.options import SamplingOptions
from mixchat.engine.generate import Engine
from mixchat.engine.speculation import Speculation

GREEDY = SamplingOptions(temperature=0)
# Latent attention with matrices that the kernels take.
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 32,
}
# Tiny models by a family's features, with matrices that the kernels take.
FAMILIES: dict[str, dict[str, Any]] = {
    "norms of heads": {"model_type": "qwen3_moe", "moe_intermediate_size": 128},
    "shared expert": {
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 192,
    },
    "correction and dense layer": {
        "model_type": "dots1",
        "num_hidden_layers": 3,
        "moe_intermediate_size": 128,
        "intermediate_size": 192,
    },
    "correction of probabilities": {
        "model_type": "ernie4_5_moe",
        "num_hidden_layers": 3,
        "moe_intermediate_size": 128,
        "intermediate_size": 192,
    },
    "half of a head rotated": {
        "model_type": "glm4_moe",
        "num_hidden_layers": 4,
        "head_dim": 64,
        "moe_intermediate_size": 128,
        "intermediate_size": 192,
        "first_k_dense_replace": 2,
    },
    "states beside gated attention": {
        "model_type": "qwen3_next",
        "head_dim": 64,
        "partial_rotary_factor": 0.5,
    },
    "short convolutions": {"model_type": "lfm2_moe", "head_dim": 32, "num_attention_heads": 2},
    "Mamba2 beside attention without positions": {"model_type": "granitemoehybrid"},
    "norms of projections": {"model_type": "olmoe", "num_attention_heads": 2, "head_dim": 32},
    "heads of a layer, gated": {
        "model_type": "laguna",
        "head_dim": 64,
        "moe_intermediate_size": 128,
        "intermediate_size": 192,
    },
    "window and rope of a layer": {"model_type": "mellum", "moe_intermediate_size": 128},
    "sinks and biases": {"model_type": "gpt_oss"},
    "sinks, biases and experts in mxfp4": {"model_type": "gpt_oss", "stored_as": "mxfp4"},
    "multipliers": {"model_type": "granitemoe"},
    "latents": {"model_type": "glm4_moe_lite", **_LATENT, "q_lora_rank": 64},
    "queries scaled by their position": {
        "model_type": "mistral4",
        **_LATENT,
        "qk_rope_head_dim": 64,
        "head_dim": 128,
        "q_lora_rank": 64,
    },
    "latents of keys alone": {"model_type": "deepseek_v2", **_LATENT, "q_lora_rank": None},
    "latents and groups of experts": {
        "model_type": "deepseek_v3",
        **_LATENT,
        "q_lora_rank": 64,
        "num_local_experts": 8,
        "n_group": 4,
        "topk_group": 2,
    },
    "norms of outputs, wide full layers": {
        "model_type": "gemma4",
        "moe_intermediate_size": 128,
        "intermediate_size": 192,
        "head_dim": 32,
        "global_head_dim": 64,
    },
}

# Of these, a model for each way through a pass. How each feature is computed is tested with layers.
WAYS = {
    name: FAMILIES[name]
    for name in (
        "shared expert",
        "correction and dense layer",
        "half of a head rotated",
        "states beside gated attention",
        "short convolutions",
        "sinks, biases and experts in mxfp4",
        "multipliers",
        "latents",
        "norms of outputs, wide full layers",
    )
}


# Those with states, which can be cut back to checkpoints alone.
RECURRENT = (
    "states beside gated attention",
    "short convolutions",
    "Mamba2 beside attention without positions",
)


class Always(Speculation):
    """Speculation that never stops, however slow it is."""

    @property
    def pays(self) -> bool:
        return True


def answer(
    engine: Engine, prompt: Sequence[int], sampling: SamplingOptions = GREEDY, **options: Any
) -> list[int]:
    """Return the tokens of an answer, 12 at most if nothing else is given."""
    given = {"stop_ids": set(), "max_tokens": 12, **options}
    return list(engine.generate(prompt, sampling=sampling, **given))


@torch.inference_mode()
def logits(engine: Engine, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the logits [T, V] of all positions, computed `chunk` tokens at a time."""
    cache = engine.held()[1]
    cache.cut(0)
    forward = engine.passes.model.forward
    return torch.cat([forward(part, cache, logits_of=slice(None)) for part in ids.split(chunk)])


def ids_of(count: int, seed: int = 0) -> list[int]:
    """Return random tokens of the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (count,), generator=generator).tolist()


def cache_content(engine: Engine, tokens: int | None = None) -> list[torch.Tensor]:
    """Return keys and values of all layers, of the first tokens or of all that are held."""
    ids, cache = engine.held()
    extent = cache.extent.until(len(ids) if tokens is None else tokens)
    return [tensor for layer in cache.layers for tensor in layer.content(extent).values()]
