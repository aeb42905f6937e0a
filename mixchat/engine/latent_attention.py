"""Multi-head latent attention of one layer (DeepSeek-AI, arXiv:2405.04434), in its absorbed form.

Keys and values of all heads are made of one latent a token, which the cache holds. A head's query
goes through the head's matrix of keys, and is then compared with the latents. Their weighted sum
goes through the head's matrix of values. So no key or value is ever made, for prompts neither.

T = tokens of this call, D = hidden_size, H = num_attention_heads, L = kv_lora_rank, n, r and v =
qk_nope_head_dim, qk_rope_head_dim and v_head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.engine.attention import SingleTokenContext, attend
from mixchat.engine.model_tensors import ModelTensors
from mixchat.engine.norm import RMSNorm
from mixchat.engine.rope import RotaryEmbedding
from mixchat.engine.sequence_cache import TokenContext
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.program import Program, Stage, Step, in_order, together
from mixchat.kernels.cpu.quantized_matmul import grouped_matmul_steps
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
        rounds, products = self.stages(x.contiguous(), out, exact=exact)
        Program([together(*rounds), *products]).run()
        return out

    def stages(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        x_rows: torch.Tensor | None = None,
        *,
        exact: bool,
    ) -> tuple[list[Step], list[Stage]]:
        """Return `__call__` as steps that round x [H, T, C], and stages that write `out` [H, T, R].

        `x_rows` [H * T] choose rows of x [n, C] instead.
        """
        packed = [as_packed(matrix).matrix for matrix in self.matrices]
        flat = x.flatten(0, -2)
        rounds, products = grouped_matmul_steps(flat, packed, [*out], x_rows, exact=exact)
        return rounds, [together(*steps) for steps in products]


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

    def has_stages(self, dtype: torch.dtype) -> bool:
        config = self.config
        columns = self.rope.width // 2, config.qk_nope_head_dim, config.kv_lora_rank
        return all(rows.can_compute(dtype, count) for count in (*columns, config.v_head_dim))

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
        config, matrices, tokens = self.config, self.matrices, context.sequences
        heads, latent = config.num_attention_heads, config.kv_lora_rank
        width = config.qk_nope_head_dim + config.qk_rope_head_dim
        first = config.q_lora_rank or heads * width
        row = context.tensor("latents", tokens, first + latent + config.qk_rope_head_dim)
        round_x, project = as_packed(matrices["a_proj"]).steps(context.normed, row)
        queries, latents, keys = self._split(row)
        rotated = context.tensor("rotated keys", tokens, 1, config.qk_rope_head_dim)
        projected: list[Stage] = []
        if config.q_lora_rank:
            normed = context.tensor("query latents", tokens, config.q_lora_rank)
            prepare = [[self.norms["q_a_norm"].heads_step(queries, normed)]]
            if self.rope.query_scales is not None:
                scaled = context.tensor("scaled query latents", *normed.shape)
                prepare.append([context.scale(self.rope, normed, scaled)])
                normed = scaled
            queries = context.tensor("queries", tokens, heads * width)
            round_q, project_q = as_packed(matrices["q_b_proj"]).steps(normed, queries)
            projected = [*in_order(tokens, *prepare, [round_q]), together(project_q)]
        kept, rotating = self._by_head(queries)
        # The matrix of a head has the rows of all tokens as its input.
        by_head = context.tensor("kept", heads, tokens, config.qk_nope_head_dim)
        products = context.tensor("absorbed by head", heads, tokens, latent)
        round_kept, absorb = self.heads["k_b_proj"].stages(by_head, products, exact=True)
        absorbed = context.tensor("absorbed", tokens, heads, latent + config.qk_rope_head_dim)
        attended = context.tensor("attended latents", tokens, heads, latent)
        steps = context.attend(self._layer, absorbed, rotated, latents.unsqueeze(1), None, attended)
        values_by_head = context.tensor("values by head", heads, tokens, config.v_head_dim)
        x_rows = torch.arange(tokens * heads).view(tokens, heads).t().flatten()
        round_attended, project_values = self.heads["v_b_proj"].stages(
            attended, values_by_head, x_rows, exact=True
        )
        values = context.tensor("values", tokens, heads, config.v_head_dim)
        round_values, project_out = as_packed(matrices["o_proj"]).steps(
            values.flatten(1), context.added
        )
        return [
            *in_order(tokens, [round_x]),
            together(project),
            *projected,
            *in_order(
                tokens,
                [
                    self.norms["kv_a_norm"].heads_step(latents),
                    context.rotate(self.rope, keys.unsqueeze(1), rotated),
                    context.rotate(self.rope, rotating, absorbed[:, :, latent:]),
                    *_copies(kept, by_head.transpose(0, 1)),
                ],
                [*(each.store for each in steps), *round_kept],
            ),
            *absorb,
            *in_order(tokens, _copies(products.transpose(0, 1), absorbed[:, :, :latent])),
            together(*(each.attend for each in steps)),
            together(*(each.merge for each in steps)),
            *in_order(tokens, round_attended),
            *project_values,
            *in_order(tokens, _copies(values_by_head.transpose(0, 1), values), [round_values]),
            together(project_out),
        ]


def _copies(x: torch.Tensor, out: torch.Tensor) -> list[Step]:
    """Return steps that copy the heads of each token, from x [T, H, n] to `out`."""
    return [rows.copy_step(*token) for token in zip(x, out, strict=True)]
