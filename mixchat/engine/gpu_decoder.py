"""Decodes one token on GPUs as CUDA graphs.

If GPUs hold all experts, a token is one graph on each GPU, and the host waits once, for the logits.
Otherwise a layer is two graphs: up to its router, and its experts. The host waits for the choice of
the router, while the GPU computes the experts that it holds. The CPU computes the others.

Several sequences take turns by token, since a graph is for one cache. By the plan, that takes as
long as one answer after the other. Tokens of two answers in one pass without graphs took 227
launches for three layers, instead of 4.

D = hidden_size, K = num_experts_per_tok, V = vocab_size, L = layers of a GPU with experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby, pairwise, starmap
from typing import Any

import numpy as np
import torch

from mixchat.base import gpu
from mixchat.engine.caches.sequence_cache import SequenceCache, TokenContext, state_shapes
from mixchat.engine.caches.state_cache import StateCache
from mixchat.engine.layers.block import Block
from mixchat.engine.layers.graph import GraphWriter, Kernels, LayerMemory, TokenTensors
from mixchat.engine.layers.operations import Norm, UnsupportedOperationError
from mixchat.engine.model import AfterLayer, OutputLayers, Transformer
from mixchat.experts.gpu_experts import GpuExperts
from mixchat.kernels.gpu.product import product, split
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.gpu_expert import GpuExpertForm, expert_form
from mixchat.weights.matrix.gpu_linear import GpuLinear, as_gpu

_ALIGNMENT = 64  # bytes, of tensors in page-locked RAM


class GpuDecoder:
    """Computes the next tokens of some of these caches (a `SingleTokenDecoder`).

    Making it compiles all kernels, and runs each once.
    """

    def __init__(
        self,
        used: Blueprint,
        blocks: Sequence[Block],
        caches: Sequence[SequenceCache],
        output: OutputLayers,
        experts: GpuExperts,
    ) -> None:
        self._experts = experts
        by_device = groupby(enumerate(blocks), key=lambda item: item[1].device)
        layers = [dict(items) for _, items in by_device]
        self._sections = [
            _Section(used, own, output if own is layers[-1] else None, caches, experts)
            for own in layers
        ]

    def run(self, x: torch.Tensor, context: TokenContext, after_layer: AfterLayer) -> torch.Tensor:
        sequences = zip(torch.split(x, 1), context.caches, strict=True)
        return torch.cat([self._run_token(row, cache, after_layer) for row, cache in sequences])

    def _run_token(
        self, x: torch.Tensor, cache: SequenceCache, after_layer: AfterLayer
    ) -> torch.Tensor:
        """Map a token's row [1, D] to its logits [1, V]."""
        self._experts.publish()
        for section in self._sections:
            with gpu.current(section.device):
                x = section.run(x, cache, after_layer)
        self._experts.note_token(np.concatenate([each.selected for each in self._sections]))
        return x


def new_gpu_decoder(
    used: Blueprint, model: Transformer, caches: Sequence[SequenceCache], experts: GpuExperts
) -> GpuDecoder | None:
    """Return the decoder of a model on GPUs, or None if they cannot decode by graphs.

    Kernels may not take a matrix, or the system may refuse to lock RAM, which graphs write to.
    """
    if not gpu.is_gpu(model.device):
        return None
    try:
        return GpuDecoder(used, model.blocks, caches, model.output, experts)
    except (gpu.PageLockError, UnsupportedOperationError):
        return None


@dataclass(frozen=True)
class _Graphs:
    """The graphs of a GPU's layers for one cache.

    whole: all of them, if the GPU holds all experts. layers: for each layer with experts, what is
    up to its router, with dense layers before it, and its experts. last: what follows.
    """

    whole: Any
    layers: Sequence[tuple[Any, Any]]
    last: Any


