"""Attention of one layer against transformers, and its steps for one token against itself."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from cache_tools import in_pages, in_tensors
from torch.nn import functional

from mixchat.base.model_config import ModelConfig
from mixchat.base.rope_parameters import RopeParameters
from mixchat.base.safetensors import TensorSpec
from mixchat.engine.caches.sequence_cache import SequenceCache
from mixchat.engine.decoder import new_decoder
from mixchat.engine.layers.attention import attention
from mixchat.engine.layers.block import Block, describe
from mixchat.engine.layers.compute import compute_layer
from mixchat.engine.layers.model_tensors import LayerTensors
from mixchat.engine.layers.operations import Operation, Rows
from mixchat.engine.layers.rope import rotary_embeddings
from mixchat.experts.cache import ExpertKey
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.kernels.cpu.pages import PAGE
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.format.expert import Expert
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.quant_type import Linear

CPU = torch.device("cpu")
CONTEXT = PAGE + 200
LAYERS = ("sliding_attention", "full_attention")
SHAPE = ModelConfig(
    model_type="",
    vocab_size=10,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=len(LAYERS),
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    num_local_experts=2,
    num_experts_per_tok=1,
    max_position_embeddings=CONTEXT,
    rms_norm_eps=1e-5,
    rope_parameters=RopeParameters(5e5),
)
WINDOW = 20
WINDOWS: dict[str, Any] = {"layer_types": LAYERS, "sliding_window": WINDOW}
# By the names of families in transformers whose attention has the same features.
FEATURES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"qk_norm": "head"},
    "Olmoe": {"qk_norm": "projection", "clip_qkv": 0.9},
    "Mellum": {**WINDOWS, "qk_norm": "head", "sliding_rope_parameters": RopeParameters(1e4)},
    "GptOss": {**WINDOWS, "attention_sinks": True, "attention_bias": True},
    "Qwen3Next": {
        "qk_norm": "head",
        "attn_output_gate": True,
        "fp32_norms": True,
        "rope_parameters": RopeParameters(5e5, partial_rotary_factor=0.25),
    },
}
SIZES = {  # heads, of keys and values, of a head
    "few kv heads": (6, 2, 32),
    "one kv head": (5, 1, 16),
    "as many kv heads": (3, 3, 128),
    "96": (2, 1, 96),
    "odd heads": (4, 2, 10),
}
CACHES: dict[str, Callable[[ModelConfig], SequenceCache]] = {
    "pages": lambda config: in_pages(config, CONTEXT, 32),
    "tensors": lambda config: in_tensors(config, CONTEXT, torch.float32),
}
needs_kernel = pytest.mark.skipif(not kernels_available(), reason="the kernels need AVX2")


def oracle(name: str, config: ModelConfig, layer: int) -> tuple[Any, Any]:
    """Return transformers' attention of a layer with random weights, and its rotary embedding."""
    module = importlib.import_module(getattr(transformers, f"{name}Config").__module__)
    module = importlib.import_module(module.__name__.replace("configuration", "modeling"))
    rope: dict[str, Any] = {"rope_type": "default"}
    rope |= {
        key: getattr(config.rope_parameters, key) for key in ("rope_theta", "partial_rotary_factor")
    }
    ropes = {
        kind: {**rope, "rope_theta": config.rope(place).rope_theta}
        for place, kind in enumerate(LAYERS)
    }
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    keys += ("head_dim", "rms_norm_eps", "clip_qkv", "attention_bias", "sliding_window")
    theirs = getattr(transformers, f"{name}Config")(
        **{key: getattr(config, key) for key in keys},
        layer_types=list(LAYERS),
        rope_parameters=ropes if name == "Mellum" else rope,
        attn_implementation="eager",
    )
    attention = getattr(module, f"{name}Attention")(theirs, layer).eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attention, getattr(module, f"{name}RotaryEmbedding")(theirs)


def expected(name: str, config: ModelConfig, layer: int, x: torch.Tensor) -> tuple[Any, Any]:
    """Return transformers' attention of a layer, and what it makes of x [T, D]."""
    attention, rope = oracle(name, config, layer)
    places = torch.arange(len(x))
    back = places[:, None] - places
    hidden = (back < 0) | (back >= (config.window(layer) or len(x)))
    mask = torch.zeros(back.shape).masked_fill(hidden, -torch.inf)
    kind = (LAYERS[layer],) if name == "Mellum" else ()
    turns = rope(x[None], places[None], *kind)
    return attention, attention(x[None], turns, mask[None, None])[0][0]


class TheirTensors:
    """The tensors of transformers' attention, as a description takes them."""

    def __init__(self, config: ModelConfig, theirs: Any) -> None:
        self._config, self._theirs = config, theirs

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        tensor = self._theirs.get_parameter(spec.name.split("self_attn.")[-1])
        is_norm = spec.name.endswith("norm.weight")
        return tensor + 1 if self._config.fp32_norms and is_norm else tensor

    def linear(self, spec: LinearSpec) -> Linear:
        if spec.name.endswith("o_proj"):
            return lambda x, exact=False: self._theirs.o_proj(x)
        parts = [self._theirs.q_proj, self._theirs.k_proj, self._theirs.v_proj]
        weights = [part.weight for part in parts]
        if self._config.attn_output_gate:  # transformers has a head's gate after its query
            heads = weights[0].unflatten(0, (-1, 2, self._config.head_dim))
            weights = [heads[:, 0].flatten(0, 1), *weights[1:], heads[:, 1].flatten(0, 1)]
        weight = torch.cat(weights)
        bias = torch.cat([part.bias for part in parts]) if self._config.attention_bias else None
        return lambda x, exact=False: functional.linear(x, weight, bias)


