"""The shape of a model, with the keys of Hugging Face's config.json, and its context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixchat.base.errors import CheckpointError, PromptTooLongError, UsageError
from mixchat.base.files import read_json_object
from mixchat.base.quantities import format_size

# The bounds of a context that nobody chose. Mixtral's tokens take 128 KiB each, and coding agents
# begin with prompts of 10,000 to 20,000 tokens.
DEFAULT_TOKENS, MAX_DEFAULT_TOKENS = 8192, 32768
# An upper bound: Mistral's longest token has 16 characters, the demo's 81, GPT-4's 128 spaces.
BYTES_PER_TOKEN = 128
_USUAL = 4  # an answer may take 1/4 of the context by default

_MAX_EXPERTS = 100_000  # in all layers, more than any model has
_MAX_FACTOR = 1000  # by which a context is stretched

LayerType = Literal["full_attention", "sliding_attention"]
RopeType = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]


@dataclass(frozen=True)
class RopeParameters:
    """The rotary embedding of a layer, under Hugging Face's names.

    `original_max_position_embeddings` is the context in tokens that the model was first trained
    for, which all types but "default" have. Keys that a type does not take have their defaults.
    partial_rotary_factor: the part of a head's columns that is rotated.
    """

    rope_theta: float
    rope_type: RopeType = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0

    @property
    def follows_length(self) -> bool:
        """Return whether the frequencies depend on the length of the sequence."""
        return self.rope_type in ("dynamic", "longrope")

    def stretched_for(self, context: int) -> int | None:
        """Return the length in tokens that the frequencies are stretched for, None if for none.

        All lengths are one to "longrope", which has two sets of frequencies.
        """
        original = self.original_max_position_embeddings
        if not self.follows_length or context <= original:
            return None
        return context if self.rope_type == "dynamic" else original + 1

    def rotated(self, head_dim: int) -> int:
        """Return how many columns of a head are rotated, which are its first."""
        return int(head_dim * self.partial_rotary_factor)

    def check(self, head_dim: int) -> None:
        """Raise `CheckpointError` if it cannot rotate heads of this size."""
        rotated = self.rotated(head_dim)
        if rotated % 2 or not 0 < rotated <= head_dim:
            raise CheckpointError(
                f"config.json: a partial_rotary_factor of {self.partial_rotary_factor:g} cannot "
                f"rotate pairs of {head_dim} columns"
            )
        for fault in self._faults(rotated):
            raise CheckpointError(f"config.json: rope type '{self.rope_type}' {fault}")

    def _faults(self, head_dim: int) -> Iterator[str]:
        rope_type, pairs = self.rope_type, head_dim // 2
        if not 1 <= self.factor <= _MAX_FACTOR:
            yield f"has the factor {self.factor:g}, not one from 1 to {_MAX_FACTOR}"
        if rope_type == "dynamic" and head_dim == 2:
            yield "needs a head_dim above 2"
        if rope_type == "yarn" and self.rope_theta <= 1:
            yield f"needs a rope_theta above 1, not {self.rope_theta:g}"
        if rope_type == "yarn" and self.beta_fast < self.beta_slow:
            yield "has a beta_fast that is smaller than its beta_slow"
        if rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            yield "needs a high_freq_factor above its low_freq_factor"
        if rope_type == "longrope" and self.original_max_position_embeddings == 1:
            yield "needs an original context above 1 token"
        if rope_type == "longrope" and {len(self.short_factor), len(self.long_factor)} != {pairs}:
            yield f"needs {pairs} numbers in short_factor and in long_factor"


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the features of a model, under Hugging Face's names.

    `intermediate_size` is an expert's. Only `weights/` asks for `model_type`.

    layer_types: one a layer, all "full_attention" if it is empty. `sliding_window` is in tokens.
    sliding_rope_parameters: of sliding layers, if they differ.
    norm_topk_prob: whether the weights of the chosen experts sum to one.
    scoring_func: makes these weights of the router's logits. routed_scaling_factor multiplies them.
    e_score_correction_bias: whether a number for each expert joins the scores for the choice.
    shared_expert_intermediate_size: of a dense part of each layer, which all tokens go through
    beside the experts, 0 for none. shared_expert_gate: whether its output is multiplied by the
    sigmoid of a gate.
    first_k_dense_replace: the count of layers at the beginning that have no experts, but a dense
    part of dense_intermediate_size. What holds experts counts the layers after them from 0.
    num_nextn_predict_layers: of a checkpoint's layers after these, which are left out.
    qk_norm: an RMSNorm of queries and keys before they rotate, of each head or all heads together.
    clip_qkv: the largest absolute value of queries, keys and values.
    attention_bias: of the q, k, v and o projections. `qkv_bias`: of q, k and v alone.
    moe_bias: of the router and the experts.
    attention_sinks: one logit a head in the sum of the softmax.
    swiglu_limit: experts compute (up + 1) * gate * sigmoid(swiglu_alpha * gate), with gate and up
    clamped, and otherwise silu(gate) * up.
    embedding_multiplier, attention_multiplier (of scores, None for 1 / sqrt(head_dim)),
    residual_multiplier, logits_scaling: in the weights of an installed model, so that only
    `weights/` asks for them.
    """

    model_type: str
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
    rope_parameters: RopeParameters
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] = ()
    sliding_rope_parameters: RopeParameters | None = None
    norm_topk_prob: bool = True
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    routed_scaling_factor: float = 1.0
    e_score_correction_bias: bool = False
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    first_k_dense_replace: int = 0
    dense_intermediate_size: int = 0
    num_nextn_predict_layers: int = 0
    qk_norm: Literal["head", "projection"] | None = None
    clip_qkv: float | None = None
    attention_bias: bool = False
    qkv_bias: bool = False
    attention_sinks: bool = False
    moe_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    def window(self, layer: int) -> int | None:
        """Return how many of the last tokens a layer attends to, or None for all."""
        return self.sliding_window if self._is_sliding(layer) else None

    def rope(self, layer: int) -> RopeParameters:
        if self._is_sliding(layer) and self.sliding_rope_parameters is not None:
            return self.sliding_rope_parameters
        return self.rope_parameters

    @property
    def num_moe_layers(self) -> int:
        """Return the count of layers with experts, which are the last ones."""
        return self.num_hidden_layers - self.first_k_dense_replace

    def mlp_intermediate_size(self, layer: int) -> int:
        """Return the intermediate size of a layer's dense part, 0 if it has none."""
        if layer < self.first_k_dense_replace:
            return self.dense_intermediate_size
        return self.shared_expert_intermediate_size

    @property
    def head_is_embedding(self) -> bool:
        """Return whether the head is the embedding, and not one times another factor."""
        return self.tie_word_embeddings and self.embedding_multiplier * self.logits_scaling == 1

    @property
    def ropes(self) -> tuple[RopeParameters, ...]:
        """Return the different rotary embeddings of the layers."""
        both = (self.rope_parameters, self.sliding_rope_parameters)
        return tuple(rope for rope in both if rope is not None)

    @property
    def largest_context(self) -> int:
        """Return how many tokens a sequence may have.

        transformers has no limit. A `factor` of "linear", "dynamic" or "yarn" multiplies the
        original context, and people add one without a new `max_position_embeddings`.
        """
        rope, stretched = self.rope_parameters, 0.0
        if rope.rope_type in ("linear", "dynamic", "yarn"):
            stretched = rope.factor * rope.original_max_position_embeddings
        return max(self.max_position_embeddings, int(stretched))

    @property
    def default_contexts(self) -> tuple[int, ...]:
        """Return the sizes in tokens of a context that nobody chose, the smallest first.

        Loading takes one of them by the free memory. They are few and far apart, so that a little
        more or less free memory gives the same size again. None is longer than the original
        context of a rope that follows the length, which would change short sequences, too.
        """
        ropes = (rope for rope in self.ropes if rope.follows_length)
        originals = (rope.original_max_position_embeddings for rope in ropes)
        most = min(MAX_DEFAULT_TOKENS, self.largest_context, *originals)
        doubled = (DEFAULT_TOKENS, 2 * DEFAULT_TOKENS, MAX_DEFAULT_TOKENS)
        return tuple(dict.fromkeys(min(tokens, most) for tokens in doubled))

    def _is_sliding(self, layer: int) -> bool:
        return bool(self.layer_types) and self.layer_types[layer] == "sliding_attention"

    def check(self) -> None:
        """Raise `CheckpointError` if the numbers do not fit together."""
        for fault in self._faults():
            raise CheckpointError(f"config.json: {fault}")
        for rope in self.ropes:
            rope.check(self.head_dim)

    def _faults(self) -> Iterator[str]:
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        layers, experts = self.num_hidden_layers, self.num_local_experts
        if heads % shared:
            yield f"{heads} attention heads cannot share {shared} key-value heads"
        if self.num_moe_layers < 1:
            dense = self.first_k_dense_replace
            yield f"none of {layers} layers has experts, because the first {dense} are dense"
        if layers * experts > _MAX_EXPERTS:
            yield f"{layers} layers of {experts} experts are more than any model has"
        if self.head_dim % 2:
            yield f"head_dim {self.head_dim} is odd"
        if self.hidden_size % 2:
            yield f"hidden_size {self.hidden_size} is odd"
        if self.moe_bias and self.hidden_size * self.intermediate_size % 128:
            # Else the biases, fp32, would not lie at multiples of their size.
            yield (
                f"experts with biases need a hidden_size ({self.hidden_size}) times "
                f"intermediate_size ({self.intermediate_size}) that is a multiple of 128"
            )
        if self.num_experts_per_tok > experts:
            yield f"{self.num_experts_per_tok} experts per token of only {experts}"
        if self.layer_types and len(self.layer_types) != layers:
            yield f"{len(self.layer_types)} layer_types for {layers} layers"


