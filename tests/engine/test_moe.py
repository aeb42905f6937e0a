"""The experts of a layer, against transformers' blocks, and decoded as a program of kernels.

E = experts, K = experts of a token, D = hidden_size, F = intermediate_size.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from mixchat.base.model_config import ModelConfig
from mixchat.base.rope_parameters import RopeParameters
from mixchat.engine.layers.compute import compute_layer
from mixchat.engine.layers.operations import Experts, Operation, Route, Rows
from mixchat.engine.layers.program import ExpertWorks, TokenBuffers, layer_works, staged
from mixchat.experts.cache import ExpertKey
from mixchat.experts.holder import LayerExperts
from mixchat.experts.layer_rows import LayerRows
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.kernels.cpu.program import Program
from mixchat.kernels.cpu.router import Router
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.format.expert import Expert

FEATURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "olmoe": {"norm_topk_prob": False},
    "mellum": {},
    "granitemoe": {},
    "gpt_oss": {"moe_bias": True, "swiglu_limit": 7.0},
}
BLOCKS = {"gpt_oss": "GptOssMLP", "granitemoe": "GraniteMoeMoE"}
# E, K, D, F. The kernels take neither 60 nor 20 columns.
SHAPES = [(3, 1, 64, 32), (8, 3, 96, 40), (32, 4, 60, 32), (128, 8, 64, 20), (160, 10, 32, 16)]


def config_of(kind: str, experts: int, choices: int, hidden: int, inner: int) -> ModelConfig:
    return ModelConfig(
        kind, 97, hidden, inner, 1, 4, 2, 16, experts, choices, 128, 1e-5, RopeParameters(1e4),
        **FEATURES[kind],
    )  # fmt: skip


class AllInMemory:
    """An `ExpertRunner` of one layer, whose experts are all in memory."""

    def __init__(self, experts: Sequence[Expert]) -> None:
        self.experts = experts

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
        *,
        exact: bool = False,
    ) -> torch.Tensor:
        rows = LayerRows(layer, hidden_states, selected_experts)
        for key in rows.counts:
            rows.put(key, self.experts[key.expert](rows.of(key), exact=exact))
        return rows.combine(routing_weights)

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[Sequence[Expert]]:
        return [self.experts]

    def note_hits(self, layer: int, selected: Sequence[Sequence[int]]) -> None:
        """Count nothing."""


class Weights:
    """Random weights of a layer: gate [E, D], w13 [E, 2F, D], w2 [E, D, F], and their biases."""

    def __init__(self, config: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator) * 0.4

        count, hidden, inner = (
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
        )
        self.config, self.gate = config, random(count, hidden)
        self.w13, self.w2 = random(count, 2 * inner, hidden), random(count, hidden, inner)
        self.gate_bias = self.w13_bias = self.w2_bias = None
        if config.moe_bias:
            self.gate_bias, self.w13_bias = random(count), random(count, 2 * inner)
            self.w2_bias = random(count, hidden)

    def operations(self, quantization: Quantization) -> list[Operation]:
        """Return a router and experts that map "x" [T, D] to "x"."""
        spec = Blueprint(self.config, quantization).expert
        experts = []
        for expert in range(self.config.num_local_experts):
            block = torch.zeros(spec.stride, dtype=torch.uint8)
            made = [
                *spec.gate_up.encode(self.w13[expert], bias=_of(self.w13_bias, expert)),
                *spec.down.encode(self.w2[expert], bias=_of(self.w2_bias, expert)),
            ]
            data = torch.cat([tensor.view(-1).view(torch.uint8) for tensor in made])
            block[: len(data)] = data
            experts.append(spec.build(block))
        config = self.config
        router = Router(
            self.gate, config.num_experts_per_tok, config.norm_topk_prob, self.gate_bias
        )
        x = Rows.new("x", config.hidden_size)
        selected = Rows.new("selected", router.choices, dtype=torch.int64)
        weights = Rows.new("weights", router.choices, dtype=torch.float32)
        runner = AllInMemory(experts)
        return [Route(weights, x, router, selected), Experts(x, x, selected, weights, 0, runner)]

    def transformers(self) -> Any:
        """Return transformers' block with these weights, which maps [1, T, D] to [1, T, D]."""
        kind, config = self.config.model_type, self.config
        modules = import_module(f"transformers.models.{kind}.modeling_{kind}")
        name = BLOCKS.get(kind) or next(name for name in vars(modules) if "SparseMoe" in name)
        theirs = AutoConfig.for_model(
            kind,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_experts_per_tok=config.num_experts_per_tok,
        )
        theirs.moe_intermediate_size = config.intermediate_size
        theirs.num_experts = theirs.num_local_experts = config.num_local_experts
        theirs.norm_topk_prob = config.norm_topk_prob
        block = getattr(modules, name)(theirs)
        values = {
            "gate": self.gate,
            "router": self.gate,
            "router.bias": self.gate_bias,
            "gate_up_proj": self.w13,
            "down_proj": self.w2,
            "gate_up_proj_bias": self.w13_bias,
            "down_proj_bias": self.w2_bias,
        }
        for name, parameter in block.named_parameters():
            value = values[name.removesuffix(".weight").removeprefix("experts.")]
            assert value is not None
            if kind == "gpt_oss" and name.startswith("experts.gate_up"):
                gate, up = value.chunk(2, dim=1)
                value = torch.stack((gate, up), dim=2).flatten(1, 2)
            if kind == "gpt_oss" and name.startswith("experts.") and value.dim() == 3:
                value = value.transpose(1, 2)
            parameter.data = value.contiguous()
        return block


