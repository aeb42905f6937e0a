"""The Mixtral transformer: from token ids to logits. It does not know where experts are.

T = tokens of this call, P = tokens before them (in the cache), D = hidden_size, V = vocab_size,
H = num_attention_heads, G = num_key_value_heads, h = head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.engine.moe import SparseMoE
from mixchat.engine.rope import RotaryEmbedding
from mixchat.kernels import rows
from mixchat.weights.matrix.linear import Linear

LAST = slice(-1, None)

AfterLayer = Callable[[int], object]
Embedding = Callable[[torch.Tensor], torch.Tensor]  # from ids [T], on the CPU, to rows [T, D]


class KVContext(Protocol):
    """The tokens before those of a pass: a `KVCache`, or those of several sequences together."""

    def positions(self, tokens: int) -> slice | torch.Tensor:
        """Return the positions of the next T tokens in their sequences."""

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Store keys and values [T, G, h] of a layer; return the attention [T, H, h] of queries."""

    def advance(self, tokens: int) -> None:
        """Count so many new tokens, after all layers have stored them."""


class RMSNorm:
    """x / rms(x) times the weight."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""
        return rows.rms_norm(x, self.weight, self.eps)


class Attention:
    """Causal grouped-query attention of one layer, over the cache and the new tokens."""

    def __init__(
        self,
        layer: int,
        config: ModelConfig,
        qkv_proj: Linear,
        o_proj: Linear,
        rope: RotaryEmbedding,
    ) -> None:
        self._layer, self._config = layer, config
        self.qkv_proj, self.o_proj, self.rope = qkv_proj, o_proj, rope

    def __call__(self, x: torch.Tensor, before: KVContext, *, exact: bool = False) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""
        config, tokens = self._config, x.shape[0]
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        qkv = self.qkv_proj(x, exact=exact)
        qkv = qkv.view(tokens, heads + 2 * groups, config.head_dim)  # [T, H + 2G, h]
        rotated = self.rope(qkv[:, : heads + groups], before.positions(tokens))  # [T, H + G, h]
        queries, keys = rotated[:, :heads], rotated[:, heads:]  # [T, H, h], [T, G, h]
        attended = before.attend(self._layer, queries, keys, qkv[:, heads + groups :])  # [T, H, h]
        return self.o_proj(attended.reshape(tokens, -1), exact=exact)


class Block:
    """One layer: attention, then the experts. Each reads the normed x, and is added to x."""

    def __init__(
        self, attention_norm: RMSNorm, attention: Attention, moe_norm: RMSNorm, moe: SparseMoE
    ) -> None:
        self.attention_norm, self.attention = attention_norm, attention
        self.moe_norm, self.moe = moe_norm, moe

    def __call__(self, x: torch.Tensor, before: KVContext, *, exact: bool = False) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""
        x = x + self.attention(self.attention_norm(x), before, exact=exact)
        return x + self.moe(self.moe_norm(x), exact=exact)


class SingleTokenDecoder(Protocol):
    """Another way to compute the blocks for the next token of a cache, with the same bits."""

    def run(
        self, x: torch.Tensor, before: KVContext, after_layer: AfterLayer
    ) -> torch.Tensor | None:
        """Map the token's row [1, D] to the one after all layers, which the next call overwrites.

        `after_layer` is called with the number of a layer, though not after each. Returns None
        where it cannot be done for this cache.
        """


class Model:
    """Embedding, blocks, norm and head."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        blocks: Sequence[Block],
        norm: RMSNorm,
        head: Linear,
    ) -> None:
        self.config = config
        self._embedding, self.blocks, self._norm, self._head = embedding, blocks, norm, head
        self._decoder: SingleTokenDecoder | None = None

    @property
    def device(self) -> torch.device:
        """Return the device of the hidden states and of the logits."""
        return self._norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the hidden states."""
        return self._norm.weight.dtype

    def decode_by(self, decoder: SingleTokenDecoder | None) -> None:
        """Let a decoder compute the blocks for each single token."""
        self._decoder = decoder

    def forward(
        self,
        ids: torch.Tensor,
        before: KVContext,
        *,
        exact: bool = False,
        logits_of: slice | list[int] = LAST,
        after_layer: AfterLayer = lambda layer: None,
    ) -> torch.Tensor:
        """Return the logits [n, V] of the last token, or of others; the ids [T] join the cache.

        The ids are on the CPU. The cache must have room for them: P + T <= capacity. With `exact`
        each token has the bits that it has in a call of its own, where all matrices can be computed
        so (see `Linear`). `after_layer` is called after layers with their number.
        """
        x = self._embedding(ids)  # [T, D]
        decoded = None
        if self._decoder is not None and ids.shape[0] == 1:
            decoded = self._decoder.run(x, before, after_layer)
        x = self._through_blocks(x, before, exact, after_layer) if decoded is None else decoded
        logits = self._head(self._norm(x[logits_of]), exact=exact)
        before.advance(ids.shape[0])  # last: an interrupted pass leaves the cache as it was
        return logits

    def _through_blocks(
        self, x: torch.Tensor, before: KVContext, exact: bool, after_layer: AfterLayer
    ) -> torch.Tensor:
        for layer, block in enumerate(self.blocks):
            x = block(x, before, exact=exact)
            after_layer(layer)
        return x