@dataclass(frozen=True)
class Context:
    """The tokens of prompt and answer together, and the model's largest number.

    is_chosen: by a person. If not, free memory decided.
    """

    tokens: int
    largest: int
    is_chosen: bool = True

    @classmethod
    def of(cls, config: ModelConfig, tokens: int | None) -> Context:
        """Return a context of `tokens`, None for the least that loading takes by itself.

        Raises `UsageError`.
        """
        largest = config.largest_context
        if tokens is None:
            return cls(config.default_contexts[0], largest, is_chosen=False)
        if not 1 < tokens <= largest:
            raise UsageError(f"--ctx-size {tokens}: this model takes 2 to {largest} tokens")
        return cls(tokens, largest)

    @property
    def usual_answer(self) -> int:
        """Return the default length of an answer in tokens.

        Free memory must not change answers, so it has no part in their length.
        """
        return (self.tokens if self.is_chosen else min(self.tokens, DEFAULT_TOKENS)) // _USUAL

    @property
    def in_words(self) -> str:
        size = f"{self.tokens:,} tokens"
        if self.tokens == self.largest:
            return f"{size}, the most that this model takes"
        reason = "" if self.is_chosen else ", chosen by the free memory"
        return f"{size}{reason}; --ctx-size can be up to {self.largest:,}"

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
        return self._too_long("the prompt", f"{tokens:,} tokens", tokens)

    def _too_long(self, name: str, size: str, tokens: int | None = None) -> PromptTooLongError:
        """Return the error. `tokens` is None if they were not counted."""
        if max(self.tokens, tokens or 0) >= self.largest:
            hint = f"Shorten it: this model reads {self.largest - 1:,} tokens at most."
        elif tokens is None:
            hint = f"Shorten it, or use a larger --ctx-size, up to {self.largest}."
        else:  # a power of two that leaves the usual part of the context to the answer
            wanted = tokens * _USUAL // (_USUAL - 1)
            hint = f"Shorten it, or use --ctx-size {min(1 << wanted.bit_length(), self.largest)}."
        holds = f"but the context holds {self.tokens:,} tokens, the answer included"
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
