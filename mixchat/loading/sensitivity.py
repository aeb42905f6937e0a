"""Measures how much a model loses if the products of a layer's experts get noise.

Noise of a known size stands for the error of rounding, which is not known yet.

N = tokens, V = vocabulary, n = rows of an expert, D = hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional

from mixchat.base.options import LoadOptions
from mixchat.engine.generate import Engine
from mixchat.experts.cache import ExpertKey
from mixchat.experts.holder import ExpertRunner
from mixchat.experts.layer_rows import LayerRows
from mixchat.experts.recording_runner import RecordingRunner
from mixchat.experts.store import new_block
from mixchat.install.make.mix import Sensitivity
from mixchat.loading.loader import load_engine
from mixchat.weights.format.expert import Expert
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.matrix.quant_type import Linear

Matrix = Literal["gate_up", "down"]
_NOISE = 0.2  # part of the products' root mean square; between the errors of 2 and 3 bits


def measure_sensitivities(
    directory: Path, ids: Sequence[int], on_layer: Callable[[int, int], object]
) -> list[Sensitivity]:
    """Return the sensitivity of each layer of an installed model, as KL divergence on a text.

    ids: the tokens of the text. on_layer: takes the layers done, and their number. Each layer costs
    two passes over the text.
    """
    tokens = torch.tensor(ids)
    noisy = list[_NoisyRunner]()
    with InstalledModel(directory) as installed:

        def wrap(runner: ExpertRunner) -> ExpertRunner:
            noisy.append(_NoisyRunner(runner, installed))
            return noisy[0]

        options = LoadOptions(context_size=len(ids) + 1)
        layers = installed.config.num_moe_layers
        sensitivities = []
        with closing(load_engine(directory, options, wrap=wrap)) as engine:
            expected = _log_probabilities(engine, tokens)
            for layer in range(layers):
                on_layer(layer, layers)
                cost = []
                for matrix in ("gate_up", "down"):
                    noisy[0].noisy_matrix = layer, matrix
                    scores = _log_probabilities(engine, tokens)
                    lost = functional.kl_div(
                        scores, expected, reduction="batchmean", log_target=True
                    )
                    # KL divergence grows with the square of small noise.
                    cost.append(max(float(lost), 0.0) / _NOISE**2)
                sensitivities.append(Sensitivity(*cost))
    return sensitivities


@torch.inference_mode()
def _log_probabilities(engine: Engine, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log probabilities of the next tokens, [N, V]."""
    engine.forget()
    logits = engine.passes.model.forward(tokens, engine.held()[1], logits_of=slice(None))
    engine.forget()
    return logits.float().log_softmax(-1)


class _NoisyRunner(RecordingRunner):
    """Lets another runner compute all layers without `noisy_matrix`."""

    def __init__(self, runner: ExpertRunner, installed: InstalledModel) -> None:
        super().__init__(runner, lambda *_: None)
        self._installed = installed
        self.noisy_matrix: tuple[int, Matrix] = -1, "down"

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
        *,
        exact: bool = False,
    ) -> torch.Tensor:
        if layer != self.noisy_matrix[0]:
            return super().run(layer, hidden_states, selected_experts, routing_weights, exact=exact)
        rows = LayerRows(layer, hidden_states, selected_experts.cpu())
        for key in rows.counts:
            rows.put(key, self._expert(key, hidden_states.device)(rows.of(key)))
        return rows.combine(routing_weights)

    def _expert(self, key: ExpertKey, device: torch.device) -> Expert:
        form = self._installed.blueprint.expert_of(key.layer)
        block = new_block(form.stride)
        self._installed.read_expert(*key, block)
        expert = form.build(block.to(device))
        matrix = self.noisy_matrix[1]
        # The seed is the expert's, so that a measurement can be repeated.
        seed = 2 * (key.layer * 2**10 + key.expert)
        if matrix == "down":
            return replace(expert, down=_NoisyLinear(expert.down, seed))
        return replace(expert, gate_up=_NoisyLinear(expert.gate_up, seed))


class _NoisyLinear:
    """Lets another map compute, and adds noise to its products [n, R]."""

    def __init__(self, linear: Linear, seed: int) -> None:
        self._linear = linear
        self._seed = seed

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        products = self._linear(x, exact=exact)
        noise = torch.randn(products.shape, generator=torch.Generator().manual_seed(self._seed)).to(
            products
        )
        size = products.float().square().mean(-1, keepdim=True).sqrt()
        return products + (_NOISE * size * noise).to(products.dtype)
