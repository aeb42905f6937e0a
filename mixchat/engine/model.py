"""The Mixtral transformer: from token ids to logits. It does not know where experts are.

T = tokens of this call, P = tokens before them (in the cache), D = hidden_size, V = vocab_size,
H = num_attention_heads, G = num_key_value_heads, h = head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from mixchat.engine.kv_cache import KVCache
from mixchat.engine.moe import SparseMoE
from mixchat.engine.rope import RotaryEmbedding
from mixchat.kernels import rows
from mixchat.model_config import ModelConfig
from mixchat.weights.matrix.linear import Linear


class RMSNorm:
    """x / rms(x) times the weight."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight, self._eps = weight, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""
        return rows.rms_norm(x, self._weight, self._eps)


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
        self._qkv_proj, self._o_proj, self._rope = qkv_proj, o_proj, rope

    def __call__(self, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""
        config, tokens = self._config, x.shape[0]
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        qkv = self._qkv_proj(x).view(tokens, heads + 2 * groups, config.head_dim)  # [T, H + 2G, h]
        rotated = self._rope(qkv[:, : heads + groups], cache.length)  # [T, H + G, h]
        queries, keys = rotated[:, :heads], rotated[:, heads:]  # [T, H, h], [T, G, h]
        attended = cache.attend(self._layer, queries, keys, qkv[:, heads + groups :])  # [T, H, h]
        return self._o_proj(attended.reshape(tokens, -1))


class Block:
    """One layer: attention, then the experts. Each reads the normed x, and is added to x."""

    def __init__(
        self, attention_norm: RMSNorm, attention: Attention, moe_norm: RMSNorm, moe: SparseMoE
    ) -> None:
        self._attention_norm, self._attention = attention_norm, attention
        self._moe_norm, self._moe = moe_norm, moe

    def __call__(self, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""
        x = x + self._attention(self._attention_norm(x), cache)
        return x + self._moe(self._moe_norm(x))


class Model:
    """Embedding, blocks, norm and head."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: torch.Tensor,
        blocks: Sequence[Block],
        norm: RMSNorm,
        head: Linear,
    ) -> None:
        self.config = config
        self._embedding, self._blocks, self._norm, self._head = embedding, blocks, norm, head

    @property
    def device(self) -> torch.device:
        """Return the device of the ids and of the logits."""
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the hidden states."""
        return self._embedding.dtype

    def forward(
        self,
        ids: torch.Tensor,
        cache: KVCache,
        *,
        all_logits: bool = False,
        after_layer: Callable[[int], object] = lambda layer: None,
    ) -> torch.Tensor:
        """Return logits [1, V] of the last token, or [T, V] of all; the ids [T] join the cache.

        The cache must have room for them: P + T <= capacity. `after_layer` is called after each
        layer with its number.
        """
        x = functional.embedding(ids, self._embedding)  # [T, D]
        for layer, block in enumerate(self._blocks):
            x = block(x, cache)
            after_layer(layer)
        logits = self._head(self._norm(x if all_logits else x[-1:]))
        cache.length += ids.shape[0]  # last: an interrupted pass leaves the cache as it was
        return logits
