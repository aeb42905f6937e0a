"""A service over one model: many jobs at once, each answered as if it were alone."""

import json
import math
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from character_tokens import character_bytes
from mixchat.serving.model_service import ModelService
from mixchat.serving.requests.forms import forms_of
from mixchat.serving.running_job import RunningJob
from mixchat.serving.service import Delta, Done, Failed, QueueFullError, Reading, ShuttingDownError
from waiter import Waiter, job

from mixchat.base.errors import CheckpointError, PromptError
from mixchat.base.options import SamplingOptions
from mixchat.engine.passes import ForwardPasses
from mixchat.text.checkpoint_text import CheckpointText
from mixchat.text.form.call_form import CallForm
from mixchat.text.form.constraint import CallConstraint
from mixchat.text.thinking import ThinkingFormat
from mixchat.text.tool_call import Tool, joined_calls
from mixchat.text.tool_formats import PLAIN


def test_forty_jobs_at_once_of_which_a_third_is_cancelled_are_answered_as_alone(model_service):
    one = model_service(parallel=1)
    alone = [Waiter(one, job(n)).result() for n in range(40)]
    service = model_service()
    together = [Waiter(service, job(n), 2 if n % 3 == 0 else None) for n in range(40)]
    for number, (waiter, (expected, end)) in enumerate(zip(together, alone, strict=True)):
        text, last = waiter.result()
        if number % 3 == 0:
            assert last.reason == "interrupted"
            assert expected.startswith(text)
        else:
            assert (text, last.generated_tokens) == (expected, end.generated_tokens)
        assert waiter.threads == {"model"}
    stats = service.stats()
    assert (stats.finished, stats.cancelled, stats.running, stats.waiting) == (26, 14, 0, 0)


def test_a_prompt_that_was_computed_before_is_cached_but_for_its_last_token(model_service):
    service = model_service()
    first, last = Waiter(service, job(9)).result()
    again, end = Waiter(service, job(9)).result()
    assert again == first
    assert end == Done(
        last.reason, last.prompt_tokens, last.prompt_tokens - 1, last.generated_tokens
    )


@pytest.mark.parametrize(("max_tokens", "reason"), [(4, "length"), (None, "context")])
def test_an_answer_that_nothing_stops_ends_at_its_limit_or_where_the_context_is_full(
    model_service, max_tokens, reason
):
    service = model_service()
    prompt = (3,) * (service.context.tokens - 8)
    endless = job(0, prompt_ids=prompt, max_tokens=max_tokens, stop_ids=frozenset())
    assert Waiter(service, endless).result()[1].reason == reason


def test_a_long_prompt_tells_its_progress(model_service, monkeypatch):
    monkeypatch.setattr("mixchat.engine.chunk_sizer.PREFILL_CHUNK", 10)
    waiter = Waiter(model_service(), job(29))
    waiter.result()
    progress = [event for event in waiter.events if isinstance(event, Reading)]
    assert progress[:2] == [Reading(10, 34), Reading(20, 34)]


def test_an_idle_service_takes_as_many_jobs_at_once_as_it_says(model_service):
    """It took as many only if the first of them had begun before the last one came."""
    service = model_service(parallel=2, waiting=3)
    assert service.most_jobs == 5
    with service._changed:  # none begins meanwhile
        waiters = [Waiter(service, job(n)) for n in range(5)]
        with pytest.raises(QueueFullError):
            Waiter(service, job(5))
    assert all(isinstance(waiter.result()[1], Done) for waiter in waiters)


def test_a_queue_has_a_bound_and_what_is_refused_harms_nobody(model_service):
    service = model_service(parallel=1, waiting=2)
    waiters, refused = [], 0
    with service._changed:  # none ends meanwhile
        for n in range(9):
            try:
                waiters.append(Waiter(service, job(n)))
            except QueueFullError:
                refused += 1
    assert refused == 6
    assert all(isinstance(waiter.result()[1], Done) for waiter in waiters)


def test_jobs_that_do_not_all_find_room_leave_the_room_to_others(model_service):
    """Those that had found room held it until the thread of the model had cancelled them."""
    service = model_service(parallel=1, waiting=2)
    with service._changed:  # none begins meanwhile
        with pytest.raises(QueueFullError):
            service.submit(*[(job(n), print) for n in range(4)])
        waiters = [Waiter(service, job(n)) for n in range(3)]
    assert all(isinstance(waiter.result()[1], Done) for waiter in waiters)


