"""Mistral AI: Mixtral 8x7B and 8x22B, and models made of them, and Mistral-Small-4-119B-A6.5B.

Mistral 4 has latent attention. Its queries are scaled up at positions beyond the original context.
Only the text part is read.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import MLP_WITH_SHARED, Family, separate_experts

_MISTRAL4_DEFAULTS = {
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "q_lora_rank": 1024,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 0,
}
_MISTRAL4_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _read_mixtral(raw: dict[str, Any]) -> ModelConfig:
    keys = read.with_defaults(raw, num_local_experts=8, num_experts_per_tok=2)
    shape = read.shape_of(keys, rope_theta=1e6, rms_norm_eps=1e-5)
    return ModelConfig(**shape, **read.sliding_layers(raw))


def _read_mistral4(raw: dict[str, Any]) -> ModelConfig:
    raw = {**_MISTRAL4_DEFAULTS, **raw}
    if raw.get("n_group", 1) not in (1, None):
        raise CheckpointError("config.json: n_group above 1: such a router does not run")
    rope = raw.get("rope_parameters") or _MISTRAL4_ROPE
    if isinstance(rope, dict):
        # This key is the rotating part of a head, which `qk_rope_head_dim` has, too.
        rope = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    if not raw["q_lora_rank"]:
        raise CheckpointError("config.json: q_lora_rank is missing")
    return ModelConfig(
        **read.latent_model({**raw, "rope_parameters": rope}, rms_norm_eps=1e-6),
        norm_topk_prob=read.flag(raw, "norm_topk_prob", True),
        routed_scaling_factor=read.positive_number(raw, "routed_scaling_factor", 1.0),
    )


MIXTRAL = Family("mixtral", _read_mixtral, separate_experts("block_sparse_moe", "w1", "w2", "w3"))
MISTRAL4 = Family("mistral4", _read_mistral4, MLP_WITH_SHARED)
