"""The models of a server: a change of model, and a model that sleeps."""

import asyncio
import json
import socket
import threading
from collections import Counter
from contextlib import closing, suppress
from datetime import UTC, datetime

import ollama
import pytest
from event_loop import in_event_loop
from patience import PATIENCE_S
from raw_http import exchange, read_response, request
from scripted_model import scripted_model

from mixchat.base.context import Context
from mixchat.base.errors import CheckpointError, ResourceError, UsageError
from mixchat.base.options import LoadOptions
from mixchat.face.request import QueueFullError, ShuttingDownError
from mixchat.serving import serve as serve_module
from mixchat.serving.web import bodies, served_models
from mixchat.serving.web.served_models import ModelFacts, ServedModels

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "say:well"}]}
SIZES = {"a": 4000, "b": 40_000}  # tokens of the contexts


class Shelf:
    """Loads scripted models, and knows which ones are open."""

    def __init__(self):
        self.open, self.loads, self.errors = [], [], []
        self.may_load = threading.Event()
        self.may_load.set()

    def load(self, name):
        assert self.may_load.wait(PATIENCE_S)
        if self.errors:
            raise self.errors.pop()
        model = scripted_model(name, context_size=SIZES[name])
        self.open.append(name)
        self.loads.append(name)
        close = model.close
        model.close = lambda: (close(), self.open.remove(name))
        return model


@pytest.fixture
def shelf():
    return Shelf()


def models_of(shelf, **options):
    return ServedModels(shelf.load("a"), shelf.load, others=others, **options)


def others():
    """It may read the disk, which would hold up the answers in the event loop."""
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
    return {name: Context(size, size) for name, size in SIZES.items()}


@pytest.fixture
def serve_shelf(serve, shelf):
    """Starts a server of the shelf's models, with options of `ServedModels`."""
    started = []

    def start(**options):
        started.append(models_of(shelf, **options))
        return serve(models=started[-1])

    yield start
    for models in started:
        models.close()


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


async def left_while_loading(models, shelf):
    """The request of a client that leaves while another model loads, until it may load."""
    shelf.may_load.clear()
    leaving = asyncio.ensure_future(models.use("b").__aenter__())
    await until(lambda: not models.is_loaded)
    leaving.cancel()
    return leaving


@in_event_loop
async def test_another_model_replaces_the_loaded_one_and_only_one_is_open(shelf):
    models = models_of(shelf)
    for name, used in [(None, "a"), ("b", "b"), (None, "b"), ("unknown", "b"), ("a", "a")]:
        async with models.use(name) as model:
            assert (model.name, shelf.open) == (used, [used])
    assert list(await models.contexts()) == ["a", "b"]
    assert shelf.loads == ["a", "b", "a"]


@in_event_loop
async def test_an_alias_means_its_model_whatever_has_the_same_name(shelf):
    models = models_of(shelf, aliases={"gpt-4o": "b", "a": "b", "b": "unknown", "d": "gpt-4o"})
    for name, used in [("gpt-4o", "b"), ("a", "b"), ("b", "b"), ("d", "b")]:
        async with models.use(name) as model:
            assert model.name == used
    contexts = await models.contexts()
    assert {name: context.tokens for name, context in contexts.items()} == {
        "b": 40_000,
        "a": 40_000,
        "gpt-4o": 40_000,
    }
    await models.unload("gpt-4o")
    assert not models.is_loaded


@pytest.mark.parametrize("turn_s", [0.0, 60.0])
@in_event_loop
async def test_later_requests_pass_one_for_another_model_until_its_turn_comes(
    shelf, monkeypatch, turn_s
):
    """With turns of 0 s, nobody passes. The last of them takes any model."""
    monkeypatch.setattr(served_models, "_TURN_S", turn_s)

    models, order = models_of(shelf), []

    async def use(name):
        async with models.use(name) as model:
            order.append(model.name)

    async with models.use("a"):
        waiting = [asyncio.ensure_future(use("b"))]
        await until(lambda: models.stats().waiting == 1)
        waiting += [asyncio.ensure_future(use(name)) for name in ("a", "b", None)]
        await until(lambda: models.stats().waiting == (2 if turn_s else 4))
        assert (order, shelf.open) == (["a", "a"] if turn_s else [], ["a"])
    await asyncio.gather(*waiting)
    if turn_s:
        assert (order, shelf.loads) == (["a", "a", "b", "b"], ["a", "b"])
    else:
        assert (order, shelf.loads) == (["b", "b", "b", "a"], ["a", "b", "a"])