def ours(config: ModelConfig, layer: int, theirs: Any) -> list[Operation]:
    """Return our description with the weights of transformers' own."""
    rope, x = rotary_embeddings(config, CONTEXT, torch.float32, CPU)[layer], hidden(config)
    used = Blueprint(config, Quantization("none", dtype=torch.float32))
    tensors = TheirTensors(config, theirs)
    return attention(LayerTensors(layer, used, tensors, rope), x, x)  # type: ignore[arg-type]


def hidden(config: ModelConfig) -> Rows:
    return Rows.new("x", config.hidden_size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cache", [pytest.param("pages", marks=needs_kernel), "tensors"])
# The first layer has a window, if there is one.
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        *[("Qwen3Moe", 0), ("Olmoe", 0), ("Qwen3Next", 0)],
        *[("Mellum", 0), ("Mellum", 1), ("GptOss", 0), ("GptOss", 1)],
    ],
)
@torch.inference_mode()
def test_a_layer_equals_transformers(name, cache, size, layer):
    """In a prompt beyond a page and a window, in steps, and in a prompt after these."""
    heads, groups, width = SIZES[size]
    config = replace(
        SHAPE,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        hidden_size=heads * width if name == "Olmoe" else 48,  # its norms know no other width
        **FEATURES[name],
    )
    torch.manual_seed(layer)
    x = torch.randn(CONTEXT, config.hidden_size)
    theirs, exact = expected(name, config, layer, x)
    operations, before = ours(config, layer, theirs), CACHES[cache](config)
    results = []
    for piece in torch.split(x, [PAGE + 70, 1, 1, 30, 1, CONTEXT - PAGE - 103]):
        results.append(compute_layer(operations, piece, before))
        before.advance(len(piece))
    assert (torch.cat(results) - exact).abs().max() < 1e-5 * exact.abs().max()


class RandomTensors:
    """The tensors of random layers, as `describe` takes them."""

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        return torch.randn(spec.shape).to(spec.dtype)

    def linear(self, spec: LinearSpec) -> Linear:
        bias = torch.randn(spec.rows) if spec.bias else None
        return spec.build(spec.encode(0.3 * torch.randn(spec.rows, spec.columns), bias=bias))


class NoExperts:
    """An `ExpertRunner` that returns what it gets."""

    def run(self, layer: int, hidden_states: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
        return hidden_states

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[Sequence[Expert]]:
        return ()

    def note_hits(self, layer: int, selected: Sequence[Sequence[int]]) -> None: ...


def blocks(used: Blueprint) -> list[Block]:
    torch.manual_seed(0)
    ropes = rotary_embeddings(used.config, CONTEXT, used.quantization.dtype, CPU)
    return [
        describe(layer, used, RandomTensors(), rope, NoExperts())
        for layer, rope in enumerate(ropes)
    ]


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Mixtral", *FEATURES])
@torch.inference_mode()
def test_steps_for_one_token_and_chunks_have_the_same_bits(name, dtype):
    config = replace(SHAPE, **FEATURES.get(name, {}))
    if config.rope_parameters.partial_rotary_factor < 1:
        config = replace(config, head_dim=128)  # the kernels take no fewer columns of them
    quantization = Quantization(attention="int8", dtype=dtype)
    used = Blueprint(config, quantization)
    layers = blocks(used)
    bits = 32 if dtype == torch.float32 else 16
    chunked, stepped, decoded = (in_pages(config, CONTEXT, bits) for _ in range(3))
    decoder = new_decoder(layers, stepped, used)
    assert decoder is not None
    tokens = torch.randn(PAGE + 40, config.hidden_size).to(dtype)

    def by_blocks(x: torch.Tensor, cache: SequenceCache) -> torch.Tensor:
        for block in layers:
            x = compute_layer(block.operations, x, cache, exact=True)
        cache.advance(len(x))
        return x

    def by_program(x: torch.Tensor) -> torch.Tensor:
        result = decoder.run(x, decoded, lambda layer: None)
        assert result is not None
        decoded.advance(1)
        return result.clone()

    together = [by_blocks(chunk, chunked) for chunk in torch.split(tokens, 100)]
    alone = [by_blocks(token, stepped) for token in torch.split(tokens, 1)]
    programs = [by_program(token) for token in torch.split(tokens, 1)]
    assert torch.equal(torch.cat(programs), torch.cat(alone))
    assert torch.equal(torch.cat(programs), torch.cat(together))


def test_layers_with_the_same_parameters_share_a_rotary_embedding():
    config = replace(
        SHAPE, num_hidden_layers=4, **{**FEATURES["Mellum"], "layer_types": 2 * LAYERS}
    )
    first, second, *others = rotary_embeddings(config, CONTEXT, torch.float32, CPU)
    assert first is not second
    assert others == [first, second]
