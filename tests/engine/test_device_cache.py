"""The cache for GPUs, beside all tokens that it was given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache_tools import attend, in_tensors, on_gpus, store
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_gpu import KIND, in_place_of_cuda
from test_kv_cache import CONFIG, CPU, SINKS
from triton_interpreter import compute_as_gpus

from mixchat.engine.caches import kv_cache
from mixchat.engine.caches.sequence_cache import SequenceCache, cache_bytes
from mixchat.kernels.gpu import attention
from mixchat.kernels.gpu.attention import Parts
from mixchat.kernels.gpu.heads import heads

compute_as_gpus()
# A ring of 1,024 tokens for a window of 20, if no more than a page is kept beyond it.
SMALL = replace(CONFIG, sliding_window=20)
CAPACITY = 4000


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split the keys of a token in four parts, and let rings keep a page beyond a window."""
    monkeypatch.setattr(attention, "PROGRAMS", 8)
    monkeypatch.setattr(kv_cache, "MAX_CUT_TOKENS", 0)


def new(dtype: torch.dtype = torch.bfloat16, bits: int = 16, config=SMALL) -> SequenceCache:
    return on_gpus(config, CAPACITY, dtype, [CPU] * config.num_hidden_layers, bits)


def tokens_of(count: int, seed: int = 0) -> torch.Tensor:
    """Return queries, keys and values of both layers [2, count, 4 + 2 + 2, h]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 8, SMALL.head_dim, generator=generator).bfloat16()


def put(cache: SequenceCache, x: torch.Tensor) -> None:
    store(cache, x)
    cache.advance(x.shape[1])


def other(config=SMALL, bits: int = 16, dtype: torch.dtype = torch.bfloat16) -> SequenceCache:
    return in_tensors(config, CAPACITY, dtype, bits)


def close(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.allclose(*pair, 0.02, 0.01) for pair in zip(some, others, strict=True))


@pytest.mark.parametrize("bits", [8, 16])
def test_prompts_and_tokens_see_what_they_see_in_tensors(bits):
    one, reference = new(bits=bits), other(bits=bits)
    for seed, count in enumerate((1, 70, 1, 130, 2, 1)):
        x = tokens_of(count, seed)
        assert close(attend(one, x, SINKS), attend(reference, x, SINKS))
        one.advance(count)
        reference.advance(count)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_its_memory_is_what_the_plan_counts(bits):
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    cache = new(dtype, bits)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in layer.tensors
        if tensor is not None
    }
    assert list(held.values()) == [cache_bytes(SMALL, CAPACITY, dtype, bits)]
    assert [layer.tensors.room for layer in cache.layers] == [1024, CAPACITY]


def test_a_cache_that_was_cleared_keeps_its_memory():
    cache = new()
    before = [layer.tensors.numbers.data_ptr() for layer in cache.layers]
    put(cache, tokens_of(1100))
    assert cache.extent.first > 0
    cache.clear()
    assert (cache.length, cache.extent.first) == (0, 0)
    assert before == [layer.tensors.numbers.data_ptr() for layer in cache.layers]


def test_a_token_that_a_graph_stores_is_where_the_cache_expects_it():
    """A graph calls `heads` with the cache's tensors, and the cache only hears of it."""
    one, reference = new(), other()
    x = tokens_of(1030)
    put(one, x[:, :1020])
    put(reference, x[:, :1020])
    unturned = torch.ones(CAPACITY, 16).bfloat16(), torch.zeros(CAPACITY, 16).bfloat16()
    for token in range(1020, 1030):
        past = torch.tensor([one.length], dtype=torch.int32)
        for layer, y in enumerate(x[:, token : token + 1]):
            queries, tensors = torch.empty(4, 16).bfloat16(), one.layers[layer].tensors
            heads(y.float().view(1, -1), queries, tensors, past, unturned)
            window = SMALL.window(layer)
            parts, out = Parts.for_tokens(1, 4, tensors, window), torch.empty(1, 4, 16).bfloat16()
            attention.attend(queries[None], tensors, past, out, parts, window, SINKS[layer])
            keys, values = y[:, 4:6], y[:, 6:]
            expected = reference.layers[layer].attend(y[:, :4], keys, values, SINKS[layer])
            assert close([out], [expected])
        one.advance(1)
        reference.advance(1)
    assert one.extent.first == 512


