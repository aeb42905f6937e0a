"""A loaded model: many answers at once, each as if it were alone."""

import json
import math
import queue
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from patience import PATIENCE_S

from mixchat.base.errors import CheckpointError, PromptError
from mixchat.base.options import SamplingOptions
from mixchat.engine.generate import Engine
from mixchat.engine.passes import ForwardPasses
from mixchat.face.events import End, Failed, Piece, Reading
from mixchat.face.model import Model, ModelText
from mixchat.face.request import QueueFullError, Request, ShuttingDownError, ToolOffer
from mixchat.text.checkpoint_text import CheckpointText
from mixchat.text.form.call_form import CallForm
from mixchat.text.form.constraint import CallConstraint
from mixchat.text.tool_call import Tool, joined_calls
from mixchat.text.tool_formats import PLAIN

ENDLESS = ((2, -100.0),)  # the bias of a stop token that never comes


def asked(number: int, prompt: Sequence[int] = (), max_tokens: int = 20, **options: Any) -> Request:
    ids = prompt or tuple(3 + (number * 7 + n * 11) % 250 for n in range(5 + number % 30))
    sampling = SamplingOptions(
        **{"temperature": 1.0, "seed": number, **options.pop("sampling", {})}
    )
    return Request(prompt=ids, sampling=sampling, max_tokens=max_tokens, **options)


class Waiter:
    """A sink that keeps the events, and may cancel the answer after some pieces."""

    def __init__(
        self, model: Model, request: Request, cancel_after: int | None = None, **prompt: Any
    ) -> None:
        self.events: list[Any] = []
        self.threads: set[str] = set()
        self._model, self._ended, self._pieces = model, threading.Event(), 0
        self._cancel_after = cancel_after
        self._answers: queue.Queue[Any] = queue.Queue()
        made = replace(model.prompt(request), **prompt)
        self._answers.put(model.submit((request, made, self._take)))

    def cancel(self) -> None:
        for answer in self._answers.get(timeout=PATIENCE_S):
            answer.cancel()

    def _take(self, event: Any) -> None:
        self.events.append(event)
        self.threads.add(threading.current_thread().name)
        self._pieces += isinstance(event, Piece)
        if self._pieces and self._pieces == self._cancel_after:
            self._cancel_after = None
            self.cancel()
        if isinstance(event, End | Failed):
            self._ended.set()

    @property
    def pieces(self) -> list[Piece]:
        return [event for event in self.events if isinstance(event, Piece)]

    def result(self) -> tuple[str, Any]:
        """Return the text, and the last event."""
        assert self._ended.wait(PATIENCE_S)
        ends = [event for event in self.events if isinstance(event, End | Failed)]
        assert ends == [self.events[-1]]
        return "".join(piece.text for piece in self.pieces), ends[0]


@contextmanager
def held(model: Model) -> Iterator[None]:
    """Keep the model's thread from beginning or ending anything in this block."""
    is_held, may_continue = threading.Event(), threading.Event()

    def hold(engine: Engine) -> None:
        is_held.set()
        assert may_continue.wait(PATIENCE_S)

    thread = threading.Thread(target=model.do, args=[hold])
    thread.start()
    assert is_held.wait(PATIENCE_S)
    try:
        yield
    finally:
        may_continue.set()
        thread.join()


def test_forty_answers_at_once_of_which_a_third_is_cancelled_are_answered_as_alone(load):
    one = load(parallel=1)
    alone = [Waiter(one, asked(n)).result() for n in range(40)]
    model = load()
    together = [Waiter(model, asked(n), 2 if n % 3 == 0 else None) for n in range(40)]
    for number, (waiter, (expected, end)) in enumerate(zip(together, alone, strict=True)):
        text, last = waiter.result()
        if number % 3 == 0:
            assert last.reason == "interrupted"
            assert expected.startswith(text)
        else:
            assert (text, last.stats.generated_tokens) == (expected, end.stats.generated_tokens)
        assert waiter.threads == {"model"}
    stats = model.stats
    assert (stats.finished, stats.cancelled, stats.running, stats.waiting) == (26, 14, 0, 0)


def test_a_prompt_that_was_computed_before_is_cached_but_for_its_last_token(load):
    model = load()
    first, last = Waiter(model, asked(9)).result()
    again, end = Waiter(model, asked(9)).result()
    assert again == first
    assert last.stats.reused_tokens == 0
    assert end.stats.reused_tokens == last.stats.prompt_tokens - 1