@in_event_loop
async def test_neither_of_two_models_is_starved_by_clients_without_a_pause(shelf, monkeypatch):
    """Two clients of each model ask again at once. A model had to be loaded for each question."""
    monkeypatch.setattr(served_models, "_TURN_S", 0.1)
    models, counts = models_of(shelf), Counter()
    end = asyncio.get_running_loop().time() + 2

    async def ask(name):
        while asyncio.get_running_loop().time() < end:
            async with models.use(name):
                await asyncio.sleep(0.01)
                counts[name] += 1

    await asyncio.gather(*map(ask, "aabb"))
    assert min(counts.values()) > 10
    assert len(shelf.loads) < 30


@in_event_loop
async def test_requests_that_wait_for_a_model_are_counted_and_bounded(shelf):
    """80 of them waited with a --queue of 64, and each held what was parsed of its body."""
    models = models_of(shelf, queue=2)
    async with models.use("a"):
        waiting = [asyncio.ensure_future(models.use("b").__aenter__()) for _ in range(2)]
        await until(lambda: models.stats().waiting == 2)
        with pytest.raises(QueueFullError):
            await models.use("b").__aenter__()
        async with models.use("a"):  # which waits for nothing
            pass
        waiting[0].cancel()
        await until(lambda: models.stats().waiting == 1)
    await waiting[1]


@in_event_loop
async def test_who_leaves_lets_those_pass_who_waited_behind(shelf, monkeypatch):
    monkeypatch.setattr(served_models, "_TURN_S", 0.0)
    models = models_of(shelf)
    async with models.use("a"):
        leaving = asyncio.ensure_future(models.use("b").__aenter__())
        await until(lambda: models.stats().waiting == 1)
        staying = asyncio.ensure_future(models.use("a").__aenter__())
        await until(lambda: models.stats().waiting == 2)
        leaving.cancel()
        await staying
    assert shelf.loads == ["a"]


@in_event_loop
async def test_a_model_that_fails_to_load_fails_all_who_wait_for_it_at_once(shelf):
    models = models_of(shelf)
    shelf.errors.append(ResourceError("there is no room"))
    async with models.use("a"):
        waiting = [asyncio.ensure_future(models.use("b").__aenter__()) for _ in range(3)]
        await until(lambda: models.stats().waiting == 3)
    failed = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in failed] == [ResourceError] * 3
    async with models.use() as model:  # nobody else notices
        assert (model.name, shelf.open) == ("a", ["a"])


def test_a_damaged_model_leaves_the_loaded_one_where_it_is(serve_shelf, shelf):
    """It was unloaded first, so any client could have it unloaded again and again."""

    def check(name):
        raise CheckpointError(f"/home/me/{name}: the file is missing")

    served = serve_shelf(check=check)
    for _ in range(2):
        refused = exchange(served, request(CHAT, {**HI, "model": "b"}))
        assert refused.status == 500
        assert "/home/me" not in refused.error["message"]
    assert exchange(served, request(CHAT, {**HI, "model": "a"})).status == 200
    assert (shelf.open, shelf.loads) == (["a"], ["a"])
    assert str(served.reports[0]) == "/home/me/b: the file is missing"


@in_event_loop
async def test_an_option_that_a_model_cannot_use_is_no_fault_of_the_client(shelf):
    """A path in the server's configuration was told to a client, as the fault of its request."""
    models = models_of(shelf)
    shelf.errors.append(UsageError("/home/me/key: there is no key"))
    with pytest.raises(CheckpointError, match="there is no key"):
        async with models.use("b"):
            pass


def test_a_slow_reader_of_a_long_answer_keeps_nobody_from_another_model(serve_shelf, shelf):
    """No other model was loaded until all of the answer was sent."""
    served = serve_shelf()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", served.port))
        # With log probabilities an answer of 900 tokens fills every buffer on the way.
        given = {"stream": True, "logprobs": True, "top_logprobs": 3, "n": 16, "max_tokens": 0}
        slow.sendall(request(CHAT, asking("say:" + "a" * 900, model="a", **given)))
        for name in ("b", "a"):
            asked = asking("say:hi", model=name)
            assert exchange(served, request(CHAT, asked)).json["model"] == name
        data = b""
        while b"[DONE]" not in data[-100:]:
            data += slow.recv(65_536)
    assert data.count(b'"finish_reason":"stop"') == 16


def asking(text, **more):
    return {"messages": [{"role": "user", "content": text}], **more}


@in_event_loop
async def test_a_client_that_leaves_while_a_model_loads_leaves_no_second_model_open(shelf):
    """The next request began another load, and the first model was never closed."""
    models = models_of(shelf, sleep_after=0.05)
    leaving = await left_while_loading(models, shelf)
    staying = asyncio.ensure_future(models.use("a").__aenter__())
    await asyncio.sleep(0.02)
    shelf.may_load.set()
    await asyncio.wait([leaving, staying])
    assert (leaving.cancelled(), shelf.open) == (True, ["a"])


