"""The form of a family's description, and the tensors that families have in common.

An installed model has q above k above v in one matrix, and an expert's gate (w1) above its up (w3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any, TypeAlias

from mixchat.base.model_config import MixerType, ModelConfig


@dataclass(frozen=True)
class Slice:
    """Rows of a checkpoint's tensor, which is transposed first if need be.

    The numbers are multiplied by `factor`, and then `added` is added. If the stored numbers are
    `exponentials`, -exp(x), each is replaced by its x before that.
    """

    name: str  # of the tensor, or `X[3]` for the fourth part of a stacked tensor X
    shape: tuple[int, ...]  # of the stored tensor, with all parts if it is a stack
    rows: range | None = None  # of the transposed tensor, None for all
    transposed: bool = False
    factor: float = 1.0
    added: float = 0.0
    columns: tuple[range, ...] | None = None  # of the transposed tensor, in any order, None for all
    exponentials: bool = False

    @property
    def is_whole(self) -> bool:
        """Return whether the slice is the stored tensor without a change."""
        is_changed = self.transposed or self.exponentials or self.factor != 1 or self.added != 0
        return self.rows is None and self.columns is None and not is_changed


Tensors: TypeAlias = Iterator[tuple[str, tuple[Slice, ...]]]
"""The name of each tensor of an installed model, and the slices above each other that make it."""


LayerTensors: TypeAlias = Callable[[ModelConfig, str], Tensors]
"""Yields tensors of a layer, whose prefix ends with a dot."""


MixerTensors: TypeAlias = Callable[[ModelConfig, int], Tensors]
"""Yields the tensors of a layer's mixer, for the layer's number."""


def attention(*, rotates_neighbours: bool = False, norm_offset: float = 0.0) -> MixerTensors:
    """Describe attention with Llama's names.

    rotates_neighbours: a checkpoint's queries and keys have the two columns of a rotated pair side
    by side. norm_offset: as in `Family`.
    """

    def tensors(config: ModelConfig, layer: int) -> Tensors:
        own = f"model.layers.{layer}.self_attn."
        hidden = config.hidden_size
        heads, groups, width = config.attention_shape(layer)
        columns = heads * width
        step = 2 if rotates_neighbours else 1
        # Granite multiplies scores by a number of its own, where the engine divides by the root of
        # the head's width. Both become a factor of the queries' matrix. A norm of queries would
        # undo it.
        scale = config.attention_multiplier
        normed = config.qk_norm is not None
        q_factor = 1.0 if scale is None else scale * sqrt(width)
        kinds = 2 if config.attn_output_gate else 1  # a head's gate comes after its query
        counts = {"q": kinds * columns, "k": groups * width, "v": groups * width}
        parts = [
            ("q", _head_rows(columns, width, step, kinds), 1.0 if normed else q_factor),
            ("k", _head_rows(groups * width, width, step), 1.0),
        ]
        if not config.values_are_keys(layer):
            parts.append(("v", [None], 1.0))
        if config.attn_output_gate:
            parts.append(("q", _head_rows(columns, width, 1, kinds, first=width), 1.0))
        for parameter, shape in _parameters(config.attention_bias or config.qkv_bias, hidden):
            qkv = (
                Slice(f"{own}{x}_proj.{parameter}", (counts[x], *shape), rows, factor=factor)
                for x, every, factor in parts
                for rows in every
            )
            yield f"{own}qkv_proj.{parameter}", tuple(qkv)
        for parameter, shape in _parameters(config.attention_bias, columns):
            name = f"{own}o_proj.{parameter}"
            yield name, (Slice(name, (hidden, *shape), factor=config.residual_multiplier),)
        if normed:
            # One norm over all heads of a projection (OLMoE), or over each head, with shared
            # weights (Qwen3).
            together = config.qk_norm == "projection"
            for x, count, factor in (("q", columns, q_factor), ("k", groups * width, 1.0)):
                name = f"{own}{x}_norm.weight"
                size = count if together else width
                yield norm(name, size, factor=factor, offset=norm_offset)
        if config.attention_sinks:
            yield f"{own}sinks", (Slice(f"{own}sinks", (heads,)),)
        if config.attn_head_gate:
            yield from whole_tensors(own, {"g_proj.weight": (heads, hidden)})

    return tensors


def delta_net(in_proj: LayerTensors) -> MixerTensors:
    """Describe a gated DeltaNet. `in_proj` yields both input projections of a layer."""

    def tensors(config: ModelConfig, layer: int) -> Tensors:
        own = f"model.layers.{layer}.linear_attn."
        keys, heads, key, value = config.delta_net_shape
        channels = 2 * keys * key + heads * value
        yield from in_proj(config, own)
        yield from whole_tensors(
            own,
            {
                "out_proj.weight": (config.hidden_size, heads * value),
                "conv1d.weight": (channels, 1, config.linear_conv_kernel_dim),
                "dt_bias": (heads,),
                "A_log": (heads,),
                "norm.weight": (value,),
            },
        )

    return tensors


def latent_attention(config: ModelConfig, layer: int) -> Tensors:
    """Describe latent attention with DeepSeek's names.

    The two columns of a rotated pair are side by side in a checkpoint.
    """
    own = f"model.layers.{layer}.self_attn."
    hidden = config.hidden_size
    heads = config.num_attention_heads
    latent = config.kv_lora_rank
    value = config.v_head_dim
    unrotated = config.qk_nope_head_dim
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    starts = range(0, heads * width, width)
    query_rows = [
        *(range(start, start + unrotated) for start in starts),
        *(
            range(start + x, start + width, 2)
            for start in starts
            for x in (unrotated, unrotated + 1)
        ),
    ]
    columns = config.q_lora_rank or hidden
    name = f"{own}q_{'b_' if config.q_lora_rank else ''}proj"
    queries = [Slice(f"{name}.weight", (heads * width, columns), rows) for rows in query_rows]
    a_rows = latent + config.qk_rope_head_dim
    latent_rows = [range(latent), range(latent, a_rows, 2), range(latent + 1, a_rows, 2)]
    for parameter, shape in _parameters(config.attention_bias, hidden):
        first = [Slice(f"{own}q_a_proj.{parameter}", (config.q_lora_rank, *shape))]
        a_name = f"{own}kv_a_proj_with_mqa.{parameter}"
        a_proj = [Slice(a_name, (a_rows, *shape), rows) for rows in latent_rows]
        yield f"{own}a_proj.{parameter}", (*(first if config.q_lora_rank else queries), *a_proj)
        o_shape = (hidden, heads * value) if shape else (hidden,)
        yield f"{own}o_proj.{parameter}", (Slice(f"{own}o_proj.{parameter}", o_shape),)
    if config.q_lora_rank:
        yield f"{own}q_b_proj.weight", tuple(queries)
        yield f"{own}q_a_norm.weight", norm(f"{own}q_a_layernorm.weight", config.q_lora_rank)[1]
    yield f"{own}kv_a_norm.weight", norm(f"{own}kv_a_layernorm.weight", latent)[1]
    b_name = f"{own}kv_b_proj.weight"
    b_shape = (heads * (unrotated + value), latent)
    starts_of_heads = range(0, b_shape[0], unrotated + value)
    keys = (range(first, first + unrotated) for first in starts_of_heads)
    values = (range(first + unrotated, first + unrotated + value) for first in starts_of_heads)
    k_b = (Slice(b_name, b_shape, transposed=True, columns=(head,)) for head in keys)
    yield f"{own}k_b_proj.weight", tuple(k_b)
    yield f"{own}v_b_proj.weight", tuple(Slice(b_name, b_shape, head) for head in values)


def short_conv(config: ModelConfig, layer: int) -> Tensors:
    """Describe a short convolution with LFM2's names."""
    hidden = config.hidden_size
    kernel = (config.hidden_size, 1, config.conv_L_cache)
    shapes = {"in_proj": (3 * hidden, hidden), "conv": kernel, "out_proj": (hidden, hidden)}
    own = f"model.layers.{layer}.conv."
    return whole_tensors(own, {f"{name}.weight": shape for name, shape in shapes.items()})


