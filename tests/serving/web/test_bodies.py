"""The memory of requests: one budget for all, and few bodies that are parsed at once."""

import asyncio
import json
import select
import threading
from contextlib import ExitStack, suppress

import pytest
from event_loop import in_event_loop
from patience import PATIENCE_S, wait_until
from raw_http import exchange, read_response, request
from scripted_model import scripted_model

from mixchat.base.errors import ResourceError
from mixchat.face.events import End, Piece, TokenLogprob
from mixchat.face.prompt import Prompt
from mixchat.face.request import QueueFullError, Request
from mixchat.serving.requests.errors import RequestError, as_request_error
from mixchat.serving.requests.shared import APIRequest
from mixchat.serving.web import bodies
from mixchat.serving.web.answers import PING_S, PendingAnswers, WholeAnswer
from mixchat.serving.web.bodies import Body, RequestMemory, WorkTurns
from mixchat.serving.web.served_models import ServedModels

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "say:well"}]}
LIMIT, HEAVY = 10_000_000, 5_000_000  # bytes
CROWD = 40  # connections
HELD = b'{"a":[' + b"0," * 10_000 + b"0]}"


def body_of(data, share, turns=None):
    share.grow(len(data))
    return Body(data, share, turns or WorkTurns())


async def read_body(body, read, at_end=None):
    await body.parse()
    return await body.read(read, at_end)


def test_the_budget_of_a_machine_is_a_part_of_its_free_memory(monkeypatch):
    for free, budget in [(10**8, 64_000_000), (10**9, 250_000_000), (10**11, 512_000_000)]:
        monkeypatch.setattr(bodies, "free_memory", lambda free=free: free)
        assert bodies.body_budget() == budget


def test_all_requests_share_one_budget_of_which_small_ones_get_the_last_quarter():
    budget = RequestMemory(LIMIT)
    with budget.share() as large, budget.share() as other, budget.share() as small:
        large.grow(budget.most)
        with pytest.raises(QueueFullError):
            other.grow(500_000)
        small.grow(50_000)
        large.shrink(600_000)
        other.grow(500_000)
    with budget.share() as later:
        later.grow(budget.most)


def test_the_largest_answer_that_is_not_taken_makes_room_for_another_one():
    budget, given_up = RequestMemory(LIMIT), []
    with budget.share() as slow, budget.share() as slower, budget.share() as taken:
        for share, size in [(slow, 4_000_000), (slower, 5_000_000), (taken, 0)]:

            def give_up(share=share):
                given_up.append(share)
                share.shrink(share.size)

            share.can_give_up(give_up)
            share.grow(size)
        taken.grow(2_000_000)
        assert given_up == [slower]
        with pytest.raises(QueueFullError):
            taken.grow(9_000_000)  # it is the largest one then
        assert given_up == [slower, slow]


@pytest.mark.parametrize(("patience", "expected"), [(1.0, [9, 2, 5, 7]), (0.0, [9, 5, 2, 7])])
@in_event_loop
async def test_large_bodies_are_parsed_one_at_a_time_the_lightest_first(
    monkeypatch, patience, expected
):
    """The heaviest ones never had their turn while lighter ones came, in spite of their wait."""
    monkeypatch.setattr(bodies, "_LIGHT", 0)
    monkeypatch.setattr(bodies, "_PATIENCE_PER_BYTE", patience)
    budget, turns, order, running = RequestMemory(LIMIT), WorkTurns(), [], []
    may_end = threading.Event()

    def read(given):
        running.append(None)
        order.append(len(given))
        assert may_end.wait(PATIENCE_S)
        assert len(running) == 1
        running.pop()

    with budget.share() as share:
        tasks = []
        for fields in (9, 5, 2, 7):
            data = json.dumps({str(n): [] for n in range(fields)}).encode()
            body = body_of(data, share, turns)
            tasks.append(asyncio.ensure_future(read_body(body, read)))
            await asyncio.sleep(0.02)
        may_end.set()
        await asyncio.gather(*tasks)
    assert order == expected


@in_event_loop
async def test_a_small_body_waits_for_no_large_one_and_for_no_form():
    budget, turns = RequestMemory(LIMIT), WorkTurns()
    with budget.share() as share:
        async with turns.turn(HEAVY, 0.0), turns.turn(0, 0.0, has_form=True):
            assert await read_body(body_of(b'{"a": 1}', share, turns), len) == 1


@in_event_loop
async def test_the_body_of_a_client_that_left_is_never_parsed(monkeypatch):
    """60 clients sent 1 MB each and left. Another one waited until all were parsed, for 225 s."""
    monkeypatch.setattr(bodies, "_LIGHT", 0)
    parsed = []
    monkeypatch.setattr(bodies, "read_object", lambda data: parsed.append(data) or {})
    budget, turns = RequestMemory(LIMIT), WorkTurns()
    with budget.share() as share:
        async with turns.turn(HEAVY, 0.0):
            left, stays = (
                asyncio.ensure_future(read_body(body_of(data, share, turns), len))
                for data in (b"left", b"stays")
            )
            await asyncio.sleep(0.02)
            left.cancel()
            await asyncio.wait([left])
        await stays
    assert parsed == [b"stays"]