@pytest.mark.parametrize(("max_tokens", "reason"), [(4, "length"), (0, "context")])
def test_an_answer_that_nothing_stops_ends_at_its_limit_or_where_the_context_is_full(
    load, max_tokens, reason
):
    model = load()
    prompt = (3,) * (model.context.tokens - 8)
    endless = asked(0, prompt, max_tokens, sampling={"logit_bias": ENDLESS})
    assert Waiter(model, endless).result()[1].reason == reason


def test_a_long_prompt_tells_its_progress(load, monkeypatch):
    monkeypatch.setattr("mixchat.engine.chunk_sizer.PREFILL_CHUNK", 10)
    monkeypatch.setattr("mixchat.face.running_answer._READING_INTERVAL_S", 0)
    waiter = Waiter(load(), asked(29))
    waiter.result()
    progress = [event.done for event in waiter.events if isinstance(event, Reading)]
    assert {0, 10, 20, 34} <= {*progress}
    assert progress == sorted({*progress})


def test_an_idle_model_takes_as_many_answers_at_once_as_it_says(load):
    """It took as many only if the first of them had begun before the last one came."""
    model = load(parallel=2, waiting=3)
    assert model.capacity == 5
    with held(model):  # none begins meanwhile
        waiters = [Waiter(model, asked(n)) for n in range(5)]
        with pytest.raises(QueueFullError):
            Waiter(model, asked(5))
    assert all(isinstance(waiter.result()[1], End) for waiter in waiters)


def test_answers_that_do_not_all_find_room_leave_the_room_to_others(load):
    """Those that had found room held it until the thread of the model had cancelled them."""
    model = load(parallel=1, waiting=2)
    with held(model):  # none begins meanwhile
        with pytest.raises(QueueFullError):
            model.submit(*[(asked(n), model.prompt(asked(n)), print) for n in range(4)])
        waiters = [Waiter(model, asked(n)) for n in range(3)]
    assert all(isinstance(waiter.result()[1], End) for waiter in waiters)


def test_one_that_is_cancelled_while_it_waits_is_told_so(load):
    model = load(parallel=1)
    with held(model):  # the first one does not end meanwhile
        first = Waiter(model, asked(0, max_tokens=80, sampling={"logit_bias": ENDLESS}))
        second = Waiter(model, asked(1))
        second.cancel()
    text, last = second.result()
    assert (text, last.reason, last.stats.generated_tokens) == ("", "interrupted", 0)
    first.cancel()
    assert isinstance(first.result()[1], End)


class Anything:
    """A constraint that allows every token, as soon as it is compiled."""

    def __init__(self) -> None:
        self.compiled: Future[Any] = Future()

    def allowed(self) -> torch.Tensor:
        assert self.compiled.done()
        return torch.ones(262, dtype=torch.bool)

    def accept(self, token: int) -> bool:
        return True

    def close(self) -> None:
        pass


def test_a_form_that_takes_long_to_compile_holds_up_nobody(load):
    """Forms were compiled in the thread of the model: all other answers stood still meanwhile."""
    model = load(parallel=1)
    forms = Anything(), Anything()
    slow, left = (
        Waiter(model, asked(n), constraint=lambda parser, room, n=n: forms[n]) for n in range(2)
    )
    assert isinstance(Waiter(model, asked(2)).result()[1], End)
    left.cancel()
    assert left.result()[1].reason == "interrupted"
    forms[0].compiled.set_result(None)
    assert isinstance(slow.result()[1], End)


def test_a_form_that_cannot_be_compiled_ends_its_own_answer(load):
    def no_process(parser, room):
        raise OSError("no more processes")

    model = load()
    bad, good = Waiter(model, asked(1), constraint=no_process), Waiter(model, asked(2))
    assert isinstance(bad.result()[1], Failed)
    assert isinstance(good.result()[1], End)


def test_a_constraint_that_cannot_be_closed_harms_no_answer(load):
    """The error ended the pass: the answer's reader waited for ever, and others got the error."""

    class Stuck(Anything):
        def close(self) -> None:
            raise OSError("no such process")

    model, stuck = load(), Stuck()
    stuck.compiled.set_result(None)
    bad = Waiter(model, asked(1), constraint=lambda parser, room: stuck)
    good = Waiter(model, asked(2, max_tokens=60))
    assert isinstance(bad.result()[1], End)
    assert isinstance(good.result()[1], End)


BRIEF = {"type": "object", "properties": {"a": {"enum": [1, 23]}}, "required": ["a"]}
TOOLS = [Tool("f", None, {**BRIEF, "additionalProperties": False}), Tool("g")]


