"""Gated DeltaNet or Mamba2 of one layer, with a state of fixed size in place of keys and values.

In Mamba2, C, B and x take the places of queries, keys and values, and decays and rates depend on
the same logits.

T = tokens of this call, D = hidden_size, V = value heads, v = their width, C = channels of queries,
keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from mixchat.base import gpu
from mixchat.engine.attention import SingleTokenContext
from mixchat.engine.model_tensors import ModelTensors
from mixchat.engine.rope import RotaryEmbedding
from mixchat.engine.sequence_cache import TokenContext
from mixchat.engine.state_cache import StateCache
from mixchat.kernels.cpu.convolution import Convolution
from mixchat.kernels.cpu.delta_net import DeltaNetShape, DeltaRule
from mixchat.kernels.cpu.dense import dense_matmul, matmul_step
from mixchat.kernels.cpu.gated_norm import GatedNorm
from mixchat.kernels.cpu.program import Stage, Step, alone, together
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.matrix.linear import as_packed
from mixchat.weights.matrix.quant_type import Linear, RecordingLinear, RecordRows


class GatedDeltaNet:
    """A recurrent mixer. It computes one token after the other, however many a call has.

    in_proj: to queries, keys, values and the gate of the output. ba_proj: [2V, D], to the logits of
    rates and decays, or [V, D] in Mamba2.
    """

    def __init__(
        self,
        layer: int,
        in_proj: Linear,
        out_proj: Linear,
        ba_proj: torch.Tensor,
        convolution: Convolution,
        rule: DeltaRule,
        norm: GatedNorm,
    ) -> None:
        self._layer, self.ba_proj = layer, ba_proj
        self.in_proj, self.out_proj = in_proj, out_proj
        self.convolution, self.rule, self.norm = convolution, rule, norm

    @classmethod
    def build(
        cls, layer: int, used: Blueprint, tensors: ModelTensors, rope: RotaryEmbedding | None
    ) -> GatedDeltaNet:
        spec, config = used.mixer(layer), used.config
        in_proj, out_proj = map(tensors.linear, spec.matrices.values())
        own = {role: tensors.tensor(tensor) for role, tensor in spec.tensors.items()}
        is_mamba = config.mixer(layer) == "mamba"
        shape = DeltaNetShape(*(config.mamba_shape if is_mamba else config.delta_net_shape))
        return cls(
            layer,
            in_proj,
            out_proj,
            own["ba_proj"].contiguous(),
            Convolution(own["conv1d"], own.get("conv1d_bias")),
            DeltaRule(shape, own["A_log"], own["dt_bias"], own.get("D")),
            GatedNorm(own["norm"].contiguous(), config.rms_norm_eps, config.mamba_n_groups or None),
        )

    def record_inputs(self, records: Mapping[str, RecordRows]) -> None:
        self.in_proj = RecordingLinear(self.in_proj, records["in_proj"])
        self.out_proj = RecordingLinear(self.out_proj, records["out_proj"])

    def has_stages(self, dtype: torch.dtype) -> bool:
        return self.rule.shape.can_compute(dtype, "cpu")

    def __call__(
        self, x: torch.Tensor, context: TokenContext, *, exact: bool = False
    ) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""
        projected = self.in_proj(x, exact=exact)  # [T, C + V * v]
        ba = dense_matmul(x, self.ba_proj, exact=exact)  # [T, 2V]
        channels = self.rule.shape.channels
        inputs, read = projected[:, :channels], []
        for rows, cache in context.pieces(self._layer):
            assert isinstance(cache, StateCache)
            sequence, logits = inputs[rows], ba[rows]
            for segment, before, after in cache.segments(sequence.shape[0]):
                qkv = self.convolution(sequence[segment], before["conv"], after["conv"])
                states = before["state"], after["state"]
                read.append(self._updated(qkv, logits[segment], *states))
        values = read[0] if len(read) == 1 else torch.cat(read)  # [T, V * v]
        return self.out_proj(self.norm(values, projected[:, channels:]), exact=exact)

    def _updated(
        self, qkv: torch.Tensor, ba: torch.Tensor, before: torch.Tensor, after: torch.Tensor
    ) -> torch.Tensor:
        """Return `DeltaRule.__call__`."""
        if not gpu.is_gpu(qkv.device) or self.rule.skips is not None:
            return self.rule(qkv, ba, before, after)
        # Triton is imported only if a GPU computes.
        from mixchat.kernels.gpu.delta_net import delta_rule

        return delta_rule(qkv, self.rule.prepare(qkv, ba), before, after, ba.dtype)

    def stages(self, context: SingleTokenContext) -> list[Stage]:
        shape, tokens = self.rule.shape, context.sequences
        channels, values = shape.channels, shape.value_heads * shape.value_dim
        projected = context.tensor("projected", tokens, channels + values)
        ba = context.tensor("ba", tokens, self.ba_proj.shape[0])
        qkv = context.tensor("convolved", tokens, channels, dtype=torch.float32)
        read, normed = (context.tensor(name, tokens, values) for name in ("read", "normed values"))
        round_x, project = as_packed(self.in_proj).steps(context.normed, projected)
        convolves = [
            self.convolution.step(row[:, :channels], out)
            for row, out in zip(torch.split(projected, 1), torch.split(qkv, 1), strict=True)
        ]
        rules = [
            self.rule.steps(*tensors)
            for tensors in zip(
                torch.split(qkv, 1), torch.split(ba, 1), torch.split(read, 1), strict=True
            )
        ]
        prepares, recurs = zip(*rules, strict=True)
        norm = self.norm.step(read, projected[:, channels:], normed)
        round_values, project_out = as_packed(self.out_proj).steps(normed, context.added)
        steps = zip(convolves, recurs, strict=True)
        context.bind(self._layer, *(partial(_set_place, *of_sequence) for of_sequence in steps))
        return [
            alone(round_x),
            together(project, matmul_step(context.normed, self.ba_proj, ba)),
            together(*convolves),
            alone(*prepares),
            together(*recurs),
            alone(norm, round_values),
            together(project_out),
        ]


def _set_place(convolve: Step, recur: Step, cache: StateCache) -> None:
    for _, before, after in cache.segments(1):
        for name, step in (("conv", convolve), ("state", recur)):
            step.set(before=before[name].data_ptr(), after=after[name].data_ptr())