@in_event_loop
async def test_a_turn_that_ends_as_others_leave_goes_to_one_who_stays():
    """Two clients left in the moment in which a turn ended. Nobody got a turn after that."""
    turns, may_end, had_turns = WorkTurns(), asyncio.Event(), []

    async def take(name):
        async with turns.turn(HEAVY, 0.0):
            had_turns.append(name)
            await may_end.wait()

    first, *left, last = (
        asyncio.ensure_future(take(name)) for name in ("first", "left", "left", "last")
    )
    await asyncio.sleep(0.02)
    may_end.set()
    await asyncio.sleep(0)  # the first one is about to end
    for task in left:
        task.cancel()
    await asyncio.gather(first, last)
    assert had_turns == ["first", "last"]


@in_event_loop
async def test_who_leaves_while_a_body_is_parsed_ends_it_and_lets_the_next_one_begin_then(
    monkeypatch,
):
    """Others began while the threads of clients that had left still ran: 40 at once."""
    monkeypatch.setattr(bodies, "_LIGHT", 0)
    began, may_end, ended = threading.Event(), threading.Event(), []

    def read(fields):
        began.set()
        assert may_end.wait(PATIENCE_S)
        ended.append("left")

    budget, turns = RequestMemory(LIMIT), WorkTurns()
    with budget.share() as share, ExitStack() as at_end:
        at_end.callback(may_end.set)
        left = body_of(b"{}", share, turns)
        leaving = asyncio.ensure_future(read_body(left, read, at_end))
        await asyncio.to_thread(began.wait, 60)
        staying = body_of(b"{}", share, turns)
        reading = asyncio.ensure_future(read_body(staying, lambda fields: tuple(ended)))
        await asyncio.sleep(0.02)
        leaving.cancel()
        assert await reading == ("left",)
        with suppress(asyncio.CancelledError):
            await leaving


@pytest.mark.parametrize(
    ("path", "body", "method"),
    [
        ("/tokenize", {"content": "x"}, "encode"),
        ("/tokenize", {"content": "x" * 200_000}, "encode"),
        ("/detokenize", {"tokens": [97]}, "decode"),
        ("/v1/messages/count_tokens", HI, "encode"),
        ("/v1/completions", {"prompt": "x" * 1_000}, "encode"),
    ],
)
def test_no_text_of_a_client_that_left_is_turned_into_tokens_or_back(serve, path, body, method):
    """200 clients sent 1 MB each and left. A chat of 3 tokens then took 87 s.

    Each text was encoded, 40 at a time, beside the turns in which bodies were parsed.
    """
    served, begun, may_end = serve(context_size=8_000), [], threading.Event()
    owner = served.model.template if "messages" in body else served.model.tokenizer
    once = getattr(owner, method)

    def slow(*arguments):
        begun.append(None)
        assert may_end.wait(PATIENCE_S)
        return once(*arguments)

    setattr(owner, method, slow)
    with ExitStack() as connected:
        for _ in range(CROWD):
            connected.enter_context(served.connect()).sendall(request(path, body))
        wait_until(lambda: begun)
        wait_until(lambda: served.budget.held >= CROWD * len(json.dumps(body)))
    wait_until(lambda: served.server.connections == 0)
    may_end.set()
    assert exchange(served, request(path, body)).status == 200
    assert len(begun) <= 3  # two at a time, and the last one


def test_a_list_of_models_is_made_for_no_client_that_left(serve):
    begun, may_end = [], threading.Event()

    def others():
        begun.append(None)
        assert may_end.wait(PATIENCE_S)
        return {}

    model = scripted_model()
    served = serve(models=ServedModels(model, lambda name: model, others=others))
    with ExitStack() as connected:
        for _ in range(2 * CROWD):
            connected.enter_context(served.connect()).sendall(request("/v1/models"))
        wait_until(lambda: len(begun) >= CROWD)  # as many as there are threads
        wait_until(lambda: served.server.connections == 2 * CROWD)
    wait_until(lambda: served.server.connections == 0)
    may_end.set()
    assert exchange(served, request("/v1/models")).status == 200
    assert len(begun) <= CROWD + 1


def test_a_body_of_more_values_than_there_is_memory_for_is_refused(serve):
    """100 clients with 2 MB each took 4.1 GB."""
    served = serve(budget=LIMIT)
    given = {**HI, "metadata": {"x": [[]] * 20_000}}
    response = exchange(served, request(CHAT, given))
    assert (response.status, response.error["code"]) == (413, "request_too_large")
    given["metadata"] = {"x": "a" * 1_000_000}
    assert exchange(served, request(CHAT, given)).status == 200


