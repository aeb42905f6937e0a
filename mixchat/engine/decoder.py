"""Decodes one token of a sequence, or of each of several, as programs of kernels.

A program gives the same bits as the `__call__` of a `Block` with `exact`, and saves the time of
Python between kernels. It ends with the router of a layer whose runner has to bring experts, or
with the head.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from itertools import takewhile

import torch

from mixchat.engine.attention import SingleTokenContext
from mixchat.engine.model import AfterLayer, Block, Output
from mixchat.engine.sequence_cache import SequenceCache, TokenContext
from mixchat.experts.holder import LayerExperts
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.program import Program, Stage, Step, in_order, together
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.matrix.linear import PackedLinear

_MAX_DECODERS = 4  # for different counts of sequences that are kept


class Decoder:
    """Computes the next tokens of caches (a `SingleTokenDecoder`).

    It takes caches of the same capacity and form as this one. `output` is the norm and the head, if
    they are to be computed.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        cache: SequenceCache,
        hidden_size: int,
        dtype: torch.dtype,
        output: Output | None = None,
    ) -> None:
        self._blocks, self._cache, self._output = blocks, cache, output
        self._new_context = partial(SingleTokenContext, cache, hidden_size, dtype)
        # By the count of sequences. The most recently used one comes last.
        self._decoders = {1: _Decoder(blocks, self._new_context(1), output)}

    def run(
        self, x: torch.Tensor, context: TokenContext, after_layer: AfterLayer
    ) -> torch.Tensor | None:
        count = len(context.caches)
        if not all(self._cache.is_like(cache) for cache in context.caches):
            return None
        decoder = self._decoders.pop(count, None)
        if decoder is None:
            decoder = _Decoder(self._blocks, self._new_context(count), self._output)
        self._decoders[count] = decoder
        if len(self._decoders) > _MAX_DECODERS:
            del self._decoders[next(number for number in self._decoders if number > 1)]
        return decoder.run(x, context.caches, after_layer)


class _Decoder:
    """Computes the next tokens of as many caches as the context has."""

    def __init__(
        self, blocks: Sequence[Block], context: SingleTokenContext, output: Output | None
    ) -> None:
        self._context, self._runner = context, blocks[-1].moe.runner
        self._head = None if output is None else _Head(output, self._context)
        dense = [*takewhile(lambda block: block.is_dense, blocks)]
        sparse = blocks[len(dense) :]
        # The experts that the routers select, [layers, N, K].
        shape = len(sparse), context.sequences, sparse[0].moe.choices
        selected = torch.empty(shape, dtype=torch.int64)
        # The same numbers, [layers, N * K]. Torch takes three times as long to make a list.
        self._selected = selected.flatten(1).numpy()
        first = [stage for block in dense for stage in block.dense_stages(self._context)]
        last = [] if self._head is None else self._head.stages
        self._layers = [
            _Layer(
                block,
                self._context,
                routed,
                first if block is sparse[0] else (),
                last if block is sparse[-1] else (),
            )
            for block, routed in zip(sparse, selected, strict=True)
        ]
        self._dense = len(dense)
        self._programs: dict[tuple[int, int], Program] = {}  # by their layers: from and to

    def run(
        self, x: torch.Tensor, caches: Sequence[SequenceCache], after_layer: AfterLayer
    ) -> torch.Tensor:
        self._context.x.copy_(x)
        self._context.set_places(caches)
        if self._head is not None:
            self._head.prepare()
        start = 0
        while start < len(self._layers):
            # A program ends after the first layer without all experts in memory. The list keeps
            # the memory of the others until the program has ended.
            resident = self._runner.resident([layer.keys for layer in self._layers[start:]])
            layers = self._layers[start : start + len(resident) + 1]
            end = start + len(layers)
            for layer, experts in zip(layers, [*resident, None], strict=False):
                if layer.use(experts):
                    # Programs that overlap have the layer's old stages, too.
                    self._programs.clear()
            if (start, end) not in self._programs:
                stages = [stage for layer in layers for stage in layer.stages]
                self._programs[start, end] = Program(stages)
            self._programs[start, end].run()
            if resident:
                selected = self._selected[start : start + len(resident)].tolist()
                hits = [[*dict.fromkeys(experts)] for experts in selected]
                self._runner.note_hits(layers[0].keys[0].layer, hits)
            if len(resident) < len(layers):
                layers[-1].run_routed()
            after_layer(self._dense + end - 1)
            start = end
        return self._context.x if self._head is None else self._head.logits()