@in_event_loop
async def test_a_model_that_was_loaded_for_nobody_sleeps_too(shelf):
    models = models_of(shelf, sleep_after=0.05)
    leaving = await left_while_loading(models, shelf)
    shelf.may_load.set()
    await asyncio.wait([leaving])
    await until(lambda: (shelf.loads, shelf.open) == (["a", "b"], []))


@in_event_loop
async def test_the_servers_end_waits_for_a_model_that_is_being_unloaded(shelf):
    """Its KV caches may be written then."""
    models = models_of(shelf, sleep_after=0.01)
    async with models.use() as model:
        pass
    entered, may_close = threading.Event(), threading.Event()
    close = model.close
    model.close = lambda: (entered.set(), may_close.wait(PATIENCE_S))
    await until(entered.is_set)
    ending = asyncio.ensure_future(asyncio.to_thread(models.close))
    await asyncio.sleep(0.05)
    assert not ending.done()
    may_close.set()
    await ending
    close()


@in_event_loop
async def test_an_idle_model_is_unloaded_and_the_next_request_loads_it_again(shelf):
    models = models_of(shelf, sleep_after=0.05)
    models.await_sleep()
    await until(lambda: shelf.open == [])
    async with models.use() as model:
        assert model.name == "a"
        await asyncio.sleep(0.1)  # nobody takes it away from a running answer
        assert shelf.open == ["a"]
    await until(lambda: shelf.open == [])
    assert models.name == "a"
    assert shelf.loads == ["a", "a"]


@in_event_loop
async def test_a_model_is_unloaded_as_soon_as_its_answers_are_sent(shelf):
    models = models_of(shelf)
    async with models.use("a"):
        unloading = asyncio.ensure_future(models.unload("a"))
        await asyncio.sleep(0.02)
        async with models.use("a"):  # others are answered meanwhile
            assert shelf.open == ["a"]
    await unloading
    await models.unload("b")
    assert (shelf.open, models.is_loaded) == ([], False)
    async with models.use():
        assert shelf.open == ["a"]
    assert shelf.loads == ["a", "a"]


@pytest.mark.parametrize("client", ["chat", "generate"])
def test_ollamas_clients_load_and_unload_a_model_without_a_question(serve_shelf, shelf, client):
    """Open WebUI unloads so. The model wrote an answer to the empty prompt instead."""
    served = serve_shelf(sleep_after=600)
    with closing(ollama.Client(host=served.url)) as api:
        ask = getattr(api, client)
        for name, keep_alive, reason, loaded in [
            ("a", None, "load", ["a"]),
            ("a", 0, "unload", []),
            ("b", "0s", "unload", []),
            ("b:latest", "5m", "load", ["b"]),
        ]:
            answer = ask(name, keep_alive=keep_alive)
            assert (answer.done, answer.done_reason, shelf.open) == (True, reason, loaded)
        (model,) = api.ps().models
        left = model.expires_at - datetime.now(UTC)
    assert (model.model, 0 < left.total_seconds() <= 600) == ("b:latest", True)
    assert shelf.loads == ["a", "b"]


@pytest.mark.parametrize("path", ["/api/chat", "/api/show", "/api/pull"])
def test_a_body_is_read_outside_of_the_event_loop(served, monkeypatch, path):
    """A large one for /api/pull held up all answers."""
    read_bodies = []

    def read(body):
        read_bodies.append(json.loads(body))
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return read_bodies[-1]

    monkeypatch.setattr(bodies, "read_object", read)
    assert exchange(served, request(path, {"model": "scripted"})).status == 200
    assert read_bodies == [{"model": "scripted"}]


@in_event_loop
async def test_a_model_that_loads_while_the_server_ends_is_closed(shelf):
    models = models_of(shelf)
    shelf.may_load.clear()
    using = asyncio.ensure_future(models.use("b").__aenter__())
    await until(lambda: not models.is_loaded)
    models.close()
    shelf.may_load.set()
    with pytest.raises(ShuttingDownError):
        await using
    assert (shelf.open, shelf.loads) == ([], ["a", "b"])


def test_counts_go_on_over_a_change_of_model(serve_shelf, shelf):
    served = serve_shelf()
    for name in ("a", "b", "b"):
        body = {"model": name, "messages": [{"role": "user", "content": "say:hi"}]}
        response = exchange(served, request(CHAT, body))
        assert (response.status, response.json["model"]) == (200, name)
    assert b"mixchat_requests_finished_total 3" in exchange(served, request("/metrics")).body
    listed = exchange(served, request("/v1/models")).json["data"]
    assert [(model["id"], model["context_size"]) for model in listed] == [
        ("b", 40_000),
        ("a", 4000),
    ]