def test_bodies_that_are_too_large_together_are_refused_while_small_ones_are_answered(serve):
    served = serve(budget=LIMIT // 2)
    half = request(CHAT, b"x" * 1_000_000)[:-1]
    senders = [served.connect() for _ in range(4)]
    for sender in senders:
        sender.sendall(half)
    (answered, *_), _, _ = select.select(senders, [], [], PATIENCE_S)
    refused = read_response(answered)
    assert (refused.status, refused.headers["retry-after"]) == (429, "2")
    assert "MB" in refused.error["message"]
    assert exchange(served, request(CHAT, HI)).status == 200
    for sender in senders:
        sender.close()


def test_a_request_gives_all_its_memory_back(serve):
    served = serve(budget=LIMIT)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    asked = [
        request(CHAT, HI),
        request(CHAT, {**HI, "stream": True}, connection="close"),
        request(CHAT, {**HI, "tools": [tool]}),
        request(CHAT, {**HI, "n": 99}),
        request(CHAT, b"{"),
        request("/tokenize", {"content": "x" * 500_000}),
        request("/api/show", {"model": "scripted"}),
    ]
    for data in asked:
        for _ in range(30):
            response = exchange(served, data)
            assert response.status in (200, 400), response
    # A client has its answer a moment before the server has ended the request.
    wait_until(lambda: served.budget.held == 0)


class _Model:
    """A model with one answer, itself, that only keeps the sink."""

    def __init__(self):
        self.is_cancelled = False

    def submit(self, *answers):
        ((_, _, self.sink),) = answers
        return [self]

    def cancel(self):
        self.is_cancelled = True


ASKED = APIRequest((Request(),), (Prompt((1,)),))


@in_event_loop
async def test_an_answer_that_is_not_taken_is_given_up_when_its_memory_is_needed():
    token = TokenLogprob(1, -1.0, tuple((n, -1.0) for n in range(20)))
    budget, model = RequestMemory(LIMIT), _Model()
    with budget.share() as share:
        pending = PendingAnswers(model, ASKED, share, None, as_request_error)
        pending.submit()
        for _ in range(LIMIT // 2_000):
            model.sink(Piece("x", tokens=(token,)))
        await asyncio.sleep(0.1)  # the events arrive
        with pytest.raises(ResourceError, match="cut off"):
            await pending.next(PING_S)
        assert model.is_cancelled
        assert share.size == 0


@in_event_loop
async def test_sending_a_long_answer_lets_others_run():
    """A socket that had failed got all pieces before anybody saw it, with a warning for each."""
    sent, turns = [], []

    async def send(message):
        sent.append(message)

    async def look():
        while not sent or sent[-1].get("more_body", True):
            turns.append(len(sent))
            await asyncio.sleep(0)

    with RequestMemory(LIMIT).share() as share:
        answer = WholeAnswer(b"x" * 1_000_000, share)
        await asyncio.gather(look(), answer({}, None, send))
    assert len({*turns}) > 10
    assert b"".join(message.get("body", b"") for message in sent) == b"x" * 1_000_000


@in_event_loop
async def test_a_whole_answer_that_is_not_taken_is_given_up_when_its_memory_is_needed():
    budget, sent = RequestMemory(LIMIT), []
    with budget.share() as share, budget.share() as other:
        answer = WholeAnswer(b"x" * 8_000_000, share)

        async def send(message):
            sent.append(message)
            if len(sent) == 3:  # the client is slow now, and another one needs memory
                other.can_give_up(lambda: None)
                other.grow(3_000_000)

        await answer({}, None, send)
        assert share.size == 0
    assert [message["type"][14:] for message in sent] == ["start", "body", "body"]
    assert sent[-1]["more_body"]  # so that the server closes the connection


@in_event_loop
async def test_a_model_is_free_as_soon_as_an_answer_is_computed():
    model, computed = _Model(), []
    with RequestMemory(LIMIT).share() as share:
        pending = PendingAnswers(model, ASKED, share, None, as_request_error)
        pending.submit()
        pending.when_computed(lambda: computed.append(pending.finished))
        model.sink(Piece("x"))
        model.sink(End("stop"))
        await asyncio.sleep(0.02)
        assert computed == [False]  # nobody has taken it yet
        pending.when_computed(lambda: computed.append("again"))
        assert computed == [False, "again"]
        assert share.size > 0
        pending.end()
        model.sink(Piece("late"))
        await asyncio.sleep(0.02)
        assert share.size == 0


def test_a_body_is_checked_for_the_budget_by_its_objects():
    budget = RequestMemory(LIMIT)
    with budget.share() as share:
        assert body_of(HELD, share).weight < LIMIT // 2
        with pytest.raises(RequestError):
            body_of(b"[" * 20_000, share)
