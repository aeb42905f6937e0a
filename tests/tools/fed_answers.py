"""Answers that get their tokens from a test, and not from a batch."""

from collections.abc import Collection
from typing import Any

from mixchat.base.options import SamplingOptions
from mixchat.face.prompt import Prompt
from mixchat.face.request import Request
from mixchat.face.running_answer import RunningAnswer

MAX_TOKENS = 3000


def answer_read_by(parser: Any, tokenizer: Any, stop_ids: Collection[int]) -> RunningAnswer:
    """Return an answer to a prompt without tokens, whose text this parser reads."""
    request, prompt = Request(sampling=SamplingOptions()), Prompt(())
    stops = frozenset(stop_ids)
    return RunningAnswer(request, prompt, lambda event: None, tokenizer, parser, stops, MAX_TOKENS)


def feed(answer: RunningAnswer, token: int) -> None:
    experts: Any = None  # are asked only about answers that have begun
    answer.ids.append(token)
    answer.stats.generated_tokens += 1
    answer.report(experts)
