"""The KV cache in a file: the next run continues from it as if it had been the same run."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_tools
import pytest
import torch
from cache_tools import attend, in_pages, in_tensors
from engine_tools import ids_of
from test_kv_cache import CONFIG, needs_kernel

from mixchat.base import files
from mixchat.base.errors import CheckpointError, MixchatError, ResourceError
from mixchat.base.options import LoadOptions
from mixchat.base.safetensors import SafetensorsFile, TensorSpec, header_bytes, tensor_bytes
from mixchat.engine.caches import sequence_cache
from mixchat.engine.caches.layer_cache import Extent
from mixchat.engine.caches.sequence_cache import SequenceCache
from mixchat.engine.generate import Engine
from mixchat.engine.prompt_cache import PromptCache, saved_tokens
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.kernels.cpu.router import Router
from mixchat.loading.loader import load_engine

PROMPT = [5, 17, 42, 8, 90, 3, 3, 61, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]
KERNEL = [pytest.param(True, marks=needs_kernel, id="pages"), pytest.param(False, id="tensors")]
Open = Callable[..., Engine]


@pytest.fixture(params=KERNEL)
def open_engine(
    request: pytest.FixtureRequest, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Open:
    """Loads the tiny model, or another one, with a cache of the one kind or the other."""
    monkeypatch.setattr(sequence_cache, "kernels_available", lambda: request.param)

    def opened(model: Path = tiny_model, **options: Any) -> Engine:
        return load_engine(model, LoadOptions(device="cpu", **options))

    return opened


@pytest.fixture(scope="module")
def long_model(make_checkpoint: Callable[..., Path], install: Callable[..., Path]) -> Path:
    """Room for more than a page, and a window that is shorter."""
    return install(make_checkpoint(max_position_embeddings=2048, sliding_window=600))


def answer(engine: Engine, prompt: list[int], max_tokens: int = 6) -> list[int]:
    return engine_tools.answer(engine, prompt, max_tokens=max_tokens)


def saved(path: Path, engine: Engine, prompt: list[int] = PROMPT) -> list[int]:
    """Return the engine's answer; the file then has both, less the last token."""
    said = answer(engine, prompt)
    assert PromptCache(path, engine).save()
    return said


def rewritten(path: Path, about: dict[str, Any] | None = None, **tensors: torch.Tensor) -> None:
    """Change what the file says, with a digest that is right."""
    with SafetensorsFile(path) as file:
        parts = {spec.name: file.read(spec.name) for spec in file.header.specs[:-1]}
    if about is not None:
        old = json.loads(bytes(tensor_bytes(parts["mixchat_prompt_cache"])))
        text = json.dumps(old | about).encode()
        parts["mixchat_prompt_cache"] = torch.tensor(list(text), dtype=torch.uint8)
    parts |= tensors
    specs = [TensorSpec(name, part.dtype, tuple(part.shape)) for name, part in parts.items()]
    specs.append(TensorSpec("sha256", torch.uint8, (32,)))
    data = header_bytes(specs) + b"".join(bytes(tensor_bytes(part)) for part in parts.values())
    path.write_bytes(data + hashlib.sha256(data).digest())


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("prompt", [PROMPT, ids_of(1100)], ids=["short", "several pages"])
def test_the_next_run_continues_as_if_it_had_been_the_same(
    open_engine, tmp_path, long_model, bits, prompt
):
    one = open_engine(long_model, kv_bits=bits)
    first = saved(tmp_path / "f", one, prompt)
    longer = [*prompt, *first, 7, 9, 11]
    other = open_engine(long_model, kv_bits=bits)
    assert PromptCache(tmp_path / "f", other).load() == len(prompt) + len(first) - 1
    assert answer(other, longer) == answer(one, longer)
    assert other.stats.reused_tokens == len(prompt) + len(first) - 1


@pytest.mark.parametrize("context", [2, 16, 17, 23, 24])
def test_a_smaller_context_takes_the_beginning(open_engine, tmp_path, context):
    saved(tmp_path / "f", open_engine(kv_bits=8))  # 23 tokens
    small = open_engine(kv_bits=8, context_size=context)
    assert PromptCache(tmp_path / "f", small).load() == min(context, 23)
    ids, cache = small.held()
    assert len(ids) == cache.length == min(context, 23)
    prompt = PROMPT[: context - 1]
    fresh = open_engine(kv_bits=8, context_size=context)
    assert answer(small, prompt) == answer(fresh, prompt)
    assert small.stats.reused_tokens == len(prompt) - 1


def test_the_tokens_of_a_file_are_known_before_a_model_is_loaded(open_engine, tmp_path):
    saved(tmp_path / "f", open_engine())
    assert saved_tokens(tmp_path / "f") == 23
    assert saved_tokens(tmp_path / "none") == 0
    for content in (b"", b"x" * 5000, (tmp_path / "f").read_bytes()[:200]):
        (tmp_path / "damaged").write_bytes(content)
        assert saved_tokens(tmp_path / "damaged") == 0
    # Its ids have no length. It raised IndexError.
    header = header_bytes([TensorSpec("ids", torch.int64, ())])
    (tmp_path / "damaged").write_bytes(header + bytes(8))
    assert saved_tokens(tmp_path / "damaged") <= 1