def whole_tensors(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Yield the tensors that an installed model takes over without a change."""
    for name, shape in shapes.items():
        yield f"{prefix}{name}", (Slice(f"{prefix}{name}", shape),)


@dataclass(frozen=True)
class Family:
    """A family of models. `decoder_tensors` has all tensors that it does not describe."""

    model_type: str  # of config.json
    read_config: Callable[[dict[str, Any]], ModelConfig]  # raises `CheckpointError`
    # A layer's router, experts and dense part. Expert 3 of layer 0 has
    # `model.layers.0.block_sparse_moe.experts.3.w13.weight`, and `w2`.
    moe: LayerTensors
    # A layer's mixer, by its type. By default attention has Llama's names, and latent attention has
    # DeepSeek's.
    mixers: Mapping[MixerType, MixerTensors] = field(
        default_factory=lambda: {"attention": attention(), "latent_attention": latent_attention}
    )
    # Parts of Llama's names of tensors, each with the checkpoint's part. A later entry is applied
    # to the result of the earlier ones.
    names: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0  # is added to a checkpoint's weights of norms, 1 if it stores w - 1


@dataclass(frozen=True)
class CheckpointForm:
    """The forms that a family's checkpoints are published in."""

    is_nested: bool = False  # it also has tensors of other models, such as one for images
    # A tensor [E, rows, columns] has a matrix of all experts, gate above up.
    is_stacked: bool = False

    @classmethod
    def of(cls, names: Iterable[str]) -> CheckpointForm:
        """Return the form of a checkpoint that has tensors of these names."""
        every = tuple(names)
        return cls(
            any(name.startswith(_NESTED) for name in every),
            any(_STACKED.fullmatch(name) for name in every),
        )

    def is_other(self, name: str) -> bool:
        """Return whether a tensor is of another model than the language model."""
        return self.is_nested and not name.startswith((_NESTED, "lm_head."))


_NESTED = "model.language_model."
_STACKED = re.compile(r".+\.experts\.gate_up_proj")
_SEPARATE = re.compile(r"(.+\.experts)\.(\d+)\.(gate|down)_proj\.weight")


PLAIN = CheckpointForm()


def decoder_tensors(config: ModelConfig, family: Family, form: CheckpointForm = PLAIN) -> Tensors:
    """Yield all tensors of a model of a family, with their slices of a checkpoint of this form."""
    names = {**family.names, **({"model.": _NESTED} if form.is_nested else {})}
    for installed, slices in _with_usual_names(config, family):
        own = _stacked(slices, config.num_local_experts) if form.is_stacked else slices
        yield installed, tuple(_renamed(source, names) for source in own)


def _stacked(slices: tuple[Slice, ...], experts: int) -> tuple[Slice, ...]:
    """Return the parts of stacked tensors for the matrices of an expert."""
    match = _SEPARATE.fullmatch(slices[0].name)
    if match is None:
        return slices
    stack, expert, matrix_name = match.groups()
    matrix = "gate_up" if matrix_name == "gate" else matrix_name
    shape = experts, sum(source.shape[0] for source in slices), slices[0].shape[1]
    return (replace(slices[0], name=f"{stack}.{matrix}_proj[{expert}]", shape=shape),)


def _renamed(source: Slice, names: Mapping[str, str]) -> Slice:
    name = source.name
    for usual, own in names.items():
        name = name.replace(usual, own)
    return source if name == source.name else replace(source, name=name)


def _with_usual_names(config: ModelConfig, family: Family) -> Tensors:
    hidden = config.hidden_size
    vocabulary = (config.vocab_size, config.hidden_size)
    offset = family.norm_offset
    embedding = "model.embed_tokens.weight"
    yield embedding, (Slice(embedding, vocabulary, factor=config.embedding_multiplier),)
    for layer in range(config.num_hidden_layers):
        prefix = layer_prefix(layer)
        yield norm(f"{prefix}input_layernorm.weight", hidden, offset=offset)
        yield norm(f"{prefix}post_attention_layernorm.weight", hidden, offset=offset)
        yield from family.mixers[config.mixer(layer)](config, layer)
        if layer >= config.first_k_dense_replace:
            yield from family.moe(config, prefix)
        else:
            yield from _mlp(config, prefix, "mlp", config.dense_intermediate_size)
    yield norm("model.norm.weight", hidden, offset=offset)
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    yield "lm_head.weight", (Slice(head, vocabulary, factor=1 / config.logits_scaling),)


def norm(
    name: str, columns: int, *, factor: float = 1.0, offset: float = 0.0
) -> tuple[str, tuple[Slice, ...]]:
    """Describe the weights of a norm. offset: as in `Family`."""
    return name, (Slice(name, (columns,), factor=factor, added=factor * offset),)


def router(config: ModelConfig, prefix: str, name: str) -> Tensors:
    """Yield the matrix of a layer's router, which a checkpoint calls `name`, and its bias."""
    experts = config.num_local_experts
    installed = f"{prefix}block_sparse_moe.gate"
    yield f"{installed}.weight", (Slice(f"{prefix}{name}.weight", (experts, config.hidden_size)),)
    if config.moe_bias:
        yield f"{installed}.bias", (Slice(f"{prefix}{name}.bias", (experts,)),)
    if config.e_score_correction_bias:
        own = f"{name}.e_score_correction_bias"
        yield f"{installed}.e_score_correction_bias", (Slice(f"{prefix}{own}", (experts,)),)


def with_shared_expert(moe: LayerTensors, name: str) -> LayerTensors:
    """Describe `moe` and, if the model has it, the dense part that a checkpoint calls `name`."""

    def tensors(config: ModelConfig, prefix: str) -> Tensors:
        yield from moe(config, prefix)
        if config.shared_expert_intermediate_size:
            yield from _mlp(config, prefix, name, config.shared_expert_intermediate_size)
        if config.shared_expert_gate:
            gate = Slice(f"{prefix}{name}_gate.weight", (1, config.hidden_size))
            yield f"{prefix}mlp.gate.weight", (gate,)

    return tensors


def _mlp(config: ModelConfig, prefix: str, name: str, inner: int) -> Tensors:
    own = f"{prefix}{name}"
    hidden = config.hidden_size
    gate_up = (Slice(f"{own}.{x}_proj.weight", (inner, hidden)) for x in ("gate", "up"))
    yield f"{prefix}mlp.w13.weight", tuple(gate_up)
    down = Slice(f"{own}.down_proj.weight", (hidden, inner), factor=config.residual_multiplier)
    yield f"{prefix}mlp.w2.weight", (down,)


def layer_prefix(layer: int) -> str:
    """Return the prefix of the names of a layer's tensors."""
    return f"model.layers.{layer}."


def expert_prefix(prefix: str, expert: int) -> str:
    """Return the prefix of an installed expert's matrices w13 and w2."""
    return f"{prefix}block_sparse_moe.experts.{expert}."


def separate_experts(moe: str, gate: str, down: str, up: str) -> LayerTensors:
    """Describe experts whose three matrices are tensors of their own, and the router `moe`.gate."""

    def tensors(config: ModelConfig, prefix: str) -> Tensors:
        inner = config.intermediate_size
        hidden = config.hidden_size
        yield from router(config, prefix, f"{moe}.gate")
        for expert in range(config.num_local_experts):
            own = f"{prefix}{moe}.experts.{expert}."
            installed = expert_prefix(prefix, expert)
            gate_up = (Slice(f"{own}{name}.weight", (inner, hidden)) for name in (gate, up))
            yield f"{installed}w13.weight", tuple(gate_up)
            yield f"{installed}w2.weight", (Slice(f"{own}{down}.weight", (hidden, inner)),)

    return tensors


def with_correction(moe: LayerTensors, name: str, *rows: int) -> LayerTensors:
    """Describe `moe` with a router's correction [*rows, E] that a checkpoint calls `name`."""

    def tensors(config: ModelConfig, prefix: str) -> Tensors:
        own = Slice(f"{prefix}{name}", (*rows, config.num_local_experts))
        for installed, slices in moe(config, prefix):
            is_correction = installed.endswith("e_score_correction_bias")
            yield installed, (own,) if is_correction else slices

    return tensors


MLP_EXPERTS = separate_experts("mlp", "gate_proj", "down_proj", "up_proj")
MLP_WITH_SHARED = with_shared_expert(MLP_EXPERTS, "mlp.shared_experts")


def _head_rows(
    count: int, width: int, step: int, kinds: int = 1, first: int = 0
) -> list[range] | list[None]:
    """Return `count` rows of heads of `width` rows in the order of an installed model.

    In each head every `step`th row comes first. With 4 rows in a head and a step of 2, the order is
    0 2 1 3. kinds: heads of so many kinds alternate. first: the first row of this kind.
    """
    if step == kinds == 1:
        return [None]
    heads = range(first, first + kinds * count, kinds * width)
    return [range(head + at, head + width, step) for head in heads for at in range(step)]


def _parameters(bias: bool, columns: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names of a linear map's parameters, and their shapes without the rows."""
    return [("weight", (columns,)), *([("bias", ())] if bias else [])]