def test_one_that_is_cancelled_while_it_waits_is_told_so(model_service):
    service = model_service(parallel=1)
    with service._changed:  # the first one does not end meanwhile
        first = Waiter(service, job(0, max_tokens=80, stop_ids=frozenset()))
        second = Waiter(service, job(1))
        second.cancel()
    assert second.result() == ("", Done("interrupted", 6, 0, 0))
    first.cancel()
    assert isinstance(first.result()[1], Done)


class Anything:
    """A constraint that allows every token, as soon as it is compiled."""

    def __init__(self) -> None:
        self.compiled: Future[Any] = Future()

    def allowed(self) -> torch.Tensor:
        assert self.compiled.done()
        return torch.ones(262, dtype=torch.bool)

    def accept(self, token: int) -> None:
        pass


def test_a_form_that_takes_long_to_compile_holds_up_nobody(model_service):
    """Forms were compiled in the thread of the model: all other answers stood still meanwhile."""
    service = model_service(parallel=1)
    forms = Anything(), Anything()
    slow, left = (
        Waiter(service, job(n, constraint=lambda parser, n=n: forms[n])) for n in range(2)
    )
    assert isinstance(Waiter(service, job(2)).result()[1], Done)
    left.cancel()
    assert left.result()[1].reason == "interrupted"
    forms[0].compiled.set_result(None)
    assert isinstance(slow.result()[1], Done)


def test_a_form_that_cannot_be_compiled_ends_its_own_answer(model_service):
    def no_process(parser):
        raise OSError("no more processes")

    service = model_service()
    bad, good = Waiter(service, job(1, constraint=no_process)), Waiter(service, job(2))
    assert isinstance(bad.result()[1], Failed)
    assert isinstance(good.result()[1], Done)


BRIEF = {"type": "object", "properties": {"a": {"enum": [1, 23]}}, "required": ["a"]}
TOOLS = [Tool("f", None, {**BRIEF, "additionalProperties": False}), Tool("g")]


def calling(service: ModelService, number: int, opening: str | None, **options: Any) -> Waiter:
    """A job that has to call a tool, or may call one after an opening."""
    format = replace(PLAIN, opening=opening or PLAIN.opening)
    form = CallForm(format, TOOLS, must_call=opening is None, parallel=False)
    start = forms_of(service)(form)

    def constraint(parser: Any) -> Any:
        if form.must_call:
            return start()
        return CallConstraint(start(continued=True), parser, format.opening, service.tokenizer)

    given = {"constraint": constraint, "tools": format, "max_tokens": 100, **options}
    return Waiter(service, job(number, **given))


@pytest.mark.parametrize("opening", [None, "<<"], ids=["must", "may"])
def test_calls_of_a_random_model_keep_to_the_schemas(model_service, opening):
    """Its favourite token leads to the opening, after which the form allows no more of them."""
    service = model_service()
    favourite = service.tokenizer.encode("<")[0]
    sampling = SamplingOptions(temperature=1.0, logit_bias=((favourite, 100.0),))
    waiters = [
        calling(service, n, opening, sampling=replace(sampling, seed=n), prompt_ids=(5, 6))
        for n in range(3)
    ]
    for waiter in waiters:
        text, done = waiter.result()
        deltas = [event for event in waiter.events if isinstance(event, Delta)]
        (call,) = joined_calls(tuple(piece for delta in deltas for piece in delta.calls))
        assert (text, done.reason) == ("", "tool_calls")
        assert json.loads(call.arguments) in {"f": [{"a": 1}, {"a": 23}], "g": [{}]}[call.name]


def test_an_answer_that_may_call_tools_and_does_not_is_the_same(model_service):
    service = model_service()
    plain, offered = Waiter(service, job(4)), calling(service, 4, "<tool_call>", max_tokens=20)
    assert offered.result()[0] == plain.result()[0]


def test_a_prompt_that_is_too_long_is_refused_at_once(model_service):
    with pytest.raises(PromptError, match="128 tokens"):
        model_service().submit((job(0, prompt_ids=(3,) * 128), print))