def new_decoder(
    used: Blueprint, blocks: Sequence[Block], cache: SequenceCache, output: Output | None = None
) -> Decoder | None:
    """Return the decoder of a model that computes `used`, or None if kernels cannot do it."""
    config, dtype = used.config, used.quantization.dtype
    matrices = used.typical_matrices
    whole = all(matrix.has_kernel and matrix.stored_rows == matrix.rows for matrix in matrices)
    if not whole or not all(layer.has_steps for layer in cache.layers):
        return None
    if not all(rows.can_compute(dtype, matrix.columns) for matrix in matrices):
        return None
    if not all(block.mixer.has_stages(dtype) for block in blocks):
        return None
    return Decoder(blocks, cache, config.hidden_size, dtype, output)


class _Layer:
    """A layer's stages, between the stages of dense layers `first` and of the head `last`.

    They end with the router if the layer's experts are not all in memory.
    """

    def __init__(
        self,
        block: Block,
        context: SingleTokenContext,
        selected: torch.Tensor,
        first: Sequence[Stage],
        last: Sequence[Stage],
    ) -> None:
        self._block, self._context, self.keys = block, context, block.moe.keys
        self._routing = selected, torch.empty(selected.shape)
        self._first = [*first, *block.mixer_stages(context)]
        up_to_experts = block.stages_up_to_experts(self._routing, context)
        self._up_to_experts = [*self._first, *up_to_experts]
        self._last, self._last_program = last, Program(last) if last else None
        self.stages = self._up_to_experts
        # Not kept alive, so that the memory of a slot can be given back.
        self._experts: weakref.ref[LayerExperts] | None = None

    def use(self, experts: LayerExperts | None) -> bool:
        """Let the stages end with these experts, or with the router if there are none.

        Returns False if they do already.
        """
        previous = None if self._experts is None else self._experts()
        # A list that is gone gives None, too, but its stages have addresses that are gone.
        if previous is experts and (self._experts is None) == (experts is None):
            return False
        self.stages = self._up_to_experts
        if experts is not None:
            after = self._block.stages_with_experts(self._routing, self._context, experts)
            self.stages = [*self._first, *after, *self._last]
        self._experts = None if experts is None else weakref.ref(experts)
        return True

    def run_routed(self) -> None:
        """Compute what is after the router."""
        self._block.run_routed(self._routing, self._context)
        if self._last_program is not None:
            self._last_program.run()


class _Head:
    """The norm and the head, as stages if the head is packed."""

    def __init__(self, output: Output, context: SingleTokenContext) -> None:
        self._output, self._x = output, context.x
        self.stages: list[Stage] = []
        self._project: Step | None = None
        norm, head, _ = output
        if isinstance(head, PackedLinear) and head.is_whole:
            self._logits = torch.empty(len(context.x), head.rows, dtype=context.x.dtype)
            round_x, self._project = head.steps(context.normed, self._logits)
            first = norm.stage(context.x, context.normed)
            rounds = in_order(len(context.x), [round_x])
            self.stages = [first, *rounds, together(self._project)]

    def prepare(self) -> None:
        """Let the stages write to a new tensor."""
        if self._project is not None:
            self._logits = torch.empty_like(self._logits)
            self._project.set(out=self._logits.data_ptr())

    def logits(self) -> torch.Tensor:
        if self._project is None:
            return self._output(self._x, exact=True)
        return self._output.capped(self._logits)
