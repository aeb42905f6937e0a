"""The models with a short name, and their config.json, so that no hub has to be asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownModel:
    """A repository on the hub, with its config.json and the GB that a download fetches."""

    repo: str
    config: dict[str, Any]
    fetched_gb: int


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

KNOWN: dict[str, KnownModel] = {
    "instruct": KnownModel("mistralai/Mixtral-8x7B-Instruct-v0.1", MIXTRAL, 93),
    "base": KnownModel("mistralai/Mixtral-8x7B-v0.1", MIXTRAL, 93),
    "8x22b": KnownModel("mistralai/Mixtral-8x22B-Instruct-v0.1", _MIXTRAL_8X22B, 281),
}
"""By the name that commands take."""

ALIASES = {name: model.repo for name, model in KNOWN.items()}


def known_model(repo: str) -> KnownModel | None:
    """Return the known model of a repository."""
    return next((model for model in KNOWN.values() if model.repo == repo), None)
