"""The transformer, from token ids to logits. It does not know where experts are.

T = tokens of this call, P = tokens before them (in the cache), D = hidden_size, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from mixchat.base import gpu
from mixchat.base.model_config import ModelConfig
from mixchat.engine.caches.sequence_cache import TokenContext
from mixchat.engine.layers.block import Block
from mixchat.engine.layers.compute import Record, compute_layer
from mixchat.engine.layers.operations import RMSNorm
from mixchat.kernels.cpu import rows
from mixchat.weights.format.blueprint import HEAD
from mixchat.weights.matrix.quant_type import Linear

LAST = slice(-1, None)

AfterLayer = Callable[[int], object]
Embedding = Callable[[torch.Tensor], torch.Tensor]  # from ids [T], on the CPU, to rows [T, D]


class OutputLayers(NamedTuple):
    """The norm and the head after the layers, and the cap of the logits."""

    norm: RMSNorm
    head: Linear
    cap: float | None = None

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """Map rows x [n, D] to logits [n, V]."""
        return self.capped(self.head(self.norm(x), exact=exact))

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.cap is None else rows.softcap(logits, self.cap)


class SingleTokenDecoder(Protocol):
    """Computes the next token of a sequence, or of each of several, with the same bits."""

    def run(
        self, x: torch.Tensor, context: TokenContext, after_layer: AfterLayer
    ) -> torch.Tensor | None:
        """Map the tokens' rows [N, D] to their logits [N, V].

        A decoder without norm and head returns the rows after all layers, which the next call
        overwrites. Returns None if it cannot decode in this context.
        """


class Transformer:
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
        self._embedding = embedding
        self.blocks = blocks
        self.output = OutputLayers(norm, head, config.final_logit_softcapping)
        self._decoder: SingleTokenDecoder | None = None
        self._record: Record | None = None

    @property
    def device(self) -> torch.device:
        """Return the device of the first layer."""
        return self.blocks[0].device

    @property
    def decodes_apart(self) -> bool:
        """Return whether decoding gives other bits, and faster, than a pass with prompts."""
        return self._decoder is not None and gpu.is_gpu(self.device)

    def set_decoder(self, decoder: SingleTokenDecoder | None) -> None:
        self._decoder = decoder

    def record_inputs(self, record: Record) -> None:
        """Record the inputs [T, C] of mixers, dense parts and head, with their matrices' names.

        All tokens are recorded for the head, although it computes few.
        """
        # Its programs do not record.
        self._decoder = None
        self._record = record

    def forward(
        self,
        ids: torch.Tensor,
        context: TokenContext,
        *,
        exact: bool = False,
        logits_of: slice | list[int] = LAST,
        after_layer: AfterLayer = lambda layer: None,
    ) -> torch.Tensor:
        """Return the logits [n, V] of the last token, or of others. The ids [T] join the caches.

        The ids are on the CPU. The caches must have room for P + T tokens. With `exact` each token
        has the bits that it has alone in a call, if all matrices can be computed so.
        """
        x = self._embedding(ids)  # [T, D]
        logits = None
        sequences = len(context.caches)
        if self._decoder is not None and ids.shape[0] == sequences and (exact or sequences == 1):
            logits = self._decoder.run(x, context, after_layer)
        if logits is None:
            for layer, block in enumerate(self.blocks):
                x = x.to(block.device)
                x = compute_layer(block.operations, x, context, exact=exact, record=self._record)
                after_layer(layer)
            if self._record is not None:
                self._record(HEAD, self.output.norm(x))
            # Only these rows go through the head, whose matrix is the largest dense one.
            logits = self.output(x[logits_of], exact=exact)
        # Last, so that an interrupted pass leaves the caches as they were.
        context.advance(ids.shape[0])
        return logits