def test_closing_cancels_answers_and_takes_no_others(model_service):
    service = model_service(parallel=1)
    waiters = [Waiter(service, job(n, max_tokens=90, stop_ids=frozenset())) for n in range(100)]
    service.close()
    assert waiters[99].result()[1] == Done("interrupted", 14, 0, 0)
    with pytest.raises(ShuttingDownError):
        service.submit((job(0), print))


def test_log_probabilities_are_those_of_the_model(model_service):
    waiter = Waiter(model_service(), job(4, top_logprobs=3, sampling=SamplingOptions(0)))
    _, last = waiter.result()
    deltas = [event for event in waiter.events if isinstance(event, Delta)]
    tokens = [token for delta in deltas for token in delta.tokens]
    assert len(tokens) == last.generated_tokens
    for token in tokens:
        values = [value for _, value in token.top]
        assert token.top[0] == (token.token, token.logprob)  # greedy
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) < 1.0001


def test_a_stop_string_ends_the_answer_before_it(model_service):
    service = model_service()
    text, _ = Waiter(service, job(5, max_tokens=60)).result()
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    shown, last = Waiter(service, job(5, max_tokens=60, stop=(stop,))).result()
    assert shown == text[: text.index(stop)]
    assert last.reason == "stop_string"


def test_a_fault_is_told_to_those_it_hits_and_the_next_are_served(model_service, monkeypatch):
    service = model_service()
    expected = Waiter(service, job(3)).result()[0]
    for fault in (CheckpointError("experts-000.safetensors cannot be read"), RuntimeError("oh")):

        def fails(*given, fault=fault, **how):
            raise fault

        with monkeypatch.context() as patch:
            patch.setattr(ForwardPasses, "compute", fails)
            assert Waiter(service, job(2)).result() == ("", Failed(fault))
        assert Waiter(service, job(3)).result()[0] == expected
    assert service.stats().failed == 2


def test_a_model_that_cannot_be_loaded_says_why(model):
    def load():
        raise CheckpointError("shared.safetensors is damaged")

    text = CheckpointText(model)
    tokenizer = text.tokenizer()
    with pytest.raises(CheckpointError, match="damaged"):
        ModelService("tiny", load, tokenizer, text.template((2,)), queue=1)


def test_counts_are_those_of_the_answers(model_service):
    service = model_service()
    sums: dict[str, int] = defaultdict(int)
    for number in range(6):
        _, last = Waiter(service, job(number)).result()
        sums["prompt_tokens"] += last.prompt_tokens - last.cached_tokens
        sums["cached_tokens"] += last.cached_tokens
        sums["generated_tokens"] += last.generated_tokens
    stats = service.stats()
    assert {name: getattr(stats, name) for name in sums} == sums
    assert stats.busy_seconds > 0
    assert stats.expert_hits + stats.expert_misses > 0


def test_a_job_tells_thinking_apart_from_text() -> None:
    """A token is a character."""

    class Characters:
        control_tokens: dict[str, int] = {}  # noqa: RUF012
        token_bytes = character_bytes()

        def decode(self, ids: Any) -> str:
            return "".join(map(chr, ids))

    prompt, events = tuple(map(ord, "Hi<think>")), []
    asked = job(0, prompt_ids=prompt, stop=("END",), thinking=ThinkingFormat("tags"))
    running = RunningJob(asked, events.append, Characters(), 100)  # type: ignore[arg-type]
    answer: Any = SimpleNamespace(
        ids=[], error=None, generated_tokens=0, logits=None, has_ended=False, is_cancelled=False
    )
    answer.stats = SimpleNamespace(prompt_tokens=9, reused_tokens=0, generated_tokens=17)
    answer.cancel = lambda: setattr(answer, "has_ended", True)
    running.answer = answer
    for character in "END.</think>YesEND":
        answer.ids.append(ord(character))
        answer.generated_tokens += 1
        last = running.report()
    assert last == Done("stop_string", 9, 0, 17, len("END.</think>"))
    deltas = [event for event in events if isinstance(event, Delta)]
    assert "".join(delta.thinking for delta in deltas) == "END."
    assert "".join(delta.text for delta in deltas) == "Yes"
