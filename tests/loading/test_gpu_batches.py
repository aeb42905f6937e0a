"""Several answers on GPUs on paper take turns by token, in the graphs that one answer has."""

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from paper_tools import EXPERTS, GREEDY, LAYERS, PROMPT, demand_of, load

from mixchat.base.options import SamplingOptions
from mixchat.engine.answer import TokenAnswer
from mixchat.engine.batch import Batch
from mixchat.engine.generate import Engine

SEQUENCES = 4


def request(number: int, tokens: int, **options: Any) -> TokenAnswer:
    """A prompt of its own, whose answer has so many tokens."""
    return TokenAnswer([5 + number, *PROMPT], SamplingOptions(**options), set(), tokens)


def load_for_several(case: Any, slots: int = EXPERTS, **options: Any) -> Engine:
    """An engine with its experts in place, and room for the caches of all sequences."""
    more = (SEQUENCES - 1) * demand_of(case, options.get("kv_bits")).context
    engine = load(case, slots, EXPERTS, parallel=SEQUENCES, more=more, **options)
    while engine.experts.is_filling:
        time.sleep(0.001)
    return engine


def start(batch: Batch, count: int, tokens: int) -> list[TokenAnswer]:
    """Begin answers, and read their prompts."""
    prompts = [[5 + n, *PROMPT] for n in range(count)]
    answers = [batch.add(TokenAnswer(ids, GREEDY, set(), tokens)) for ids in prompts]
    for _ in range(5):
        batch.step()
    assert all(answer.generated_tokens > 1 for answer in answers)
    return answers


@pytest.mark.parametrize("slots", [EXPERTS, EXPERTS // 2 + 2])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_token_takes_the_launches_and_waits_that_it_takes_alone(paper, case, slots, count):
    """Two answers left the graphs: 227 launches for their tokens, where each alone took 4."""
    engine = load_for_several(case("fp32"), slots)
    batch = engine.new_batch(shared_prefix=False)
    answers = start(batch, count, 30)
    paper.launches = paper.waits = 0
    before = sum(answer.generated_tokens for answer in answers)
    for _ in range(4):
        batch.step()
    tokens = sum(answer.generated_tokens for answer in answers) - before
    assert tokens == 4 * count
    is_whole = slots == EXPERTS
    # A row and a place are copied to the GPU. Each layer may need the host's part of its experts.
    assert paper.launches <= tokens * (4 if is_whole else 2 + 3 * LAYERS + 2)
    assert paper.waits == tokens * (1 if is_whole else 1 + LAYERS)


def logits_of(batch: Batch, requests: Sequence[TokenAnswer]) -> list[torch.Tensor]:
    """Answer requests, each joining as the one before has some tokens. Return their logits."""
    waiting, answers = list(requests), []
    logits: dict[TokenAnswer, list[torch.Tensor]] = {}
    while waiting or batch.size:
        if waiting and (not answers or answers[-1].generated_tokens > 2):
            answers.append(batch.add(waiting.pop(0)))
        for answer in batch.step():
            assert answer.error is None
            if answer.logits is not None:
                logits.setdefault(answer, []).append(answer.logits)
    return [torch.stack(logits[answer]) for answer in answers]


@pytest.mark.parametrize(("kind", "options"), [("nf4", {}), ("fp32", {"kv_bits": 8})])
def test_an_answer_keeps_its_bits_in_company(paper, case, monkeypatch, kind, options):
    """Its tokens were computed by other kernels as soon as another answer or prompt was there."""
    # A slow machine would read a prompt in chunks, which changes bits of its own.
    monkeypatch.setattr("mixchat.engine.chunk_sizer.SMALLEST_CHUNK", 32)
    engine = load_for_several(case(kind), **options)

    def requests() -> list[TokenAnswer]:
        return [
            request(n, 5 + 2 * n, temperature=n % 2, seed=n, repeat_penalty=1.1) for n in range(3)
        ]

    alone = [logits_of(engine.new_batch(shared_prefix=False), [each])[0] for each in requests()]
    together = logits_of(engine.new_batch(shared_prefix=False), requests())
    assert all(map(torch.equal, together, alone))


def test_a_short_answer_ends_while_a_long_one_goes_on(paper, case):
    batch = load_for_several(case("fp32")).new_batch()
    (long,) = start(batch, 1, 40)
    short, before = batch.add(request(9, 3)), long.generated_tokens
    for _ in range(4):  # its prompt comes after at most one token of the other, and then its own
        batch.step()
    assert short.has_ended
    assert long.generated_tokens >= before + 3 - 1


def test_a_long_prompt_is_read_between_the_tokens_of_others(paper, case, monkeypatch):
    monkeypatch.setattr("mixchat.engine.chunk_sizer._FIRST_CHUNK", 6)
    monkeypatch.setattr("mixchat.engine.chunk_sizer.PREFILL_CHUNK", 6)
    monkeypatch.setattr("mixchat.engine.chunk_sizer.SMALLEST_CHUNK", 6)
    batch = load_for_several(case("fp32")).new_batch()
    (first,) = start(batch, 1, 40)
    second = batch.add(TokenAnswer(range(3, 51), GREEDY, set(), 5))
    for number in range(1, 1 + 48 // 6):
        before = first.generated_tokens
        for _ in range(2):
            batch.step()
        assert first.generated_tokens == before + 1
        assert second.tokens_read == 6 * number