class _Section:
    """The layers of one GPU, with the norm and the head if `output` is given."""

    def __init__(
        self,
        used: Blueprint,
        blocks: dict[int, Block],
        output: OutputLayers | None,
        caches: Sequence[SequenceCache],
        experts: GpuExperts,
    ) -> None:
        self._used = used
        self._blocks = blocks
        self._output = output
        self._experts = experts
        self.device = next(iter(blocks.values())).device
        self._sparse = [number for number, block in blocks.items() if not block.is_dense]
        self._reached = gpu.streams(self.device).Event()
        self._captured: list[Kernels] = []
        with gpu.current(self.device), torch.inference_mode():
            self._forms = {number: self._forms_of(number) for number in blocks}
            config = used.config
            outputs = max(map(self._count_outputs, blocks))
            # The indices of each layer's addresses, two for each tensor of its state.
            counts = [2 * len(state_shapes(config, number)) for number in blocks]
            ends = [*accumulate(counts, initial=1)]
            self._addresses = dict(zip(blocks, starmap(slice, pairwise(ends)), strict=True))
            shape = used.quantization.dtype, outputs, len(self._sparse), ends[-1]
            self._tokens = TokenTensors.new(config, *shape, self.device)
            self._sources = self._shared_with_host()
            self._host = _locked_copies(self._sources, self.device)
            self._graphs = {id(cache): self._capture(cache) for cache in caches}

    @property
    def selected(self) -> np.ndarray:
        """Return the experts of the last token's layers [L, K]."""
        return np.asarray(self._host["selected"].numpy())

    def run(self, x: torch.Tensor, cache: SequenceCache, after_layer: AfterLayer) -> torch.Tensor:
        """Map a token's row [1, D] to its row after these layers, or to logits [1, V] in RAM."""
        tokens = self._tokens
        graphs = self._graphs[id(cache)]
        tokens.x.copy_(x[0], non_blocking=True)
        self._set_sequence(cache)
        if self._experts.holds_all(self.device):
            graphs.whole.replay()
        else:
            for index, (up_to_router, own) in enumerate(graphs.layers):
                up_to_router.replay()
                self._reached.record()
                own.replay()
                self._reached.synchronize()
                self._add_missing(index)
                after_layer(self._sparse[index])
            graphs.last.replay()
        self._reached.record()
        self._reached.synchronize()
        after_layer(max(self._blocks))
        if self._output is None:
            return tokens.x[None]
        return self._output.capped(self._host["logits"].sum(0))

    def _set_sequence(self, cache: SequenceCache) -> None:
        """Let all kernels compute the next token of this cache."""
        numbers = [cache.length]
        for number in self._blocks:
            layer = cache.layers[number]
            if isinstance(layer, StateCache):
                for _, before, after in layer.segments(1):
                    for name in before:
                        numbers += before[name].data_ptr(), after[name].data_ptr()
        # The GPU has read what was there, since the host has waited for each token.
        self._host["sequence"].copy_(torch.tensor(numbers))
        self._tokens.sequence.copy_(self._host["sequence"], non_blocking=True)

    def _add_missing(self, index: int) -> None:
        """Let the CPU compute a layer's experts that the GPU does not hold, and add their part.

        index: of the layer among those with experts.
        """
        host = self._host
        layer = self._blocks[self._sparse[index]].experts.layer
        chosen = host["selected"][index].tolist()
        if missing := self._experts.missing(layer, chosen):
            experts = [chosen[choice] for choice in missing]
            weights = host["weights"][missing]
            row = self._experts.row_on_host(layer, host["normed"], experts, weights)
            host["row"].copy_(row)
            self._tokens.outputs[0].copy_(host["row"], non_blocking=True)

    def _forms_of(self, number: int) -> dict[str, GpuExpertForm]:
        """Return the forms of a layer's experts, and of its dense part."""
        block = self._blocks[number]
        forms = {}
        if not block.is_dense:
            spec = self._used.expert_of(block.experts.layer)
            forms["experts"] = expert_form(spec, self.device)
        if (dense := self._used.mlp_expert(number)) is not None:
            forms["mlp"] = expert_form(dense, self.device)
        return forms

    def _count_outputs(self, number: int) -> int:
        """Return the partial sums of a layer's experts and dense part."""
        choices = {"experts": self._used.config.num_experts_per_tok, "mlp": 1}
        return sum(form.sums(choices[part]) for part, form in self._forms[number].items())

    def _shared_with_host(self) -> dict[str, torch.Tensor]:
        """Return the tensors that the host reads, and the row and the numbers that it writes."""
        tokens = self._tokens
        shared = {
            "selected": tokens.selected,
            "weights": tokens.weights,
            "normed": tokens.normed,
            "row": tokens.outputs[0],
            "sequence": tokens.sequence,
        }
        if self._output is not None:
            if not isinstance(self._output.head, GpuLinear):
                raise UnsupportedOperationError("a head that no kernel takes")
            head = self._output.head.matrix.form
            shape = split(head).count, 1, head.rows
            shared["logits"] = tokens.tensor("logits", *shape, dtype=torch.float32)
        return shared

    def _capture(self, cache: SequenceCache) -> _Graphs:
        """Capture the graphs for a cache, which is empty."""
        self._set_sequence(cache)
        self._reached.record()
        self._reached.synchronize()
        *layers, (last, _) = self._kernels(cache, with_host=False)
        whole = [kernel for up, own in layers for kernel in (*up, *own)]
        *layers, (last_of_split, _) = self._kernels(cache, with_host=True)
        graphs: list[tuple[Any, Any]] = []
        pending: Kernels = []
        for (up, own), block in zip(layers, self._blocks.values(), strict=True):
            pending += up
            if block.is_dense:
                pending += own
                continue
            pending += [self._copy_to_host(name) for name in ("selected", "weights", "normed")]
            # The host's part of the layer before is none of this layer's.
            graphs.append(
                (self._graph(pending), self._graph([self._tokens.outputs[0].zero_, *own]))
            )
            pending = []
        last_graph = self._graph([*pending, *last_of_split])
        return _Graphs(self._graph([*whole, *last]), graphs, last_graph)

    def _kernels(
        self, cache: SequenceCache, *, with_host: bool
    ) -> Iterator[tuple[Kernels, Kernels]]:
        """Yield the kernels of each layer up to its router, and the others, then the last ones.

        with_host: whether the host adds to the outputs of layers with experts.
        """
        tokens = self._tokens
        writer = GraphWriter()
        for number, block in self._blocks.items():
            memory = LayerMemory(
                tokens,
                cache.layers[number],
                tokens.sequence[self._addresses[number]],
                self._forms[number].get("experts"),
                self._forms[number].get("mlp"),
                tokens.selected[0 if block.is_dense else self._sparse.index(number)],
                None if block.is_dense else self._experts.table(block.experts.layer),
                with_host,
            )
            yield writer.write(block, memory)
        yield self._last_kernels(writer, memory), []

    def _last_kernels(self, writer: GraphWriter, memory: LayerMemory) -> Kernels:
        """Return the kernels after the layers, which add what the last one left to add."""
        tokens = self._tokens
        output = self._output
        norm = next(iter(self._blocks.values())).operations[0]
        assert isinstance(norm, Norm)
        if output is not None:
            norm = replace(norm, norm=output.norm)
        kernels = [*writer.last(norm, memory), self._copy_to_host("selected")]
        if output is not None:
            head = as_gpu(output.head).matrix
            kernels.append(partial(product, tokens.normed[None], head, self._sources["logits"]))
            kernels.append(self._copy_to_host("logits"))
        return kernels

    def _copy_to_host(self, name: str) -> Callable[[], object]:
        """Return the copy of a tensor to the host."""
        return partial(self._host[name].copy_, self._sources[name], non_blocking=True)

    def _graph(self, kernels: Kernels) -> Any:
        """Capture kernels, after each has run once. Loading a kernel cannot be captured."""
        for kernel in kernels:
            kernel()
        with gpu.captured(self.device) as graph:
            for kernel in kernels:
                kernel()
        # A graph has addresses alone, and keeps no tensor alive.
        self._captured.append(kernels)
        return graph


def _locked_copies(
    tensors: Mapping[str, torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return tensors of the same types and shapes in page-locked RAM. Raises `PageLockError`."""
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values()]
    block = gpu.locked_block(sum(sizes), device)
    parts = zip(tensors.items(), torch.split(block, sizes), strict=True)
    return {
        name: part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for (name, tensor), part in parts
    }