def test_what_the_file_has_is_not_written_again(open_engine, tmp_path):
    path = tmp_path / "f"
    assert not PromptCache(path, open_engine()).save()  # it holds nothing
    saved(path, open_engine())
    before = path.stat().st_ino
    engine = open_engine()
    cache = PromptCache(path, engine)
    cache.load()
    assert not cache.save()
    answer(engine, PROMPT[:5], 1)  # less than there is
    assert not cache.save()
    assert path.stat().st_ino == before
    answer(engine, [*PROMPT[:5], 33], 1)
    assert cache.save()
    assert not cache.save()


def refused(path: Path, engine: Engine, match: str | None = None) -> None:
    """It raises, and the engine is as new."""
    with pytest.raises(CheckpointError, match=match):
        PromptCache(path, engine).load()
    ids, cache = engine.held()
    assert (ids, cache.length) == ([], 0)


def test_a_file_cut_short_anywhere_is_refused(open_engine, tmp_path):
    path = tmp_path / "f"
    expected = saved(path, open_engine())
    whole = path.read_bytes()
    engine = open_engine()
    for size in {*range(0, len(whole), 97), *range(12), len(whole) - 32, len(whole) - 1}:
        path.write_bytes(whole[:size])
        refused(path, engine)
    path.write_bytes(whole + b"\0")
    refused(path, engine)
    assert answer(engine, PROMPT) == expected


@pytest.mark.parametrize("bits", [8, 16])
def test_a_bit_flipped_anywhere_is_refused(open_engine, tmp_path, bits):
    path = tmp_path / "f"
    expected = saved(path, open_engine(kv_bits=bits))
    whole = path.read_bytes()
    engine = open_engine(kv_bits=bits)
    about = range(4096, 4096 + 200)
    for place in {*range(0, len(whole), 61), *range(0, 500, 7), *about[::3], len(whole) - 1}:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        refused(path, engine)
    assert answer(engine, PROMPT) == expected
    assert engine.stats.reused_tokens == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        # With another rope_theta the same weights make other keys.
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    ],
)
def test_a_file_of_another_model_is_refused(open_engine, tmp_path, model_of, changes):
    saved(tmp_path / "f", open_engine())
    refused(tmp_path / "f", open_engine(model_of(changes, {})), "was written for another model")


@needs_kernel
@pytest.mark.parametrize("kernel", [True, False])
def test_a_file_of_the_other_kind_is_refused(tiny_model, tmp_path, monkeypatch, kernel):
    monkeypatch.setattr(sequence_cache, "kernels_available", lambda: kernel)
    saved(tmp_path / "f", load_engine(tiny_model, LoadOptions(device="cpu")))
    monkeypatch.setattr(sequence_cache, "kernels_available", lambda: not kernel)
    other = load_engine(tiny_model, LoadOptions(device="cpu"))
    refused(tmp_path / "f", other, "another kind of cache")


DESCRIPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"format": 2}, "another version"),
    ({"format": 3.0, "model": None}, "another model"),
    ({"model": "0" * 64}, "another model"),
    ({"cache": ["pages"]}, "another kind"),
    ({"tokens": 22}, "its tensors do not match"),
    *(({"first": n}, "its first token is wrong") for n in (-512, 5, 512, 2**70, "0", None)),
    ({"tokens": 2**30}, "its tensors do not match"),
    *(
        ({"checkpoints": lengths}, "its checkpoints are wrong")
        for lengths in (
            None,
            5,
            [0],
            [-1],
            [23],
            [5, 5],
            [9, 8],
            [1, 2, 3, 4],
            ["5"],
            [True],
            [2**70],
        )
    ),
    *(({"tokens": n}, "count of tokens is wrong") for n in (2**70, 0, -1, True, "23", None)),
    ({"more": "x" * 5000}, "its description is missing"),
]
TENSORS: list[tuple[dict[str, torch.Tensor], str]] = [
    *(
        (
            {"mixchat_prompt_cache": torch.tensor(list(text), dtype=torch.uint8)},
            "its description is missing",
        )
        for text in (b"[]", b"{", b"\xff\xfe", b"[" * 4000, b"9" * 4096, b"null")
    ),
    ({"0.keys": torch.zeros(2, 16, 32, dtype=torch.uint8)}, "its tensors do not match"),
    ({"1.values": torch.zeros(3, 5)}, "its tensors do not match"),
    ({"2.keys": torch.zeros(1)}, "its tensors do not match"),
    ({"ids": torch.zeros(23, dtype=torch.int32)}, "its tensors do not match"),
    ({"ids": torch.zeros(1, 23, dtype=torch.int64)}, "its tensors do not match"),
]


