"""Mixtral, by Mistral AI: 8x7B, 8x22B and models made of them."""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import Family, separate_experts


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    keys = read.with_defaults(raw, num_local_experts=8, num_experts_per_tok=2)
    shape = read.shape_of(keys, rope_theta=1e6, rms_norm_eps=1e-5)
    return ModelConfig(**shape, **read.sliding_layers(raw))


MIXTRAL = Family("mixtral", _read_config, separate_experts("block_sparse_moe", "w1", "w2", "w3"))
