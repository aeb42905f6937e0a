"""Rotary embeddings of every type against transformers, alone and in a tiny Mixtral."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import answer, logits
from hypothesis import given, settings
from hypothesis import strategies as st

from mixchat.base.context import Context
from mixchat.base.errors import CheckpointError, UsageError
from mixchat.base.options import LoadOptions
from mixchat.base.rope_parameters import RopeParameters
from mixchat.engine.layers.rope import RotaryEmbedding, rotary_embeddings
from mixchat.engine.prompt_cache import PromptCache
from mixchat.loading.loader import load_engine
from mixchat.weights.families.read_config import read_config

ORIGINAL = 48
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 2.5, 3.0],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0],
        "original_max_position_embeddings": ORIGINAL,
    },
}
SHAPE: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "eos_token_id": 2,
}


def theirs(raw: dict[str, Any], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return transformers' cos and sin [length, h] for a prompt that is read at once."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    rotary = MixtralRotaryEmbedding(MixtralConfig(**raw))
    cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
    return cos[0], sin[0]


def rotated(rope: RopeParameters, head_dim: int, length: int, context: int) -> torch.Tensor:
    """Return (cos, sin) [2, length, h] of an embedding, from two rotated vectors."""
    embedding = RotaryEmbedding(rope, head_dim, context, torch.float32, torch.device("cpu"))
    half = head_dim // 2
    low = torch.cat((torch.ones(half), torch.zeros(half))).expand(length, 1, head_dim)
    turned = embedding(low.contiguous(), slice(0, length))[:, 0]  # cos, then sin
    cos, sin = turned[:, :half], turned[:, half:]
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)))


def assert_equal_to_transformers(raw: dict[str, Any], length: int, context: int) -> None:
    config = read_config(raw)
    ours = rotated(config.rope_parameters, config.head_dim, length, context)
    assert torch.equal(ours, torch.stack(theirs(raw, length)))


def optional(values: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=values)


positive = st.floats(0.1, 50)
factors = st.floats(1, 40) | st.integers(1, 64)
YARN = {
    "attention_factor": positive,
    "beta_fast": st.floats(1.5, 64),
    "beta_slow": st.floats(0.1, 1.5),
    "mscale": positive,
    "mscale_all_dim": positive,
    "truncate": st.booleans(),
}


@st.composite
def configs(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    """A config.json with a rope of this type, in either form of its keys."""
    head_dim = 2 * draw(st.integers(2, 40))
    original, context = draw(st.integers(2, 300)), draw(st.integers(2, 300))
    rope: dict[str, Any] = {"factor": draw(factors)}
    if kind == "yarn":
        rope |= draw(optional(YARN))
    if kind == "llama3":
        low = draw(st.floats(0.1, 4))
        rope |= {"low_freq_factor": low, "high_freq_factor": low + draw(positive)}
    if kind == "longrope":
        numbers = st.lists(positive, min_size=head_dim // 2, max_size=head_dim // 2)
        rope |= {"short_factor": draw(numbers), "long_factor": draw(numbers)}
        rope |= draw(optional({"attention_factor": positive}))
        if original <= context and draw(st.booleans()):
            del rope["factor"]  # it follows from both contexts
    if kind in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = original
    raw = {**SHAPE, "head_dim": head_dim, "max_position_embeddings": context}
    if kind in ("yarn", "llama3", "longrope") and draw(st.booleans()):
        raw["original_max_position_embeddings"] = original  # which precedes the one in the rope
        rope["original_max_position_embeddings"] = original + 5
    theta = {"rope_theta": draw(st.sampled_from([10000, 1e6, 150000.0, 500.0]))}
    if draw(st.booleans()):
        return {**raw, "rope_parameters": {**rope, **theta, "rope_type": kind}}
    return {**raw, "rope_scaling": {**rope, "type": kind}, **draw(st.sampled_from([theta, {}]))}


KINDS = ["linear", "dynamic", "yarn", "llama3", "longrope"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(data=st.data())
def test_angles_are_transformers_to_the_bit(kind, data):
    raw = data.draw(configs(kind))
    rope = read_config(raw).rope_parameters
    original = rope.original_max_position_embeddings
    for length in (1, original, original + 1, 2 * original + 7):
        assert_equal_to_transformers(raw, length, context=length)
    # The short frequencies are for all contexts up to the original one.
    assert_equal_to_transformers(raw, min(length, original - 1), context=original)


@pytest.mark.parametrize(("head_dim", "part"), [(512, 0.25), (64, 0.25), (20, 0.6), (16, 1.0)])
def test_pairs_of_a_proportional_rope_turn_as_in_transformers(head_dim, part):
    rope = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": part}
    parameters = RopeParameters(1e6, "proportional", partial_rotary_factor=part)
    parameters.check(head_dim)
    raw = {**SHAPE, "head_dim": head_dim, "max_position_embeddings": 64, "rope_parameters": rope}
    ours = rotated(parameters, head_dim, 300, 300)
    assert torch.equal(ours, torch.stack(theirs(raw, 300)))


def test_a_plain_rope_is_transformers():
    for rope in ({}, {"rope_theta": 1e4}, {"rope_scaling": None}):
        raw = {**SHAPE, "head_dim": 128, "max_position_embeddings": 64, **rope}
        assert_equal_to_transformers(raw, length=5000, context=8192)


KEYS = [
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    *("partial_rotary_factor", "full_attention", "sliding_attention"),
]
odd = st.sampled_from(
    [None, True, 0, 1, 2, -1, 1e-30, 1e29, 1e40, 2**31, float("nan"), "4", [], {}]
)
lists = st.lists(st.just(1.0) | odd, min_size=1, max_size=2)


@settings(max_examples=200)
@given(
    rope=st.dictionaries(st.sampled_from(KEYS), odd | positive | lists, max_size=8),
    kind=st.sampled_from([*KINDS, "default", "su"]),
    key=st.sampled_from(["rope_parameters", "rope_scaling"]),
)
def test_a_rope_of_odd_values_is_refused_in_one_line_or_rotates(rope, kind, key):
    raw = {**SHAPE, "head_dim": 4, "max_position_embeddings": 64, key: {"rope_type": kind, **rope}}
    try:
        ropes = read_config(raw).ropes
    except CheckpointError as error:
        ropes = ()
        assert re.fullmatch(r"config\.json: .+", str(error))  # noqa: PT017
    for each in ropes:
        assert rotated(each, 4, 3, 128).shape == (2, 3, 4)


MELLUM = {
    "full_attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 5e5,
        "original_max_position_embeddings": ORIGINAL,
        "truncate": False,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def test_types_of_layers_have_their_own_ropes():
    from transformers import MellumConfig
    from transformers.models.mellum.modeling_mellum import MellumRotaryEmbedding

    kinds = ["sliding_attention", "full_attention"]
    raw = {**SHAPE, "head_dim": 16, "max_position_embeddings": 192, "rope_parameters": MELLUM}
    layers: dict[str, Any] = {"layer_types": tuple(kinds), "sliding_window": 8}
    config = replace(read_config(raw), **layers)
    theirs = MellumRotaryEmbedding(MellumConfig(**{**raw, "layer_types": kinds}))
    for layer, kind in enumerate(kinds):
        cos, sin = theirs(torch.zeros(1), torch.arange(200)[None], kind)
        ours = rotated(config.rope(layer), 16, 200, 256)
        assert torch.equal(ours, torch.stack((cos[0], sin[0])))
    assert len(set(config.ropes)) == 2
    twice = replace(config, num_hidden_layers=4, layer_types=2 * config.layer_types)
    first, second, *others = rotary_embeddings(twice, 256, torch.float32, torch.device("cpu"))
    assert first is not second
    assert others == [first, second]  # layers with the same parameters share theirs


def stretched(
    make_checkpoint: Callable[..., Path], install: Callable[..., Path], kind: str
) -> Path:
    contexts = {"dynamic": ORIGINAL, "longrope": 4 * ORIGINAL}
    rope = {"rope_theta": 1e4, **ROPES[kind]}
    checkpoint = make_checkpoint(rope_parameters=rope, max_position_embeddings=contexts[kind])
    return install(checkpoint, quant_type="none")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_longer_context_than_the_original_changes_short_prompts_too(
    kind, make_checkpoint, install
):
    """So keys in a cache never need other frequencies. transformers would take the short ones."""
    model = stretched(make_checkpoint, install, kind)
    ids = torch.arange(30)
    by_default, original, long = (
        logits(load_engine(model, LoadOptions(device="cpu", context_size=size)), ids, 30)
        for size in (None, ORIGINAL, 3 * ORIGINAL)
    )
    assert torch.equal(by_default, original)
    assert (long - original).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kind", "sizes", "same"),
    [
        ("dynamic", (40, ORIGINAL), True),
        ("dynamic", (100, 101), False),
        ("longrope", (ORIGINAL, 100), False),
        ("longrope", (100, 150), True),
    ],
)
def test_a_prompt_cache_of_other_frequencies_is_refused(
    kind, sizes, same, make_checkpoint, install, tmp_path
):
    model = stretched(make_checkpoint, install, kind)
    before, after = (
        load_engine(model, LoadOptions(device="cpu", context_size=size)) for size in sizes
    )
    answer(before, list(range(3, 20)), max_tokens=1)
    PromptCache(tmp_path / "f", before).save()
    cache = PromptCache(tmp_path / "f", after)
    if same:
        assert cache.load() > 0
        return
    with pytest.raises(CheckpointError, match="was written with another --ctx-size"):
        cache.load()


@pytest.mark.parametrize(
    ("rope", "context", "largest"),
    [
        ({}, 100, 100),
        ({"rope_type": "linear", "factor": 2.5}, 100, 250),
        ({"rope_type": "dynamic", "factor": 4}, 100, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 100, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 100, 100),
        ({"rope_type": "yarn", "factor": 4.0}, 100, 400),
        (ROPES["llama3"], 100, 100),
        (ROPES["longrope"], 100, 100),
    ],
)
def test_a_factor_allows_a_longer_context(rope, context, largest):
    raw = {**SHAPE, "max_position_embeddings": context, "rope_scaling": rope}
    config = read_config(raw)
    assert Context.of(config, largest) == Context(largest, largest)
    with pytest.raises(UsageError, match=f"2 to {largest} tokens") as caught:
        Context.of(config, largest + 1)
    assert "agents need" in caught.value.hint  # who asks for 32768 tokens of the demo has one
