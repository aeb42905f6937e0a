"""ERNIE 4.5, by Baidu: ERNIE-4.5-21B-A3B, ERNIE-4.5-300B-A47B.

Probabilities with a correction choose experts. transformers divides their sum by `moe_norm_min` if
it is smaller, which is 1e-12.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.config_keys import (
    dense_parts,
    flag,
    layer_count,
    of_experts,
    shape_of,
    with_defaults,
)
from mixchat.weights.families.family import Family, Slice, Tensors
from mixchat.weights.families.tensors import MLP_EXPERTS, decoder_tensors, shared_expert

_DEFAULTS = {
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    raw = with_defaults(raw, **_DEFAULTS)
    last = layer_count(raw) - 1
    for key, usual in (("moe_layer_interval", (1,)), ("moe_layer_end_index", (-1, last))):
        if raw.get(key, usual[0]) not in usual:
            raise CheckpointError(
                f"config.json: {key} is {raw[key]!r:.80}: dense layers after layers with experts "
                "do not run"
            )
    if flag(raw, "use_bias"):
        raise CheckpointError("config.json: use_bias is true: models with these biases do not run")
    experts, choices = raw["moe_num_experts"], raw["moe_k"]
    keys = of_experts({"num_experts": experts, "num_experts_per_tok": choices, **raw})
    return ModelConfig(
        **shape_of(keys, rope_theta=5e5, rms_norm_eps=1e-5),
        **dense_parts(raw, "moe_num_shared_experts", "moe_layer_start_index"),
        e_score_correction_bias=True,
    )


def _layer(config: ModelConfig, prefix: str) -> Tensors:
    correction, experts = "e_score_correction_bias", config.num_local_experts
    for name, slices in MLP_EXPERTS(config, prefix):
        if name.endswith(correction):
            slices = (Slice(f"{prefix}mlp.moe_statics.{correction}", (1, experts)),)
        yield name, slices
    if config.shared_expert_intermediate_size:
        yield from shared_expert(config, prefix, "mlp.shared_experts")


def _tensors(config: ModelConfig) -> Tensors:
    return decoder_tensors(config, _layer, rotates_neighbours=True)


ERNIE4_5_MOE = Family("ernie4_5_moe", _read_config, _tensors)
