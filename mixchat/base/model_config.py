"""The shape of a model, with the keys of Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log, sqrt
from pathlib import Path
from typing import Any, Literal

from mixchat.base.errors import CheckpointError
from mixchat.base.files import read_json_object
from mixchat.base.options import accepted_numbers
from mixchat.base.rope_parameters import RopeParameters

# The bounds of a context that nobody chose. Mixtral's tokens take 128 KiB each, and coding agents
# begin with prompts of 10,000 to 20,000 tokens.
DEFAULT_TOKENS = 8192
MAX_DEFAULT_TOKENS = 32768

_MAX_EXPERTS = 100_000  # in all layers, more than any model has
_MAX_HEADS = 50_000  # in all layers. Llama 3.1 of 405B has 16,128

LayerType = Literal["full_attention", "sliding_attention", "linear_attention", "conv", "mamba"]
HiddenAct = Literal["silu", "gelu_pytorch_tanh"]
# The part of a layer that mixes tokens. Layers with and without a window have the same.
MixerType = Literal["attention", "latent_attention", "linear_attention", "conv", "mamba"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the features of a model, under Hugging Face's names.

    Only `weights/` asks for `model_type`, and for the multipliers, which are in the weights of an
    installed model.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of an expert
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
    sliding_window: int | None = None  # tokens
    layer_types: tuple[LayerType, ...] = ()  # one a layer, all "full_attention" if it is empty
    sliding_rope_parameters: RopeParameters | None = None  # of sliding layers, if they differ
    # Of full layers, if they differ from sliding ones.
    global_head_dim: int | None = None
    num_global_key_value_heads: int | None = None
    num_attention_heads_per_layer: tuple[int, ...] = ()  # of queries, if layers differ
    # Of "linear_attention", which is a Gated DeltaNet.
    linear_conv_kernel_dim: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    conv_L_cache: int = 0  # the tokens that the short convolution of a layer "conv" reads
    # Of "mamba", which is Mamba2. The heads of a group share B and C of mamba_d_state numbers.
    mamba_n_heads: int = 0
    mamba_d_head: int = 0
    mamba_n_groups: int = 0
    mamba_d_state: int = 0
    mamba_d_conv: int = 0
    mamba_conv_bias: bool = False
    # The widths of the latents that keys and values, and queries are made of, 0 for none. With the
    # first, all layers have latent attention. The last columns of its heads rotate.
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # Values of full layers are their keys before these are normalized and rotate.
    attention_k_eq_v: bool = False
    v_norm: bool = False  # an RMSNorm of each head of values, without weights
    attn_output_gate: bool = False  # its sigmoid multiplies each column of attention's output
    attn_head_gate: bool = False  # its softplus multiplies each head of attention's output
    # Norms multiply by their weights in fp32, and round once. Others round before.
    fp32_norms: bool = False
    norm_topk_prob: bool = True  # whether the weights of the chosen experts sum to one
    # Makes these weights of the router's logits.
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    routed_scaling_factor: float = 1.0  # multiplies the weights of the chosen experts
    router_logit_softcapping: float | None = None  # router's logits, as final_logit_softcapping
    e_score_correction_bias: bool = False  # a number an expert that joins scores for the choice
    # The groups of experts, and those that a token chooses its experts of. A group's score is that
    # of its best expert, or with corrections the sum of its two best.
    n_group: int = 1
    topk_group: int = 1
    # Of a dense part of each layer, which all tokens go through beside the experts, 0 for none. The
    # sigmoid of the gate multiplies its output.
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    # The layers at the beginning that have a dense part of this size instead of experts. Layers
    # with experts are counted from 0 after these.
    first_k_dense_replace: int = 0
    dense_intermediate_size: int = 0
    num_nextn_predict_layers: int = 0  # layers of a checkpoint after these, which are left out
    left_out: tuple[str, ...] = ()  # the uses of parts that are not of the language model
    # An RMSNorm of queries and keys before they rotate, of each head or all heads together.
    qk_norm: Literal["head", "projection"] | None = None
    clip_qkv: float | None = None  # the largest absolute value of queries, keys and values
    attention_bias: bool = False  # of the q, k, v and o projections
    qkv_bias: bool = False  # of q, k and v alone
    attention_sinks: bool = False  # one logit a head in the sum of the softmax
    moe_bias: bool = False  # of the router and the experts
    # With a limit experts compute (up + 1) * gate * sigmoid(swiglu_alpha * gate), with gate and up
    # clamped, and otherwise hidden_act(gate) * up, as dense parts do.
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    hidden_act: HiddenAct = "silu"
    # The outputs of mixer, dense part and experts have norms, too, as has the sum of both. The
    # inputs of router, dense part and experts have a norm each. A number multiplies what a layer
    # gives.
    sandwich_norms: bool = False
    per_expert_scale: bool = False  # a number for each expert multiplies its weight
    final_logit_softcapping: float | None = None  # logits become tanh(logits / it) * it
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None  # of scores, None for 1 / sqrt(head_dim)
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    def layer_type(self, layer: int) -> LayerType:
        return self.layer_types[layer] if self.layer_types else "full_attention"

    def mixer(self, layer: int) -> MixerType:
        """Return the part of a layer that mixes tokens."""
        layer_type = self.layer_type(layer)
        if layer_type in ("linear_attention", "conv", "mamba"):
            return layer_type
        return "latent_attention" if self.kv_lora_rank else "attention"

    def attention_shape(self, layer: int) -> tuple[int, int, int]:
        """Return the heads of a layer's queries, and of its keys and values, and their columns."""
        groups = self.num_key_value_heads
        width = self.head_dim
        if not self._is_sliding(layer):
            groups = self.num_global_key_value_heads or groups
            width = self.global_head_dim or width
        own_heads = self.num_attention_heads_per_layer
        return own_heads[layer] if own_heads else self.num_attention_heads, groups, width

    @property
    def delta_net_shape(self) -> tuple[int, int, int, int]:
        """Return the heads of a DeltaNet's keys and of its values, and the columns of each."""
        heads = self.linear_num_key_heads, self.linear_num_value_heads
        return *heads, self.linear_key_head_dim, self.linear_value_head_dim

    @property
    def mamba_shape(self) -> tuple[int, int, int, int]:
        """Return the groups and the heads of Mamba2, and the columns of B or C and of a head."""
        heads = self.mamba_n_groups, self.mamba_n_heads
        return *heads, self.mamba_d_state, self.mamba_d_head

    def values_are_keys(self, layer: int) -> bool:
        """Return whether a layer makes no values of its own."""
        return self.attention_k_eq_v and self.layer_type(layer) == "full_attention"

    def rotating_columns(self, layer: int) -> int:
        """Return the columns of a layer's heads, of which its rope rotates all or some."""
        if self.mixer(layer) == "latent_attention":
            return self.qk_rope_head_dim
        return self.attention_shape(layer)[2]

    @property
    def latent_scale(self) -> float:
        """Return what scores of latent attention are multiplied by.

        A rope of type "yarn" with `mscale_all_dim` sharpens them.
        """
        rope = self.rope_parameters
        width = self.qk_nope_head_dim + self.qk_rope_head_dim
        sharper = 1.0
        if rope.mscale_all_dim and rope.factor > 1:
            sharper += 0.1 * rope.mscale_all_dim * log(rope.factor)
        return sharper**2 / sqrt(width)

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
        return (*dict.fromkeys(rope for rope, _ in self.rotations),)

    @property
    def rotations(self) -> list[tuple[RopeParameters, int]]:
        """Return the rotary embeddings of the layers, each with the columns of their heads."""
        rotating = ("attention", "latent_attention")
        layers = (n for n in range(self.num_hidden_layers) if self.mixer(n) in rotating)
        return [*dict.fromkeys((self.rope(n), self.rotating_columns(n)) for n in layers)]

    @property
    def largest_context(self) -> int:
        """Return how many tokens a sequence may have.

        transformers has no limit. A `factor` of "linear", "dynamic" or "yarn" multiplies the
        original context, and people add one without a new `max_position_embeddings`.
        """
        rope = self.rope_parameters
        stretched = 0.0
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
        return self.layer_type(layer) == "sliding_attention"

    def check(self) -> None:
        """Raise `CheckpointError` if the numbers do not fit together."""
        for fault in self._faults():
            raise CheckpointError(f"config.json: {fault}")
        for rope, columns in self.rotations:
            rope.check(columns)

    def _faults(self) -> Iterator[str]:
        heads = self.num_attention_heads
        shared = self.num_key_value_heads
        layers = self.num_hidden_layers
        experts = self.num_local_experts
        own_heads = self.num_attention_heads_per_layer
        if own_heads and len(own_heads) != layers:
            yield f"{len(own_heads)} num_attention_heads_per_layer for {layers} layers"
        for count in {heads, *own_heads}:
            if count % shared:
                yield f"{count} attention heads cannot share {shared} key-value heads"
        if self.num_moe_layers < 1:
            dense = self.first_k_dense_replace
            yield f"none of {layers} layers has experts, because the first {dense} are dense"
        if layers * experts > _MAX_EXPERTS:
            yield f"{layers} layers of {experts} experts are more than any model has"
        most = max(heads, *own_heads, self.linear_num_key_heads, self.linear_num_value_heads)
        if layers * most > _MAX_HEADS:
            yield f"{layers} layers of {most} heads are more than any model has"
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
        if experts % self.n_group or self.topk_group > self.n_group:
            yield f"{experts} experts in {self.n_group} groups, of which {self.topk_group} count"
        choice = experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > choice:
            yield f"{self.num_experts_per_tok} experts per token of only {choice}"
        if self.layer_types and len(self.layer_types) != layers:
            yield f"{len(self.layer_types)} layer_types for {layers} layers"
        yield from self._mixer_faults()

    def _mixer_faults(self) -> Iterator[str]:
        """Yield faults of numbers that only some mixers have."""
        needed = {
            "linear_attention": (
                *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
                *("linear_num_key_heads", "linear_num_value_heads"),
            ),
            "conv": ("conv_L_cache",),
            "mamba": (
                *("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state"),
                "mamba_d_conv",
            ),
            "latent_attention": ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        }
        mixers = dict.fromkeys(map(self.mixer, range(self.num_hidden_layers)))
        for mixer in mixers:
            for name in needed.get(mixer, ()):
                if getattr(self, name) < 1:
                    yield f"{name} is missing"
        heads = self.linear_num_value_heads
        keys = self.linear_num_key_heads
        if "linear_attention" in mixers and heads % keys:
            yield f"{heads} value heads cannot share {keys} key heads"
        if "mamba" in mixers and self.mamba_n_heads % self.mamba_n_groups:
            yield f"{self.mamba_n_heads} heads of Mamba2 cannot be {self.mamba_n_groups} groups"
        if self.attention_k_eq_v and not (self.v_norm and self.qk_norm):
            yield "values that are keys need norms of both"
        groups = self.num_global_key_value_heads or self.num_key_value_heads
        if self.num_attention_heads % groups:
            yield f"{self.num_attention_heads} attention heads cannot share {groups} global ones"
        if self.global_head_dim and self.global_head_dim % 2:
            yield f"global_head_dim {self.global_head_dim} is odd"


def checkpoint_dtype(directory: Path) -> str | None:
    """Return the type of the weights in config.json, or None. Raises `CheckpointError`."""
    raw = read_json_object(directory / "config.json")
    value = raw.get("dtype", raw.get("torch_dtype"))
    return value if value in ("bfloat16", "float16", "float32") else None


def advised_sampling(directory: Path) -> dict[str, Any]:
    """Return generation_config.json's sampling that can be used, by the names of options.

    Raises `CheckpointError`.
    """
    raw = _generation_config(directory)
    names = ("temperature", "top_p", "top_k", "min_p")
    values = {name: raw.get(name) for name in names}
    return accepted_numbers({**values, "repeat_penalty": raw.get("repetition_penalty")})


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
