"""Models whose layers have states: texts that part, and long ones beside transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import FAMILIES, RECURRENT, answer, ids_of, logits

from mixchat.base.options import LoadOptions
from mixchat.engine.caches.state_cache import StateCache
from mixchat.engine.generate import Engine
from mixchat.engine.prompt_cache import PromptCache
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.loading.loader import load_engine

TOKENS = 300

each_kind = pytest.mark.parametrize("kind", RECURRENT)


@pytest.fixture
def load(model_of: Callable[..., Path]) -> Callable[..., Engine]:
    def load(kind: str, **options: Any) -> Engine:
        changes = {"std": 0.1, "intermediate_size": 128, "max_position_embeddings": 1024}
        directory = model_of({**changes, **FAMILIES[kind]}, {})
        return load_engine(directory, LoadOptions(device="cpu", exact_prompts=True, **options))

    return load


def states(engine: Engine) -> list[torch.Tensor]:
    layers = [layer for layer in engine.held()[1].layers if isinstance(layer, StateCache)]
    assert layers
    return [tensor for layer in layers for tensor in layer.state.values()]


@pytest.mark.skipif(not kernels_available(), reason="the kernels need AVX2 or NEON")
@each_kind
def test_a_text_that_parts_from_the_one_before_has_the_bits_of_a_new_one(kind, load):
    engine, other = load(kind), load(kind)
    first = ids_of(TOKENS)
    answer(engine, first)
    for kept in (TOKENS, 220, 130, 2):
        text = [*first[:kept], *ids_of(41, seed=kept)]
        other.forget()
        assert answer(engine, text) == answer(other, text)
        assert all(map(torch.equal, *(states(each) for each in (engine, other))))


@each_kind
@torch.inference_mode()
def test_logits_of_a_longer_text_are_those_of_transformers(kind, make_checkpoint, install):
    from transformers import AutoModelForCausalLM

    changes = {"max_position_embeddings": 1024, "num_key_value_heads": 2, "seed": 1}
    checkpoint = make_checkpoint(**{**FAMILIES[kind], **changes})
    engine = load_engine(install(checkpoint, quant_type="none"), LoadOptions(device="cpu"))
    oracle = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.tensor(ids_of(TOKENS))
    expected = oracle(ids[None]).logits[0]
    for size in (TOKENS, 128, 7):
        difference = (logits(engine, ids, size) - expected).abs().max()
        assert difference < 2e-4 * expected.abs().max()


STOP = 2
PROMPT = ids_of(TOKENS)


def repeated(engine: Engine, prompt: list[int], max_tokens: int = 4) -> int:
    """Answer a prompt. Return how many tokens it shares with the cache and computes again."""
    answer(engine, prompt, stop_ids={STOP}, max_tokens=max_tokens)
    return engine.stats.repeated_tokens


def talk(engine: Engine, turns: int = 5) -> tuple[list[int], list[int]]:
    """Hold a conversation. Return the last prompt, and the text before its question."""
    text = PROMPT
    for turn in range(turns):
        before = text if turn else []
        prompt = [*before, *ids_of(50, seed=turn)] if turn else text
        text = [*prompt, *answer(engine, prompt, stop_ids={STOP}, max_tokens=20)]
    return prompt, before


@each_kind
def test_the_next_turn_regen_and_undo_compute_almost_nothing_again(kind, load):
    engine = load(kind)
    prompt, before = talk(engine)
    assert repeated(engine, prompt) == 0  # /regen
    # /undo, and another question. The cache lacked the last token when it was the end.
    assert repeated(engine, [*before, 5, 6, 7]) <= 1
    assert repeated(engine, [*engine.held()[0], 8, 9]) == 0  # the next turn


@each_kind
def test_the_end_of_a_turn_can_be_gone_back_to_after_a_restart(kind, load, tmp_path):
    """A file has the states of 3 checkpoints. Those at the beginning of a text help nobody."""
    engine, path = load(kind), tmp_path / "cache"
    prompt, before = talk(engine)
    assert PromptCache(path, engine).save()
    for text in (prompt, [*before, 5, 6, 7], [*engine.held()[0], 8, 9]):
        resumed = load(kind)
        PromptCache(path, resumed).load()
        assert repeated(resumed, text) <= 1
        assert resumed.stats.reused_tokens >= len(before) - 1


@each_kind
@pytest.mark.parametrize("lacking", [1, 5, 16])
def test_a_later_prompt_may_lack_the_tokens_that_began_the_answer(kind, load, lacking):
    """Templates leave thinking out of the history, with the <think> at the end of the prompt."""
    engine = load(kind)
    repeated(engine, PROMPT)
    assert repeated(engine, [*PROMPT[:-lacking], 5, 6, 7]) <= 17 - lacking


@each_kind
def test_undo_goes_back_to_an_answer_whose_thinking_was_left_out(kind, load):
    """The prompt parted from the cache where the thinking began, so the answer came again."""
    engine = load(kind)
    repeated(engine, PROMPT, max_tokens=20)
    before = [*PROMPT[:-2], *(n for n in ids_of(60, seed=1) if n != STOP), STOP]
    question = [n for n in ids_of(30, seed=2) if n != STOP]
    assert repeated(engine, [*before, *question]) <= 15
    assert repeated(engine, [*before, 5, 6, 7]) == 0


@each_kind
def test_a_conversation_that_was_read_at_once_has_the_ends_of_its_turns(kind, load):
    """A client sends all turns again. Editing any computed the whole text again."""
    engine = load(kind)
    messages = [[*(n for n in ids_of(40, seed=turn) if n != STOP), STOP] for turn in range(12)]
    whole = [token for message in messages for token in message]
    repeated(engine, whole)
    edited = [token for message in messages[:3] for token in message]
    assert repeated(engine, [*edited, 5, 6, 7]) == 0