def test_an_alias_is_a_name_in_each_api(serve_shelf, shelf):
    served = serve_shelf(aliases={"gpt-4o": "b"})
    asked = {"model": "gpt-4o", "messages": [{"role": "user", "content": "say:hi"}]}
    for path, body in {
        CHAT: asked,
        "/v1/responses": {"model": "gpt-4o", "input": "say:hi"},
        "/v1/messages": asked | {"max_tokens": 5},
        "/api/chat": asked | {"stream": False},
        "/tokenize": {"model": "gpt-4o", "content": "a"},
        "/api/show": {"model": "gpt-4o:latest"},
        "/api/pull": {"model": "gpt-4o"},
        "/api/generate": {"model": "gpt-4o", "prompt": "", "keep_alive": 0},
    }.items():
        response = exchange(served, request(path, body))
        assert response.status == 200, response.body
    assert shelf.open == []
    tags = exchange(served, request("/api/tags")).json["models"]
    assert [model["name"] for model in tags] == ["b:latest", "a:latest", "gpt-4o:latest"]


def test_ollama_and_openai_show_what_is_known_of_a_model(serve_shelf, shelf):
    """Sizes were 0, times the present, and a digest that of the name."""
    modified = datetime(2026, 1, 2, tzinfo=UTC)
    facts = ModelFacts(4_500_000_000, 8_000_000_000, "nf4", "d" * 64, modified.timestamp(), "olmoe")
    served = serve_shelf(facts={"a": facts}.get, aliases={"gpt-4o": "a"})
    with closing(ollama.Client(host=served.url)) as client:
        listed = {model.model: model for model in client.list().models}
        for model in listed["a:latest"], listed["gpt-4o:latest"], client.ps().models[0]:
            assert (model.size, model.digest) == (4_500_000_000, "d" * 64)
            assert model.details.quantization_level == "nf4, 4.5 bits"
            assert (model.details.parameter_size, model.details.family) == ("8.0B", "olmoe")
        assert listed["a:latest"].modified_at == modified
        assert listed["b:latest"].size == 0  # nothing is known of it
        shown = client.show("a")
        assert shown.modelinfo == {
            "general.architecture": "olmoe",
            "olmoe.context_length": 4000,
            "general.parameter_count": 8_000_000_000,
        }
        assert shown.modified_at == modified
    loaded = exchange(served, request("/api/ps")).json["models"][0]
    assert loaded["context_length"] == 4000
    assert exchange(served, request("/v1/models/a")).json["created"] == modified.timestamp()


def test_tokens_are_those_of_the_model_that_the_request_names(serve_shelf, shelf):
    """The field was refused, so that a client could not count the tokens of its own model."""
    served = serve_shelf()
    tokens = exchange(served, request("/tokenize", {"model": "b", "content": "Hé"})).json
    assert (tokens, shelf.open) == ({"tokens": [72, 233]}, ["b"])
    text = exchange(served, request("/detokenize", {"model": "a", **tokens})).json
    assert (text, shelf.open) == ({"content": "Hé"}, ["a"])


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_may_be_as_long_as_the_model_that_it_names_can_take(serve_shelf, shelf, chunked):
    """The limit was the loaded model's, so that long prompts for another one were refused."""
    served = serve_shelf()
    for size, status in [(2_000_000, 200), (20_000_000, 413)]:
        asked = {"model": "b", "messages": [{"role": "user", "content": "say:hi"}]}
        body = json.dumps(asked | {"user": "x" * size}).encode()
        length, how = (None, "chunked") if chunked else (str(len(body)), None)
        data = request(CHAT, body, content_length=length, transfer_encoding=how)
        if chunked:
            data = data.replace(body, b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        with served.connect() as connection:
            with suppress(ConnectionError):  # it is refused before its end
                connection.sendall(data)
            assert read_response(connection).status == status


@in_event_loop
async def test_a_model_that_is_loaded_again_has_room_for_the_context_that_clients_were_told(
    monkeypatch,
):
    """With less free memory than at the start, its context could be a quarter of what it was."""
    asked = []

    def open_model(name, load, reporter, *, least_context, **options):
        asked.append(least_context(None))
        return scripted_model(name, context_size=3000)

    monkeypatch.setattr(serve_module, "open_model", open_model)
    options = serve_module.ServeOptions(
        host="",
        port=0,
        queue=4,
        origins=(),
        key=None,
        strict=False,
        shared_prefix=True,
        page=False,
        swap=False,
        sleep_after=None,
        keep_caches=False,
        drain=0.0,
        aliases={},
    )

    models = serve_module._served_models("a", LoadOptions(), options, None)
    await models.unload(models.name)
    async with models.use():
        models.close()

    assert asked == [0, 3000]