def test_a_file_that_does_not_fit_its_description_or_its_reader_is_refused(open_engine, tmp_path):
    path, engine = tmp_path / "f", open_engine()
    saved(path, open_engine())
    whole = path.read_bytes()
    changes: list[tuple[Any, Any, str]] = [(about, {}, said) for about, said in DESCRIPTIONS]
    for about, tensors, message in [*changes, *((None, *one) for one in TENSORS)]:
        path.write_bytes(whole)
        rewritten(path, about, **tensors)
        refused(path, engine, message)
    path.write_bytes(whole)
    rewritten(path, {})  # What is changed rightly is taken.
    assert PromptCache(path, engine).load() == 23


def test_a_link_is_neither_read_nor_written_through(open_engine, tmp_path):
    """A file in the place of a chat's cache may be somebody else's link to anything."""
    link, target = tmp_path / "f", tmp_path / "g"
    saved(target, open_engine())
    before = target.read_bytes()
    link.symlink_to(target)
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        PromptCache(link, open_engine()).load()
    saved(link, open_engine())
    assert not link.is_symlink()
    assert target.read_bytes() == before
    assert PromptCache(link, open_engine()).load() == 23


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError),
        (OSError(errno.EIO, "Input/output error"), MixchatError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_writing_that_fails_leaves_what_was_there(
    open_engine, tmp_path, monkeypatch, error, expected
):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    engine = open_engine()
    answer(engine, PROMPT)
    write, calls = os.write, iter(range(1000))

    def failing(descriptor: int, data: memoryview) -> int:
        if next(calls) == 4:
            raise error
        return write(descriptor, data[:3000])

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", failing)
        with pytest.raises(expected):
            PromptCache(path, engine).save()
    error.__traceback__ = error.__context__ = None  # it lives on, and would keep the engine
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]
    assert PromptCache(path, engine).save()


def test_after_a_pass_that_was_broken_off_what_is_whole_is_saved(
    open_engine, tmp_path, monkeypatch
):
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    one = open_engine()
    first = answer(one, PROMPT)
    longer = [*PROMPT, *first, 7]
    with monkeypatch.context() as patch:
        patch.setattr(Router, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            answer(one, longer)
    assert PromptCache(tmp_path / "f", one).save()
    other = open_engine()
    assert PromptCache(tmp_path / "f", other).load() == 23
    assert answer(other, longer) == answer(open_engine(), longer)


NO_SINKS = None, None


def caches(bits: int) -> list[SequenceCache]:
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    tensors = in_tensors(CONFIG, 2000, dtype, bits)
    return [tensors, in_pages(CONFIG, 2000, bits)] if kernels_available() else [tensors]


def filled(cache: SequenceCache, tokens: int) -> None:
    new = torch.randn(2, tokens, 8, 16, generator=torch.Generator().manual_seed(1))
    attend(cache, new.to(getattr(cache.layers[0], "_dtype", new.dtype)), NO_SINKS)
    cache.advance(tokens)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("tokens", [1, 16, 17, 511, 512, 1100])
@pytest.mark.parametrize("used", [0, 600], ids=["new", "used"])
def test_a_restored_cache_attends_to_the_same_numbers(bits, tokens, used):
    """The kernel reads pages by their addresses: none may be that of a page that is gone."""
    for old, new in zip(caches(bits), caches(bits), strict=True):
        filled(old, 1300)
        old.cut(tokens)
        if used:
            filled(new, used)
            new.cut(0)
        for layer, restored in zip(old.layers, new.layers, strict=True):
            content = layer.content(old.extent)
            assert {n: (t.dtype, tuple(t.shape)) for n, t in content.items()} == {
                spec.name: (spec.dtype, spec.shape) for spec in layer.specs(old.extent)
            }
            restored.restore(content, old.extent, tokens)
        new.set_extent(old.extent)
        x = torch.randn(2, 2, 8, 16).to(torch.float32 if bits == 32 else torch.bfloat16)
        assert all(map(torch.equal, *(attend(cache, x, NO_SINKS) for cache in (old, new))))


@pytest.mark.parametrize("bits", [8, 16])
def test_content_that_does_not_fit_is_refused(bits):
    for old, new in zip(caches(bits), caches(bits), strict=True):
        filled(old, 40)
        right, new = old.layers[0].content(old.extent), new.layers[0]
        keys = right["keys"]
        for wrong in (
            {},
            {"keys": keys},
            right | {"more": keys},
            right | {"keys": keys[:, :-1]},
            right | {"keys": keys[:1]},
            right | {"keys": keys[..., :-1]},
            right | {"keys": keys.flatten()},
            right | {"keys": keys.double()},
        ):
            with pytest.raises(CheckpointError, match="does not fit"):
                new.restore(wrong, old.extent, 40)
        for tokens in (0, 10, 500, 2001):
            with pytest.raises(CheckpointError, match="does not fit"):
                new.restore(right, Extent(tokens), tokens)
        new.restore(right, old.extent, 40)
