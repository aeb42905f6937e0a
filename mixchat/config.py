"""A model's shape, with the keys of Hugging Face's config.json word for word."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixchat.errors import CheckpointError

_POSITIVE_INTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a `MixtralForCausalLM`; `from_dict` and `from_file` build and check it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read the keys of a config.json.

        Raises `CheckpointError` where it is not a Mixtral, or a value is missing or impossible.
        """
        kind = raw.get("model_type")
        if kind != "mixtral":
            raise CheckpointError(
                f"not a Mixtral checkpoint: config.json says model_type {kind!r}",
                hint="mixchat runs MixtralForCausalLM checkpoints only.",
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported")
        values = {key: raw.get(key) for key in _POSITIVE_INTS}
        values["num_key_value_heads"] = (
            values["num_key_value_heads"] or values["num_attention_heads"]
        )
        values["num_local_experts"] = values["num_local_experts"] or 8
        values["num_experts_per_tok"] = values["num_experts_per_tok"] or 2
        if values["head_dim"] is None and raw.get("num_attention_heads"):
            values["head_dim"] = _positive_int(raw, "hidden_size") // _positive_int(
                raw, "num_attention_heads"
            )
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else rope
        if rope_type not in (None, "default"):
            raise CheckpointError(f"config.json: rope type {rope_type!r} is not supported")
        eos = raw.get("eos_token_id")
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        config = cls(
            **{key: _positive_int(values, key) for key in _POSITIVE_INTS},
            rms_norm_eps=_positive_number(raw, "rms_norm_eps", 1e-5),
            rope_theta=_positive_number({**raw, **rope}, "rope_theta", 1e6),
            sliding_window=_optional_int(raw, "sliding_window"),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            bos_token_id=_optional_int(raw, "bos_token_id"),
            eos_token_ids=tuple(_whole_number("eos_token_id", token) for token in eos_ids),
        )
        config._check()
        return config

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read a config.json. Raises `CheckpointError` where it is missing, not JSON, or wrong."""
        try:
            raw = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"{path.parent}: there is no config.json") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not JSON ({error})") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path}: not a JSON object")
        return cls.from_dict(raw)

    def _check(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config.json: {self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config.json: head_dim {self.head_dim} is odd")
        if self.hidden_size % 2:
            raise CheckpointError(f"config.json: hidden_size {self.hidden_size} is odd")
        if self.num_experts_per_tok > self.num_local_experts:
            raise CheckpointError(
                f"config.json: {self.num_experts_per_tok} experts per token of only "
                f"{self.num_local_experts}"
            )


def _positive_int(values: dict[str, Any], key: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise CheckpointError(f"config.json: {key} is {value!r}, not a positive whole number")
    return value


def _positive_number(values: dict[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise CheckpointError(f"config.json: {key} is {value!r}, not a positive number")
    return float(value)


def _optional_int(values: dict[str, Any], key: str) -> int | None:
    value = values.get(key)
    return None if value is None else _whole_number(key, value)


def _whole_number(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"config.json: {key} is {value!r}, not a whole number")
    return value
