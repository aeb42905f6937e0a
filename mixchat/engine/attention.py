"""Attention of one layer.

T = tokens of this call, D = hidden_size, H = num_attention_heads, G = num_key_value_heads,
h = head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.engine.kv_cache import KVCache
from mixchat.engine.model_tensors import ModelTensors
from mixchat.engine.norm import RMSNorm
from mixchat.engine.paged_cache import KVSteps, PagedKVCache, SequencesAttention
from mixchat.engine.rope import RotaryEmbedding
from mixchat.engine.sequence_cache import SequenceCache, TokenContext
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.pages import CacheShape
from mixchat.kernels.cpu.program import Stage, Step, in_order, together
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.expert import Expert, ExpertSlots
from mixchat.weights.matrix.linear import as_packed
from mixchat.weights.matrix.quant_type import Linear, RecordingLinear, RecordRows


class SingleTokenContext:
    """The tensors and steps with which all layers compute the next token of each of N sequences.

    Of the hidden states [N, D], each part gets `normed`, and adds `added` to `x`. A layer's dense
    part leaves `dense` to the part that follows it.
    """

    def __init__(
        self, cache: SequenceCache, hidden_size: int, dtype: torch.dtype, sequences: int = 1
    ) -> None:
        self._cache, self._dtype, self.sequences = cache, dtype, sequences
        self.x, self.normed, self.added, self.dense = (
            torch.empty(sequences, hidden_size, dtype=dtype) for _ in range(4)
        )
        self._tensors: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}
        self._rotations: dict[tuple[RotaryEmbedding, int], Step] = {}
        self._scalings: dict[tuple[RotaryEmbedding, int], Step] = {}
        self._positions: list[torch.Tensor] = []  # what the steps that rotate or scale point to
        self._attention: dict[CacheShape, list[KVSteps]] = {}
        self._bound: dict[int, Sequence[Callable[[Any], None]]] = {}
        self._slots: dict[Hashable, ExpertSlots] = {}

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the tensor of this name, by default in the type of the hidden states."""
        key = name, shape, dtype or self._dtype
        if key not in self._tensors:
            self._tensors[key] = torch.empty(shape, dtype=key[2])
        return self._tensors[key]

    def slots(self, expert: Expert, pairs: int) -> ExpertSlots:
        """Return slots for `normed`, which all layers with experts of this form share."""
        if expert.form not in self._slots:
            self._slots[expert.form] = ExpertSlots(expert, self.normed, pairs)
        return self._slots[expert.form]

    def rotate(self, rope: RotaryEmbedding, x: torch.Tensor, out: torch.Tensor) -> Step:
        """Return the step that rotates x to the tokens' positions."""
        key = rope, x.data_ptr()
        if key not in self._rotations:
            self._rotations[key] = rows.rotate_step(x, out, rope.width)
        return self._rotations[key]

    def scale(self, rope: RotaryEmbedding, x: torch.Tensor, out: torch.Tensor) -> Step:
        """Return the step that multiplies rows x [N, n] by the tokens' `query_scales`."""
        key = rope, x.data_ptr()
        if key not in self._scalings:
            weights = torch.ones(len(x), 1)
            self._scalings[key] = rows.weighted_sum_step(x.unsqueeze(1), weights, out)
        return self._scalings[key]

    def bind(self, layer: int, *set_places: Callable[[Any], None]) -> None:
        """Call these with the sequences' caches before each token, to set addresses in steps."""
        self._bound[layer] = set_places

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
    ) -> list[KVSteps]:
        """Return `KVCache.attend` of a layer as steps for each sequence.

        They do not keep the sinks alive.
        """
        cache = self._cache.layers[layer]
        assert isinstance(cache, PagedKVCache)
        shape, capacity = cache.shape, self._cache.capacity
        if shape not in self._attention:
            tensors = (torch.split(tensor, 1) for tensor in (queries, keys, values, out))
            self._attention[shape] = [
                KVSteps(shape, query, key, value, row, capacity)
                for query, key, value, row in zip(*tensors, strict=True)
            ]
        steps = [each.for_layer(cache.window, sinks) for each in self._attention[shape]]
        self.bind(layer, *(partial(_set_place, each) for each in steps))
        return steps

    def set_places(self, caches: Sequence[SequenceCache]) -> None:
        """Let all steps compute the next tokens of these caches."""
        positions = [cache.length for cache in caches]
        self._positions = [
            tensor
            for (rope, _), step in self._rotations.items()
            for tensor in rope.set_positions(step, positions)
        ]
        for (rope, _), step in self._scalings.items():
            assert rope.query_scales is not None
            scales = rope.query_scales[positions]
            step.set(weight=scales.data_ptr())
            self._positions.append(scales)
        for layer, set_places in self._bound.items():
            for cache, set_place in zip(caches, set_places, strict=True):
                set_place(cache.layers[layer])


