"""Multi-head latent attention of one layer (DeepSeek-AI, arXiv:2405.04434), in its absorbed form.

Keys and values of all heads are made of one latent a token, which the cache holds. A head's query
goes through the head's matrix of keys, and is then compared with the latents. Their weighted sum
goes through the head's matrix of values. So no key or value is ever made, for prompts neither.

T = tokens of this call, D = hidden_size, H = num_attention_heads, L = kv_lora_rank, n, r and v =
qk_nope_head_dim, qk_rope_head_dim and v_head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.engine.attention import SingleTokenContext, attend
from mixchat.engine.model_tensors import ModelTensors
from mixchat.engine.norm import RMSNorm
from mixchat.engine.rope import RotaryEmbedding
from mixchat.engine.sequence_cache import TokenContext
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.program import Program, Stage, Step, alone, together
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.matrix.linear import PackedLinear, as_packed
from mixchat.weights.matrix.quant_type import Linear, RecordingLinear, RecordRows

_NORM_EPS = 1e-6  # of the norms of latents, whatever other norms have


class HeadMatrices:
    """A matrix [R, C] for each head."""

    def __init__(self, matrices: Sequence[Linear]) -> None:
        self.matrices = matrices
        self._record: RecordRows = lambda rows: None

    def record_inputs(self, record: RecordRows) -> None:
        """Record the inputs of all heads as rows of one matrix."""
        self._record = record

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """Map x [H, T, C] to [H, T, R]."""
        self._record(x.flatten(0, 1))
        packed = [matrix for matrix in self.matrices if isinstance(matrix, PackedLinear)]
        if not packed:
            pairs = zip(self.matrices, x, strict=True)
            return torch.stack([matrix(own, exact=exact) for matrix, own in pairs])
        out = x.new_empty(*x.shape[:2], packed[0].rows)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        rounds, products = PackedLinear.grouped_steps(packed, flat, [*out], exact=exact)
        Program([together(*rounds), *(together(*steps) for steps in products)]).run()
        return out

    def steps(self, x: torch.Tensor, outs: Sequence[torch.Tensor]) -> tuple[list[Step], list[Step]]:
        """Return `__call__` for one token as steps, from x [H, C] to `outs`, each [1, R].

        The second ones need the first.
        """
        packed = [as_packed(matrix) for matrix in self.matrices]
        rounds, products = PackedLinear.grouped_steps(packed, x, outs, exact=True)
        return rounds, [*chain(*products)]


class LatentAttention:
    """Causal attention of all heads to one latent a token.

    a_proj: gives the latent of queries, or without `q_b_proj` the queries, then the token's latent
    and the r columns of its keys that rotate. Queries are all heads' n columns, then their r.
    """

    def __init__(
        self,
        layer: int,
        config: ModelConfig,
        matrices: Mapping[str, Linear],
        heads: Mapping[str, HeadMatrices],
        norms: Mapping[str, RMSNorm],
        rope: RotaryEmbedding,
    ) -> None:
        self._layer, self.config, self.rope = layer, config, rope
        self.matrices, self.heads, self.norms = dict(matrices), heads, norms

    @classmethod
    def build(
        cls, layer: int, used: Blueprint, tensors: ModelTensors, rope: RotaryEmbedding | None
    ) -> LatentAttention:
        spec, count = used.mixer(layer), used.config.num_attention_heads
        assert rope is not None
        by_head = "k_b_proj", "v_b_proj"
        return cls(
            layer,
            used.config,
            {
                role: tensors.linear(matrix)
                for role, matrix in spec.matrices.items()
                if role not in by_head
            },
            {role: HeadMatrices(tensors.parts(spec.matrices[role], count)) for role in by_head},
            {role: RMSNorm(tensors.tensor(w), _NORM_EPS) for role, w in spec.tensors.items()},
            rope,
        )

    def record_inputs(self, records: Mapping[str, RecordRows]) -> None:
        for role, matrix in self.matrices.items():
            self.matrices[role] = RecordingLinear(matrix, records[role])
        for role, matrices in self.heads.items():
            matrices.record_inputs(records[role])

    def has_stages(self, dtype: torch.dtype, sequences: int) -> bool:
        return sequences == 1 and rows.can_compute(dtype, self.rope.width // 2)

    def __call__(
        self, x: torch.Tensor, context: TokenContext, *, exact: bool = False
    ) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""
        config, tokens = self.config, x.shape[0]
        heads, latent = config.num_attention_heads, config.kv_lora_rank
        queries, latents, keys = self._split(self.matrices["a_proj"](x, exact=exact))
        self.norms["kv_a_norm"].normalize_heads(latents)
        positions = context.positions(tokens)
        if config.q_lora_rank:
            self.norms["q_a_norm"].normalize_heads(queries)
            if (scales := self.rope.query_scales) is not None:
                queries = rows.weighted_sum(queries.unsqueeze(1), scales[positions].unsqueeze(1))
            queries = self.matrices["q_b_proj"](queries, exact=exact)
        kept, rotating = self._by_head(queries)  # [T, H, n], [T, H, r]
        absorbed = self.heads["k_b_proj"](kept.transpose(0, 1), exact=exact)  # [H, T, L]
        whole = x.new_empty(tokens, heads, latent + config.qk_rope_head_dim)
        whole[..., :latent] = absorbed.transpose(0, 1)
        whole[..., latent:] = self.rope(rotating, positions)
        keys = self.rope(keys.unsqueeze(1), positions)  # [T, 1, r]
        attended = attend(self._layer, context, whole, keys, latents.unsqueeze(1))  # [T, H, L]
        values = self.heads["v_b_proj"](attended.transpose(0, 1), exact=exact)  # [H, T, v]
        return self.matrices["o_proj"](values.transpose(0, 1).flatten(1), exact=exact)

    def _split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what `a_proj` gives: queries or their latents, latents [T, L], keys [T, r]."""
        end = rows.shape[1] - self.config.qk_rope_head_dim
        start = end - self.config.kv_lora_rank
        return rows[:, :start], rows[:, start:end], rows[:, end:]

    def _by_head(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns of queries that do not rotate [T, H, n], and that do [T, H, r]."""
        config, heads = self.config, self.config.num_attention_heads
        kept = heads * config.qk_nope_head_dim
        tokens = queries.shape[0]
        return queries[:, :kept].view(tokens, heads, -1), queries[:, kept:].view(tokens, heads, -1)

    def stages(self, context: SingleTokenContext) -> list[Stage]:
        config, matrices = self.config, self.matrices
        heads, latent = config.num_attention_heads, config.kv_lora_rank
        width = config.qk_nope_head_dim + config.qk_rope_head_dim
        first = config.q_lora_rank or heads * width
        row = context.tensor("latents", 1, first + latent + config.qk_rope_head_dim)
        round_x, project = as_packed(matrices["a_proj"]).steps(context.normed, row)
        queries, latents, keys = self._split(row)
        rotated = context.tensor("rotated keys", 1, 1, config.qk_rope_head_dim)
        # Each of these steps needs the step before it, so one thread runs them in order.
        prepare = [self.norms["kv_a_norm"].heads_step(latents)]
        prepare.append(context.rotate(self.rope, keys.unsqueeze(1), rotated))
        projected: list[Stage] = []
        if config.q_lora_rank:
            whole = context.tensor("queries", 1, heads * width)
            prepare_q = [self.norms["q_a_norm"].heads_step(queries)]
            if self.rope.query_scales is not None:
                scaled = context.tensor("scaled queries", *queries.shape)
                prepare_q.append(context.scale(self.rope, queries, scaled))
                queries = scaled
            round_q, project_q = as_packed(matrices["q_b_proj"]).steps(queries, whole)
            projected = [alone(*prepare_q, round_q), together(project_q)]
            queries = whole
        kept, rotating = self._by_head(queries)
        absorbed = context.tensor("absorbed", 1, heads, latent + config.qk_rope_head_dim)
        prepare.append(context.rotate(self.rope, rotating, absorbed[:, :, latent:]))
        places = [absorbed[:, head, :latent] for head in range(heads)]
        round_kept, absorb = self.heads["k_b_proj"].steps(kept[0], places)
        attended = context.tensor("attended latents", 1, heads, latent)
        (steps,) = context.attend(
            self._layer, absorbed, rotated, latents.unsqueeze(1), None, attended
        )
        values = context.tensor("values", 1, heads * config.v_head_dim)
        round_attended, project_values = self.heads["v_b_proj"].steps(
            attended[0], values.chunk(heads, dim=1)
        )
        round_values, project_out = as_packed(matrices["o_proj"]).steps(values, context.added)
        return [
            alone(round_x),
            together(project),
            *projected,
            alone(*prepare, steps.store, *round_kept),
            together(*absorb),
            together(steps.attend),
            together(steps.merge),
            alone(*round_attended),
            together(*project_values),
            alone(round_values),
            together(project_out),
        ]
