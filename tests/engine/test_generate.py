"""An answer for one: what it is, what it reuses, and how it ends."""

from collections.abc import Callable
from pathlib import Path

import pytest
from engine_tools import GREEDY, answer

from mixchat.base.errors import CheckpointError, PromptError
from mixchat.base.options import LoadOptions
from mixchat.engine.generate import Engine
from mixchat.kernels.cpu.router import Router
from mixchat.loading.loader import load_engine

PROMPT = [5, 17, 42, 8, 90, 3, 3, 61]


@pytest.fixture(scope="module")
def fp32_model(tiny_checkpoint: Path, install: Callable[..., Path]) -> Path:
    """Unquantized, in fp32: what is computed in another order is still the same to 1e-6."""
    return install(tiny_checkpoint, quant_type="none")


@pytest.fixture
def load(fp32_model: Path) -> Callable[..., Engine]:
    return lambda **options: load_engine(fp32_model, LoadOptions(device="cpu", **options))


@pytest.fixture
def engine(load: Callable[..., Engine]) -> Engine:
    return load()


@pytest.mark.parametrize(
    ("second", "reused"),
    [
        # The last token of the first answer was never fed to the model.
        (lambda first: [*PROMPT, *first, 7, 9, 11], len(PROMPT) + 11),
        (lambda first: [*PROMPT[:4], 50, 51], 4),
        (lambda first: PROMPT, len(PROMPT) - 1),
    ],
    ids=["a chat that continues", "another question", "the same again"],
)
def test_only_what_is_new_in_a_prompt_is_computed(load, second, reused):
    engine = load()
    prompt = second(answer(engine, PROMPT))
    again = answer(engine, prompt)
    assert engine.stats.reused_tokens == reused
    assert engine.stats.prompt_tokens == len(prompt)
    assert again == answer(load(), prompt)


def test_a_forward_pass_that_is_broken_off_leaves_the_next_turn_right(load, monkeypatch):
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    engine = load()
    longer = [*PROMPT, *answer(engine, PROMPT, max_tokens=4), 7]
    with monkeypatch.context() as patch:
        patch.setattr(Router, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            answer(engine, longer)
    assert answer(engine, longer) == answer(load(), longer)


def test_a_stop_token_ends_the_answer_and_is_its_last(engine):
    free = answer(engine, PROMPT)
    stop = free[4]
    ids = answer(engine, PROMPT, stop_ids={stop}, max_tokens=None)
    assert ids == free[: free.index(stop) + 1]


def test_the_answer_ends_where_the_context_is_full(load):
    small = load(context_size=12)
    assert len(answer(small, PROMPT, max_tokens=100)) == 4
    assert small.stats.generated_tokens == 4


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        ([], PromptError, "empty"),
        ([5] * 128, PromptError, "128 tokens, but the context holds 128"),
        ([5] * 500, PromptError, "500 tokens, but the context holds 128"),
        ([5, 97], CheckpointError, "gives the token 97, the model has 97"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused_and_leaves_the_cache(
    engine, ids, error, match
):
    first = answer(engine, PROMPT)
    with pytest.raises(error, match=match):
        engine.generate(ids, sampling=GREEDY, stop_ids=set())
    assert answer(engine, PROMPT) == first
    assert engine.stats.reused_tokens == len(PROMPT) - 1


@pytest.mark.parametrize("chunk", [2048, 5])
def test_the_progress_of_the_prefill_is_reported_after_each_layer(engine, chunk):
    seen: list[tuple[int, int]] = []
    engine.prefill_chunk = chunk
    answer(engine, PROMPT, max_tokens=3, on_prefill=lambda done, total: seen.append((done, total)))
    layers = engine.config.num_hidden_layers
    chunks = [PROMPT[start : start + chunk] for start in range(0, len(PROMPT), chunk)]
    assert seen[0] == (0, len(PROMPT))
    assert seen[1:] == [
        (number * chunk + len(ids) * (layer + 1) // layers, len(PROMPT))
        for number, ids in enumerate(chunks)
        for layer in range(layers)
    ]


def test_the_experts_counts_of_the_stats_are_those_of_the_last_call(engine):
    layers, choices = engine.config.num_hidden_layers, engine.config.num_experts_per_tok
    counts = []
    for tokens in (5, 3):
        answer(engine, PROMPT, max_tokens=tokens)
        engine.forget()
        experts = engine.stats.experts
        counts.append(experts.hits.total() + experts.misses.total())
    assert counts[0] - counts[1] == 2 * layers * choices  # two more tokens were decoded
    whole = engine.experts.stats
    assert sum(counts) == whole.hits.total() + whole.misses.total()