def computed(operations: list[Operation], x: torch.Tensor, exact: bool = False) -> torch.Tensor:
    """Return what operations without a cache make of x [T, D]."""
    context: Any = None
    return compute_layer(operations, x, context, exact=exact)


def _of(biases: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if biases is None else biases[expert]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", FEATURES)
@torch.inference_mode()
def test_a_layer_computes_what_transformers_computes(kind, shape):
    weights = Weights(config_of(kind, *shape))
    x = torch.randn(17, shape[2], generator=torch.Generator().manual_seed(1))
    expected = weights.transformers()(x[None])
    expected = (expected[0] if isinstance(expected, tuple) else expected).view(17, -1)
    moe = weights.operations(Quantization("none", dtype=torch.float32))
    for exact in (False, True):
        assert (computed(moe, x, exact) - expected).abs().max() < 1e-5 * expected.abs().max()
    alone = torch.cat([computed(moe, row) for row in x.split(1)])
    assert (alone - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.skipif(not kernels_available(), reason="the kernels need AVX2")
@pytest.mark.parametrize(
    ("kind", "quant_type", "dtype", "experts", "choices"),
    [
        *(("mixtral", "nf4", torch.bfloat16, 11, choices) for choices in (1, 2, 3, 10)),
        ("olmoe", "nf4", torch.float32, 160, 10),
        ("gpt_oss", "nf4", torch.bfloat16, 160, 10),
        ("gpt_oss", "trellis3", torch.float32, 128, 8),
    ],
)
@torch.inference_mode()
def test_a_program_has_the_bits_of_the_layer_for_any_choices(
    kind, quant_type, dtype, experts, choices
):
    config = config_of(kind, experts, choices, 64, 128)
    route, experts = operations = Weights(config).operations(Quantization(quant_type, dtype=dtype))
    assert isinstance(experts, Experts)
    # The cache is only for attention.
    buffers = TokenBuffers(None, 64, dtype)  # type: ignore[arg-type]
    runner: Any = experts.runner
    of_experts = ExpertWorks(experts, buffers, LayerExperts(runner.experts)).works
    program = Program(staged([*layer_works([route], buffers), *of_experts], sequences=1))
    for x in torch.randn(6, 1, 64, generator=torch.Generator().manual_seed(1)).to(dtype):
        buffers.x.copy_(x)
        program.run()
        assert torch.equal(buffers.x, computed(operations, x))
