"""Decodes one token of a sequence, or of each of several, as programs of kernels.

A program gives the same bits as `compute_layer` with `exact`, and saves the time of Python between
kernels. It ends with the router of a layer whose runner has to bring experts, or with the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import takewhile

import torch

from mixchat.engine.caches.sequence_cache import SequenceCache, TokenContext
from mixchat.engine.layers.block import Block
from mixchat.engine.layers.operations import Norm, Rows, UnsupportedOperationError
from mixchat.engine.layers.program import ExpertWorks, TokenBuffers, Work, layer_works, span, staged
from mixchat.engine.model import AfterLayer, OutputLayers
from mixchat.experts.holder import LayerExperts
from mixchat.kernels.cpu.program import Program, Stage, Step
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
        output: OutputLayers | None = None,
    ) -> None:
        self._blocks = blocks
        self._cache = cache
        self._output = output
        self._new_buffers = partial(TokenBuffers, cache, hidden_size, dtype)
        # By the count of sequences. The most recently used one comes last.
        self._decoders = {1: _BatchDecoder(blocks, self._new_buffers(1), output)}

    def run(
        self, x: torch.Tensor, context: TokenContext, after_layer: AfterLayer
    ) -> torch.Tensor | None:
        count = len(context.caches)
        if not all(self._cache.is_like(cache) for cache in context.caches):
            return None
        decoder = self._decoders.pop(count, None)
        if decoder is None:
            decoder = _BatchDecoder(self._blocks, self._new_buffers(count), self._output)
        self._decoders[count] = decoder
        if len(self._decoders) > _MAX_DECODERS:
            del self._decoders[next(number for number in self._decoders if number > 1)]
        return decoder.run(x, context.caches, after_layer)


class _BatchDecoder:
    """Computes the next tokens of as many caches as there are buffers for."""

    def __init__(
        self, blocks: Sequence[Block], buffers: TokenBuffers, output: OutputLayers | None
    ) -> None:
        self._buffers = buffers
        self._runner = blocks[-1].experts.runner
        self._head = None if output is None else _Head(output, buffers)
        dense = [*takewhile(lambda block: block.is_dense, blocks)]
        sparse = blocks[len(dense) :]
        # The experts that the routers select, [layers, N, K].
        shape = len(sparse), buffers.sequences, sparse[0].experts.selected.size
        selected = torch.empty(shape, dtype=torch.int64)
        # The same numbers, [layers, N * K]. Torch takes three times as long to make a list.
        self._selected = selected.flatten(1).numpy()
        self._layers = [
            _Layer(block, buffers, chosen) for block, chosen in zip(sparse, selected, strict=True)
        ]
        first = [
            stage
            for block in dense
            for stage in staged(layer_works(block.operations, buffers), buffers.sequences)
        ]
        self._first = first
        self._last = [] if self._head is None else self._head.stages
        self._dense = len(dense)
        # By the layers, from and to, and how many of them have all experts in memory.
        self._programs: dict[tuple[int, int, int], Program] = {}

    def run(
        self, x: torch.Tensor, caches: Sequence[SequenceCache], after_layer: AfterLayer
    ) -> torch.Tensor:
        self._buffers.x.copy_(x)
        self._buffers.set_places(caches)
        if self._head is not None:
            self._head.prepare()
        start = 0
        while start < len(self._layers):
            # A program ends after the first layer without all experts in memory. The list keeps
            # the memory of the others until the program has ended.
            resident = self._runner.resident([layer.keys for layer in self._layers[start:]])
            for layer, experts in zip(self._layers[start:], resident, strict=False):
                layer.use(experts)
            complete = start + len(resident)
            end = min(complete + 1, len(self._layers))
            self._program(start, complete, end).run()
            if resident:
                selected = self._selected[start:complete].tolist()
                hits = [[*dict.fromkeys(experts)] for experts in selected]
                self._runner.note_hits(self._layers[start].keys[0].layer, hits)
            if complete < end:
                self._layers[complete].run_routed()
                if end == len(self._layers):
                    self._run_last()
            after_layer(self._dense + end - 1)
            start = end
        return self._buffers.x if self._head is None else self._head.logits()

    def _program(self, start: int, complete: int, end: int) -> Program:
        """Return the program of layers up to `end`.

        Those before `complete` have all experts in memory. One after it ends with its router.
        """
        key = start, complete, end
        if key not in self._programs:
            stages = [stage for layer in self._layers[start:complete] for stage in layer.whole]
            for layer in self._layers[complete:end]:
                stages += layer.up_to_experts
            first = [] if start else self._first
            last = self._last if complete == len(self._layers) else []
            self._programs[key] = Program([*first, *stages, *last])
        return self._programs[key]

    def _run_last(self) -> None:
        """Compute what follows a last layer whose experts the runner has computed."""
        if self._last:
            key = len(self._layers), len(self._layers), len(self._layers)
            if key not in self._programs:
                self._programs[key] = Program(self._last)
            self._programs[key].run()


def new_decoder(
    blocks: Sequence[Block],
    cache: SequenceCache,
    used: Blueprint,
    output: OutputLayers | None = None,
) -> Decoder | None:
    """Return the decoder of a model that computes `used`, or None if kernels cannot do it."""
    experts = (matrix for form in used.expert_forms for matrix in (form.gate_up, form.down))
    if not all(matrix.has_kernel and matrix.stored_rows == matrix.rows for matrix in experts):
        return None
    try:
        return Decoder(blocks, cache, used.config.hidden_size, used.quantization.dtype, output)
    except UnsupportedOperationError:
        return None


class _Layer:
    """A layer with experts, as stages up to its router, and as stages with all its experts."""

    def __init__(self, block: Block, buffers: TokenBuffers, selected: torch.Tensor) -> None:
        operation = block.experts
        place = block.operations.index(operation)
        buffers.put(operation.selected, selected)
        self._operation = operation
        self._buffers = buffers
        self.keys = block.keys
        self._before = layer_works(block.operations[:place], buffers)
        self._after = layer_works(block.operations[place + 1 :], buffers)
        self.up_to_experts = staged(self._before, buffers.sequences)
        self._after_experts = Program(staged(self._after, buffers.sequences))
        self._experts: ExpertWorks | None = None
        self.whole: list[Stage] = []

    def use(self, experts: LayerExperts) -> None:
        """Let the stages compute with these experts, which are in memory."""
        if self._experts is None:
            self._experts = ExpertWorks(self._operation, self._buffers, experts)
            works: list[Work] = [*self._before, *self._experts.works, *self._after]
            self.whole = staged(works, self._buffers.sequences)
        self._experts.use(experts)

    def run_routed(self) -> None:
        """Compute what is after the router, by the runner of the experts."""
        operation = self._operation
        # Copies, because a runner may hold on to what it is given.
        inputs = [self._buffers.tensor(part).clone() for part in operation.inputs]
        added = operation.runner.run(operation.layer, *inputs, exact=True)
        self._buffers.tensor(operation.out).copy_(added)
        self._after_experts.run()


class _Head:
    """The norm and the head, as stages if the head is packed."""

    def __init__(self, output: OutputLayers, buffers: TokenBuffers) -> None:
        self._output = output
        self._x = buffers.x
        self.stages: list[Stage] = []
        self._project: Step | None = None
        norm, head, _ = output
        if isinstance(head, PackedLinear) and head.is_whole:
            x, normed = (Rows.new(name, self._x.shape[1]) for name in ("x", "normed"))
            self._logits = torch.empty(len(self._x), head.rows, dtype=self._x.dtype)
            round_x, self._project = head.steps(buffers.tensor(normed), self._logits)
            works = [
                *layer_works([Norm(normed, x, norm)], buffers),
                Work([round_x], [span(normed)], [("rounded", 0, 1)]),
                Work([self._project], [("rounded", 0, 1)], [], is_wide=True),
            ]
            self.stages = staged(works, buffers.sequences)

    def prepare(self) -> None:
        """Let the stages write to a new tensor."""
        if self._project is not None:
            self._logits = torch.empty_like(self._logits)
            self._project.set(out=self._logits.data_ptr())

    def logits(self) -> torch.Tensor:
        if self._project is None:
            return self._output(self._x, exact=True)
        return self._output.capped(self._logits)
