"""The models with a short name, and their config.json, so that no hub has to be asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from mixchat.weights.families.read_config import read_config, slices


@dataclass(frozen=True)
class KnownModel:
    """A repository on the hub, with its config.json."""

    repo: str
    config: dict[str, Any]

    @property
    def experts_quant_type(self) -> Literal["mxfp4"] | None:
        """Return the type of the experts' matrices in the checkpoint, None for bf16."""
        return "mxfp4" if "quantization_config" in self.config else None

    def with_layers(self, layers: int) -> dict[str, Any]:
        """Return the config.json of the first layers alone."""
        config = {**self.config, "num_hidden_layers": layers}
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:layers]
        return config

    @property
    def fetched_gb(self) -> int:
        """Return the GB that a download fetches."""
        sizes: dict[str, float] = {}
        for name, sources in slices(read_config(self.config)).items():
            in_4_bits = self.experts_quant_type and ".experts." in name and name.endswith(".weight")
            sizes |= {
                source.name: prod(source.shape) * (4.25 / 8 if in_4_bits else 2)
                for source in sources
            }
        return round(sum(sizes.values()) / 1e9)


MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXTRAL_8X22B = MIXTRAL | {
    "vocab_size": 32768,
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "max_position_embeddings": 65536,
}
# Values are the defaults of transformers' classes, but for those that are named. Here the layers,
# head_dim, the context, rope_theta and norm_topk_prob are the repositories', in all models the
# tokens.
_QWEN3 = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e7,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
# The class describes 120b. 20b has fewer layers and experts.
_GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "attention_bias": True,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "swiglu_limit": 7.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "tie_word_embeddings": False,
    "eos_token_id": 200002,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}
# The experts are half as wide as the class has them.
_OLMOE = {
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "clip_qkv": None,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 50279,
}
# All is the repository's, as other programs quote it. The multipliers are also those of 1B.
_GRANITE = {
    "model_type": "granitemoe",
    "vocab_size": 49155,
    "hidden_size": 1536,
    "intermediate_size": 512,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 40,
    "num_experts_per_tok": 8,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.015625,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e7,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# The ropes and the layers with a window are the repository's, as other programs quote them.
_MELLUM2 = {
    "model_type": "mellum",
    "vocab_size": 98304,
    "hidden_size": 2304,
    "moe_intermediate_size": 896,
    "num_hidden_layers": 28,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "sliding_window": 1024,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 7,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "yarn",
            "rope_theta": 500000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 8192,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": 1.2772588722239782,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 28,
}

KNOWN: dict[str, KnownModel] = {
    "instruct": KnownModel("mistralai/Mixtral-8x7B-Instruct-v0.1", MIXTRAL),
    "base": KnownModel("mistralai/Mixtral-8x7B-v0.1", MIXTRAL),
    "8x22b": KnownModel("mistralai/Mixtral-8x22B-Instruct-v0.1", _MIXTRAL_8X22B),
    "qwen3": KnownModel("Qwen/Qwen3-30B-A3B-Instruct-2507", _QWEN3),
    "qwen3-coder": KnownModel("Qwen/Qwen3-Coder-30B-A3B-Instruct", _QWEN3),
    "gpt-oss": KnownModel("openai/gpt-oss-20b", _GPT_OSS),
    "mellum2": KnownModel("JetBrains/Mellum2-12B-A2.5B-Instruct", _MELLUM2),
    "olmoe": KnownModel("allenai/OLMoE-1B-7B-0125-Instruct", _OLMOE),
    "granite": KnownModel("ibm-granite/granite-3.1-3b-a800m-instruct", _GRANITE),
}
"""By the name that commands take."""

ALIASES = {name: model.repo for name, model in KNOWN.items()}


def known_model(repo: str) -> KnownModel | None:
    """Return the known model of a repository."""
    return next((model for model in KNOWN.values() if model.repo == repo), None)