def calling(model: Model, request: Request, opening: str | None) -> Waiter:
    """An answer that has to call a tool, or may call one after an opening."""
    format = replace(PLAIN, opening=opening or PLAIN.opening)
    form = CallForm(format, TOOLS, must_call=opening is None, parallel=False)
    start = model.forms.compile(form)

    def constraint(parser: Any, room: int) -> Any:
        if form.must_call:
            return start()
        return CallConstraint(start(continued=True), parser, format.opening, model.tokenizer)

    offer = ToolOffer(tuple(TOOLS), tuple(TOOLS))
    return Waiter(model, request, constraint=constraint, tools=format, offered=offer)


@pytest.mark.parametrize("opening", [None, "<<"], ids=["must", "may"])
def test_calls_of_a_random_model_keep_to_the_schemas(load, opening):
    """Its favourite token leads to the opening, after which the form allows no more of them."""
    model = load()
    favourite = model.tokenizer.encode("<")[0]
    biased = {"logit_bias": ((favourite, 100.0),)}
    waiters = [calling(model, asked(n, (5, 6), 100, sampling=biased), opening) for n in range(3)]
    for waiter in waiters:
        text, done = waiter.result()
        (call,) = joined_calls(tuple(call for piece in waiter.pieces for call in piece.calls))
        assert (text, done.reason) == ("", "tool_calls")
        assert json.loads(call.arguments) in {"f": [{"a": 1}, {"a": 23}], "g": [{}]}[call.name]


def test_an_answer_that_may_call_tools_and_does_not_is_the_same(load):
    model = load()
    plain, offered = Waiter(model, asked(4)), calling(model, asked(4), "<tool_call>")
    assert offered.result()[0] == plain.result()[0]


def test_a_prompt_that_is_too_long_is_refused_at_once(load):
    with pytest.raises(PromptError, match="128 tokens"):
        Waiter(load(), asked(0, (3,) * 128))


def test_closing_cancels_answers_and_takes_no_others(load):
    model = load(parallel=1)
    waiters = [Waiter(model, asked(n, max_tokens=90)) for n in range(100)]
    model.close()
    assert waiters[99].result()[1].reason == "interrupted"
    with pytest.raises(ShuttingDownError):
        Waiter(model, asked(0))


def test_log_probabilities_are_those_of_the_model(load):
    waiter = Waiter(load(), asked(4, top_logprobs=3, sampling={"temperature": 0}))
    _, last = waiter.result()
    tokens = [token for piece in waiter.pieces for token in piece.tokens]
    assert len(tokens) == last.stats.generated_tokens
    for token in tokens:
        values = [value for _, value in token.top]
        assert token.top[0] == (token.token, token.logprob)  # greedy
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) < 1.0001


def test_a_stop_string_ends_the_answer_before_it(load):
    model = load()
    text, _ = Waiter(model, asked(5, max_tokens=60)).result()
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    shown, last = Waiter(model, asked(5, max_tokens=60, stop=(stop,))).result()
    assert shown == text[: text.index(stop)]
    assert last.reason == "stop_string"


def test_a_fault_is_told_to_those_it_hits_and_the_next_are_served(load, monkeypatch):
    model = load()
    expected = Waiter(model, asked(3)).result()[0]
    for fault in (CheckpointError("experts-000.safetensors cannot be read"), RuntimeError("oh")):

        def fails(*given, fault=fault, **how):
            raise fault

        with monkeypatch.context() as patch:
            patch.setattr(ForwardPasses, "compute", fails)
            assert Waiter(model, asked(2)).result() == ("", Failed(fault))
        assert Waiter(model, asked(3)).result()[0] == expected
    assert model.stats.failed == 2


def test_a_model_that_cannot_be_loaded_says_why(installed):
    def load():
        raise CheckpointError("shared.safetensors is damaged")

    text = CheckpointText(installed)
    with pytest.raises(CheckpointError, match="damaged"):
        Model("tiny", load, ModelText(text.tokenizer(), text.template((2,))))


def test_counts_are_those_of_the_answers(load):
    model = load()
    sums: dict[str, int] = defaultdict(int)
    for number in range(6):
        _, last = Waiter(model, asked(number)).result()
        sums["prompt_tokens"] += last.stats.prompt_tokens - last.stats.reused_tokens
        sums["cached_tokens"] += last.stats.reused_tokens
        sums["generated_tokens"] += last.stats.generated_tokens
    stats = model.stats
    assert {name: getattr(stats, name) for name in sums} == sums
    assert stats.busy_seconds > 0
    assert stats.expert_hits + stats.expert_misses > 0