def _set_place(steps: KVSteps, cache: PagedKVCache) -> None:
    cache.set_place(steps)


def attend(
    layer: int,
    context: TokenContext,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `KVCache.attend` of a layer for the tokens of all sequences in the pass."""
    pieces = context.pieces(layer)
    caches = [cache for _, cache in pieces if isinstance(cache, KVCache)]
    if len(caches) == 1:
        return caches[0].attend(queries, keys, values, sinks)
    paged = [cache for cache in caches if isinstance(cache, PagedKVCache)]
    # One program for all sequences, unless a prompt is among them.
    if len(paged) == len(pieces) == len(queries):
        shape = paged[0].shape
        if shape not in context.programs:
            context.programs[shape] = SequencesAttention(paged, queries, keys, values)
        program: SequencesAttention = context.programs[shape]
        return program.attend(paged, queries, keys, values, sinks)
    attended = [
        cache.attend(queries[rows], keys[rows], values[rows], sinks)
        for cache, (rows, _) in zip(caches, pieces, strict=True)
    ]
    return torch.cat(attended)


class Attention:
    """Causal grouped-query attention of one layer.

    qkv_proj: gives queries, keys and values, and gates of the output if the model has them.
    qk_norms: of queries and of keys, before they rotate. sinks: one logit a head [H]. v_norm: of
    values, which may be the keys before their norm.
    """

    def __init__(
        self,
        layer: int,
        config: ModelConfig,
        qkv_proj: Linear,
        o_proj: Linear,
        rope: RotaryEmbedding,
        qk_norms: Sequence[RMSNorm] = (),
        sinks: torch.Tensor | None = None,
        v_norm: RMSNorm | None = None,
    ) -> None:
        self._layer, self._config, self.v_norm = layer, config, v_norm
        self.shape = self._heads, self._groups, self._width = config.attention_shape(layer)
        self.values_are_keys = config.values_are_keys(layer)
        # The first head of values, and the first one after them.
        self._values = self._heads + (0 if self.values_are_keys else self._groups)
        self._end = self._values + self._groups
        self.qkv_proj, self.o_proj, self.rope = qkv_proj, o_proj, rope
        self.qk_norms, self.sinks = qk_norms, None if sinks is None else sinks.float()

    @classmethod
    def build(
        cls, layer: int, used: Blueprint, tensors: ModelTensors, rope: RotaryEmbedding | None
    ) -> Attention:
        spec, config = used.mixer(layer), used.config
        norms = [RMSNorm(tensors.tensor(norm), config.rms_norm_eps) for norm in spec.norms]
        sinks = tensors.tensor(spec.tensors["sinks"]) if config.attention_sinks else None
        qkv_proj, o_proj = map(tensors.linear, spec.matrices.values())
        v_norm = None
        if config.v_norm:
            v_norm = RMSNorm(torch.ones_like(norms[1].weight), config.rms_norm_eps)
        assert rope is not None
        return cls(layer, config, qkv_proj, o_proj, rope, norms, sinks, v_norm)

    def record_inputs(self, records: Mapping[str, RecordRows]) -> None:
        self.qkv_proj = RecordingLinear(self.qkv_proj, records["qkv_proj"])
        self.o_proj = RecordingLinear(self.o_proj, records["o_proj"])

    def has_stages(self, dtype: torch.dtype) -> bool:
        rotated = self.rope.width
        columns = rotated // 2, self._width - rotated
        return all(rows.can_compute(dtype, count) for count in columns)

    def __call__(
        self, x: torch.Tensor, context: TokenContext, *, exact: bool = False
    ) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""
        config, tokens = self._config, x.shape[0]
        heads, groups = self._heads, self._groups
        qkv = self.qkv_proj(x, exact=exact)
        qkv = qkv.view(tokens, -1, self._width)  # [T, H + 2G, h], or [T, 2H + 2G, h] with gates
        values = qkv[:, self._values : self._end]  # [T, G, h]
        if self.v_norm is not None:
            values = self.v_norm(values)
        for norm, normed in self._normed(qkv):
            norm.normalize_heads(normed)
        if config.clip_qkv is not None:
            qkv.clamp_(-config.clip_qkv, config.clip_qkv)
        rotated = self.rope(qkv[:, : heads + groups], context.positions(tokens))  # [T, H + G, h]
        queries, keys = rotated[:, :heads], rotated[:, heads:]  # [T, H, h], [T, G, h]
        attended = attend(self._layer, context, queries, keys, values, self.sinks)  # [T, H, h]
        attended = attended.reshape(tokens, -1)
        if config.attn_output_gate:
            attended = rows.gated(attended, qkv[:, self._end :].flatten(1))
        return self.o_proj(attended, exact=exact)

    def stages(self, context: SingleTokenContext) -> list[Stage]:
        config, heads, groups, width = self._config, self._heads, self._groups, self._width
        tokens = context.sequences
        gates = heads if config.attn_output_gate else 0
        qkv = context.tensor("qkv", tokens, self._end + gates, width)
        rotated = context.tensor("rotated", tokens, heads + groups, width)
        attended = context.tensor("attended", tokens, heads, width)
        round_x, project = as_packed(self.qkv_proj).steps(context.normed, qkv.view(tokens, -1))
        values = qkv[:, self._values : self._end]
        norm_values: list[Step] = []
        clamp: list[Step] = []
        if self.v_norm is not None:
            normed_values = context.tensor("values", *values.shape)
            norm_values.append(self.v_norm.heads_step(values, normed_values))
            values = normed_values
        norms = [norm.heads_step(normed) for norm, normed in self._normed(qkv)]
        if config.clip_qkv is not None:
            clamp.append(rows.clamp_step(qkv.view(tokens, -1), config.clip_qkv))
        rotate = context.rotate(self.rope, qkv[:, : heads + groups], rotated)
        queries, keys = rotated[:, :heads], rotated[:, heads:]
        steps = context.attend(self._layer, queries, keys, values, self.sinks, attended)
        row = attended.view(tokens, -1)
        gate = [rows.gate_step(row, qkv[:, -gates:].flatten(1), row)] if gates else []
        o_proj = as_packed(self.o_proj)
        round_attended, project_out = o_proj.steps(row, context.added)
        return [
            *in_order(tokens, [round_x]),
            together(project),
            # Values may be the keys before their norm.
            *in_order(tokens, norm_values, norms, clamp, [rotate], [each.store for each in steps]),
            together(*(each.attend for each in steps)),
            together(*(each.merge for each in steps)),
            *in_order(tokens, gate, [round_attended]),
            together(project_out),
        ]

    def _normed(self, qkv: torch.Tensor) -> Iterable[tuple[RMSNorm, torch.Tensor]]:
        """Return the norms, if there are any, each with its queries [T, H, h] or keys [T, G, h]."""
        heads, groups = self._heads, self._groups
        return zip(self.qk_norms, (qkv[:, :heads], qkv[:, heads : heads + groups]), strict=False)
