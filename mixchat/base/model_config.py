"""The shape of a model, with the keys of Hugging Face's config.json, and its context."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixchat.base.errors import CheckpointError, PromptTooLongError, UsageError
from mixchat.base.files import read_json_object
from mixchat.base.quantities import format_size

DEFAULT_TOKENS = 8192  # Mixtral can do 32768, at 128 KiB each
# An upper bound: Mistral's longest token has 16 characters, the demo's 81, GPT-4's 128 spaces.
BYTES_PER_TOKEN = 128
_USUAL = 4  # an answer may take 1/4 of the context by default

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
_MAX_EXPERTS = 100_000  # in all layers, more than any model has
# The defaults of transformers' MixtralConfig.
_DEFAULTS: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a `MixtralForCausalLM`. `from_dict` checks it."""

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
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read the keys of a config.json. Raises `CheckpointError` if they are not a Mixtral's."""
        kind = raw.get("model_type")
        if kind != "mixtral":
            raise CheckpointError(
                f"not a Mixtral checkpoint: config.json says model_type {kind!r}",
                hint="mixchat runs MixtralForCausalLM checkpoints only.",
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported")
        values = {**_DEFAULTS, "num_key_value_heads": raw.get("num_attention_heads")}
        values |= {key: raw[key] for key in _POSITIVE_INTS if raw.get(key) is not None}
        values["num_key_value_heads"] = (
            values["num_key_value_heads"] or values["num_attention_heads"]
        )
        if "head_dim" not in values:
            hidden, heads = _positive_int(values, "hidden_size"), "num_attention_heads"
            values["head_dim"] = hidden // _positive_int(values, heads)
        rope = {**_rope(raw, "rope_scaling"), **_rope(raw, "rope_parameters")}
        window, eos = raw.get("sliding_window"), raw.get("eos_token_id")
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        config = cls(
            **{key: _positive_int(values, key) for key in _POSITIVE_INTS},
            rms_norm_eps=_positive_number(raw, "rms_norm_eps", 1e-5),
            rope_theta=_positive_number({**raw, **rope}, "rope_theta", 1e6),
            sliding_window=None if window is None else _positive_int(raw, "sliding_window"),
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            eos_token_ids=tuple(_whole_number("eos_token_id", token) for token in eos_ids),
        )
        config._check()
        return config

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read a config.json. Raises `CheckpointError`."""
        return cls.from_dict(read_json_object(path))

    def _check(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config.json: {self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key-value heads"
            )
        if self.num_hidden_layers * self.num_local_experts > _MAX_EXPERTS:
            raise CheckpointError(
                f"config.json: {self.num_hidden_layers} layers of {self.num_local_experts} experts "
                "are more than any model has"
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


@dataclass(frozen=True)
class Context:
    """The tokens of prompt and answer together, and the model's largest number."""

    tokens: int
    largest: int

    @classmethod
    def of(cls, config: ModelConfig, tokens: int | None) -> Context:
        """Return a context of `tokens`, or of the default size. Raises `UsageError`."""
        largest = config.max_position_embeddings
        if tokens is None:
            return cls(min(DEFAULT_TOKENS, largest), largest)
        if not 1 < tokens <= largest:
            raise UsageError(f"--ctx-size {tokens}: this model takes 2 to {largest} tokens")
        return cls(tokens, largest)

    @property
    def usual_answer(self) -> int:
        """Return the default length of an answer in tokens."""
        return self.tokens // _USUAL

    @property
    def longest_text(self) -> int:
        """Return the bytes that a text may have."""
        return self.tokens * BYTES_PER_TOKEN

    def check_text(self, text: str, name: str) -> None:
        """Raise `PromptTooLongError` if a text cannot fit."""
        if len(text) > self.longest_text:
            raise self.text_too_long(name)

    def text_too_long(self, name: str) -> PromptTooLongError:
        """Return the error for a text that has too many bytes."""
        return self._too_long(name, f"more than {format_size(self.longest_text)}")

    def prompt_too_long(self, tokens: int) -> PromptTooLongError:
        """Return the error for a prompt without room for an answer."""
        return self._too_long("the prompt", f"{tokens} tokens", tokens)

    def _too_long(self, name: str, size: str, tokens: int = 0) -> PromptTooLongError:
        hint = f"Shorten it: this model reads {self.largest - 1} tokens at most."
        if max(self.tokens, tokens) < self.largest:
            hint = f"--ctx-size can be up to {self.largest}."
        holds = f"the context holds {self.tokens} tokens, the answer included"
        return PromptTooLongError(f"{name} is too long: {size}, {holds}", hint=hint)


UNKNOWN_CONTEXT = Context(2**20, 2**20)
"""A context of unknown size. No model is known to have a larger one."""


def checkpoint_dtype(directory: Path) -> str | None:
    """Return the type of the weights in config.json, or None. Raises `CheckpointError`."""
    raw = read_json_object(directory / "config.json")
    value = raw.get("dtype", raw.get("torch_dtype"))
    return value if value in ("bfloat16", "float16", "float32") else None


def advised_sampling(directory: Path) -> dict[str, float]:
    """Return generation_config.json's sampling, by mixchat's flags. Raises `CheckpointError`."""
    raw = _generation_config(directory)
    values = {name: raw.get(name) for name in ("temperature", "top_p", "top_k", "min_p")}
    values["repeat_penalty"] = raw.get("repetition_penalty")
    kinds = {name: (int,) if name == "top_k" else (int, float) for name in values}
    return {
        name: value
        for name, value in values.items()
        if value is not None and type(value) in kinds[name]
    }


def advised_length(directory: Path) -> int | None:
    """Return the tokens of the longest answer by generation_config.json, or None.

    `max_length`, which includes the prompt, counts if `max_new_tokens` is missing. Raises
    `CheckpointError`.
    """
    raw = _generation_config(directory)
    named = (raw.get(name) for name in ("max_new_tokens", "max_length"))
    return next((length for length in named if type(length) is int and length > 0), None)


def _generation_config(directory: Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    return read_json_object(path) if path.exists() else {}


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


def _flag(values: dict[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {value!r}, not true or false")
    return value


def _rope(raw: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the settings of a plain rotary embedding."""
    rope = raw.get(key) or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"config.json: {key} is {rope!r}, not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or "factor" in rope:
        raise CheckpointError(
            f"config.json: rope type {kind!r} with scaling is not supported",
            hint="Models whose context was stretched (linear, dynamic, yarn, llama3) do not run "
            "yet; choose one with plain rotary embeddings.",
        )
    return rope


def _whole_number(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"config.json: {key} is {value!r}, not a whole number")
    return value