@pytest.mark.parametrize("bits", [8, 16])
def test_latents_are_kept_and_seen_as_in_tensors(bits):
    latents = {"kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 16, "v_head_dim": 8}
    config = replace(SMALL, layer_types=(), sliding_window=None, **latents)
    one, copy = new(bits=bits, config=config), new(bits=bits, config=config)
    reference = other(config, bits)
    assert cache_bytes(config, CAPACITY, torch.bfloat16, bits) == sum(
        tensor.nbytes for layer in one.layers for tensor in layer.tensors if tensor is not None
    )
    for count in (20, 1, 9, 1):
        queries = torch.randn(count, SMALL.num_attention_heads, 48).bfloat16()
        keys, values = torch.randn(count, 1, 16).bfloat16(), torch.randn(count, 1, 32).bfloat16()
        for layer, expected in zip(one.layers, reference.layers, strict=True):
            found = layer.attend(queries, keys, values)
            assert close([found], [expected.attend(queries, keys, values)])
        one.advance(count)
        reference.advance(count)
    copy.copy_from(one, 25)
    expected = reference.layers[0].content(copy.extent)
    for name, tensor in copy.layers[0].content(copy.extent).items():
        assert torch.equal(tensor, expected[name])


class History:
    """All tokens that a cache should have, and those that it may have lost."""

    def __init__(self) -> None:
        self.tokens = tokens_of(0)

    def content(self, layer: int, first: int) -> dict[str, torch.Tensor]:
        start = first if SMALL.window(layer) else 0
        keys, values = self.tokens[layer, start:, 4:6], self.tokens[layer, start:, 6:]
        return {"keys": keys.transpose(0, 1), "values": values.transpose(0, 1)}


STEPS = st.one_of(
    st.tuples(st.just("append"), st.sampled_from([1, 2, 40, 500, 900])),
    st.tuples(st.just("interrupted"), st.sampled_from([1, 40, 400])),
    st.tuples(st.just("cut"), st.integers(0, 100)),
    st.tuples(st.just("move"), st.none()),
)


@settings(max_examples=12)
@given(st.lists(STEPS, min_size=2, max_size=7))
def test_any_sequence_of_steps_leaves_what_tokens_see(steps):
    cache, history = new(), History()
    for seed, (name, number) in enumerate(steps):
        if name == "append" and cache.length + number <= CAPACITY:
            x = tokens_of(number, seed)
            put(cache, x)
            history.tokens = torch.cat([history.tokens, x], dim=1)
        elif name == "interrupted" and cache.length + number <= CAPACITY:
            for layer, y in enumerate(tokens_of(number, seed)[: 1 + seed % 2]):
                cache.layers[layer].store(y[:, 4:6], y[:, 6:])
        elif name == "cut":
            cache.cut(cache.usable(cache.length * number // 100))
            history.tokens = history.tokens[:, : cache.length]
        elif name == "move" and cache.length:
            moved = new()
            moved.copy_from(cache, cache.length)
            assert moved.extent == cache.extent
            cache = moved
        assert cache.length == history.tokens.shape[1]
        assert cache.usable(cache.length) == cache.length
        for layer in range(2) if cache.length else ():
            content, expected = (
                cache.layers[layer].content(cache.extent),
                history.content(layer, cache.extent.first),
            )
            assert content.keys() == expected.keys()
            assert all(torch.equal(content[name], expected[name]) for name in content)


@pytest.mark.parametrize("bits", [8, 16])
def test_content_has_the_form_of_a_cache_in_tensors(bits):
    """A saved conversation can be continued on either."""
    one, reference, x = new(bits=bits), other(bits=bits), tokens_of(300)
    put(one, x)
    put(reference, x)
    assert one.form == reference.form
    for mine, other_layer in zip(one.layers, reference.layers, strict=True):
        theirs, ours = other_layer.content(reference.extent), mine.content(one.extent)
        assert mine.specs(one.extent) == other_layer.specs(reference.extent)
        assert theirs.keys() == ours.keys()
        for name in ours:
            assert torch.allclose(theirs[name].float(), ours[name].float(), atol=1)


def test_more_tokens_than_a_ring_has_room_for_are_restored_from_their_end():
    reference, x = other(), tokens_of(2100)
    put(reference, x)
    assert reference.extent.first == 0
    cache = new()
    cache.copy_from(reference, 2100)
    assert cache.extent.first == 1536
    assert cache.usable(2100) == 2100
    new_token = tokens_of(1, 7)
    assert close(attend(cache, new_token, SINKS), attend(reference, new_token, SINKS))


def test_a_prompt_that_is_longer_than_a_ring_is_seen_whole():
    config = replace(SMALL, num_attention_heads=1, num_key_value_heads=1)
    x, seen = tokens_of(1100)[0], []
    for cache in (new(config=config), other(config)):
        layer = cache.layers[0]
        layer.store(x[:60, 4:5], x[:60, 6:7])
        layer.advance(60)
        seen.append(layer.attend(x[60:, :1], x[60:, 4:5], x[60:, 6:7]))
    assert close(seen[:1], seen[1:])


@pytest.mark.parametrize("window", [20, 512, 700])
def test_2048_tokens_can_be_cut_off(window, monkeypatch):
    monkeypatch.undo()
    cache = new(config=replace(SMALL, sliding_window=window))
    for tokens in (2048, 1, 1, 1500, *[1] * 300):
        cache.advance(tokens)
        least = max(cache.length - 2048, 0)
        assert cache.usable(least) == least
    assert cache.extent.first > 0
    cache.cut(0)
    cache.advance(1)
    assert cache.extent.first == 0


def test_layers_on_two_gpus_are_saved_and_restored():
    with in_place_of_cuda():
        on = [torch.device(KIND, number) for number in range(2)]
        one, two = (on_gpus(SMALL, CAPACITY, torch.bfloat16, on) for _ in range(2))
        reference = other()
        for seed in range(2):
            x = tokens_of(9, seed)
            expected = attend(reference, x, SINKS)
            for layer, (y, device) in enumerate(zip(x, on, strict=True)):
                y, sinks = y.to(device), SINKS[layer]
                sinks = None if sinks is None else sinks.to(device)
                seen = one.layers[layer].attend(y[:, :4], y[:, 4:6], y[:, 6:], sinks)
                assert close([seen.cpu()], [expected[layer]])
            one.advance(9)
            reference.advance(9)
        two.copy_from(one, 18)
        for pair in zip(two.layers, reference.layers, strict=True):
            contents = (layer.content(one.extent).values() for layer in pair)
            assert all(map(torch.equal, *contents))
