from collections.abc import Callable
from pathlib import Path

import pytest

from mixchat.base.errors import CheckpointError, PromptError
from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.engine.generate import Engine
from mixchat.loading.loader import load_engine

GREEDY = SamplingOptions(temperature=0)
PROMPT = [5, 17, 42, 8, 90, 3, 3, 61]


@pytest.fixture(scope="module")
def fp32_model(tiny_checkpoint: Path, install: Callable[..., Path]) -> Path:
    """Unquantized, in fp32: what is computed in another order is still the same to 1e-6."""
    return install(tiny_checkpoint, quant_type="none")


@pytest.fixture
def engine(fp32_model: Path) -> Engine:
    return load_engine(fp32_model, LoadOptions(device="cpu"))


def answer(engine: Engine, prompt: list[int], max_tokens: int = 12) -> list[int]:
    ids = engine.generate(prompt, sampling=GREEDY, stop_ids=set(), max_tokens=max_tokens)
    return list(ids)


def test_greedy_text_equals_that_of_transformers(engine: Engine, tiny_checkpoint: Path) -> None:
    import torch
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(tiny_checkpoint).eval()
    ids = torch.tensor([PROMPT])
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert answer(engine, PROMPT) == expected[0, len(PROMPT) :].tolist()


def test_a_chat_that_continues_prefills_only_what_is_new(engine: Engine, fp32_model: Path) -> None:
    first = answer(engine, PROMPT)
    longer = [*PROMPT, *first, 7, 9, 11]
    second = answer(engine, longer)
    # The last token of the first answer was never fed to the model.
    assert engine.stats.reused_tokens == len(PROMPT) + len(first) - 1
    assert engine.stats.prompt_tokens == len(longer)
    fresh = load_engine(fp32_model, LoadOptions(device="cpu"))
    assert answer(fresh, longer) == second


def test_a_prompt_that_parts_from_the_last_one_is_right(engine: Engine, fp32_model: Path) -> None:
    answer(engine, PROMPT)
    other = [*PROMPT[:4], 50, 51]
    second = answer(engine, other)
    assert engine.stats.reused_tokens == 4
    assert answer(load_engine(fp32_model, LoadOptions(device="cpu")), other) == second


def test_the_same_prompt_again_gives_the_same_answer(engine: Engine) -> None:
    first = answer(engine, PROMPT)
    assert answer(engine, PROMPT) == first
    assert engine.stats.reused_tokens == len(PROMPT) - 1


def test_dropping_the_answer_midway_leaves_the_next_turn_right(
    engine: Engine, fp32_model: Path
) -> None:
    ids = engine.generate(PROMPT, sampling=GREEDY, stop_ids=set())
    partial = [next(ids) for _ in range(3)]
    ids.close()  # type: ignore[attr-defined]
    longer = [*PROMPT, *partial, 7]
    fresh = load_engine(fp32_model, LoadOptions(device="cpu"))
    assert answer(engine, longer) == answer(fresh, longer)


def test_a_forward_pass_that_is_broken_off_leaves_the_next_turn_right(
    engine: Engine, fp32_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixchat.engine.moe import SparseMoE

    def interrupt(self: SparseMoE, hidden_states: object, **how: bool) -> None:
        raise KeyboardInterrupt

    first = answer(engine, PROMPT, 4)
    longer = [*PROMPT, *first, 7]
    with monkeypatch.context() as patch:
        patch.setattr(SparseMoE, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            answer(engine, longer)
    fresh = load_engine(fp32_model, LoadOptions(device="cpu"))
    assert answer(engine, longer) == answer(fresh, longer)


def test_a_stop_token_ends_the_answer_and_is_its_last(engine: Engine) -> None:
    free = answer(engine, PROMPT)
    stop = free[4]
    ids = list(engine.generate(PROMPT, sampling=GREEDY, stop_ids={stop}))
    assert ids == free[: free.index(stop) + 1]


def test_the_answer_ends_where_the_context_is_full(fp32_model: Path) -> None:
    small = load_engine(fp32_model, LoadOptions(device="cpu", context_size=12))
    assert len(answer(small, PROMPT, max_tokens=100)) == 4
    assert small.stats.generated_tokens == 4


@pytest.mark.parametrize("length", [12, 13, 500])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(
    fp32_model: Path, length: int
) -> None:
    small = load_engine(fp32_model, LoadOptions(device="cpu", context_size=12))
    with pytest.raises(PromptError, match=f"{length} tokens, the context holds 12"):
        answer(small, [5] * length)


def test_an_empty_prompt_is_refused(engine: Engine) -> None:
    with pytest.raises(PromptError, match="empty"):
        answer(engine, [])


def test_a_refused_prompt_does_not_disturb_the_cache(engine: Engine) -> None:
    first = answer(engine, PROMPT)
    with pytest.raises(PromptError):
        answer(engine, [5] * 500)
    assert answer(engine, PROMPT) == first
    assert engine.stats.reused_tokens == len(PROMPT) - 1


def test_a_tokenizer_of_another_model_is_named(engine: Engine) -> None:
    with pytest.raises(CheckpointError, match="gives the token 97, the model has 97"):
        answer(engine, [5, 97])


def test_the_progress_of_the_prefill_is_reported_after_each_layer(engine: Engine) -> None:
    seen: list[tuple[int, int]] = []

    def on_prefill(done: int, total: int) -> None:
        seen.append((done, total))

    for _ in engine.generate(
        PROMPT, sampling=GREEDY, stop_ids=set(), max_tokens=3, on_prefill=on_prefill
    ):
        pass
    layers = engine.config.num_hidden_layers
    assert seen == [(8 * (layer + 1) // layers, 8) for layer in range(layers)]


def test_the_experts_counts_of_the_stats_are_those_of_the_last_call(engine: Engine) -> None:
    layers, choices = engine.config.num_hidden_layers, engine.config.num_experts_per_tok
    counts = []
    for tokens in (5, 3):
        answer(engine, PROMPT, tokens)
        engine.forget()
        experts = engine.stats.experts
        counts.append(experts.hits.total() + experts.misses.total())
    assert counts[0] - counts[1] == 2 * layers * choices  # two more tokens were decoded
    whole = engine.experts.stats
    assert sum(counts) == whole.hits.total() + whole.misses.total()
