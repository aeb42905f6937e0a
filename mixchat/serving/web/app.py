"""The routes."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixchat.base.context import Context
from mixchat.base.errors import MixchatError
from mixchat.base.progress import Note
from mixchat.face.model import Model
from mixchat.serving.requests.chat import read_chat
from mixchat.serving.requests.errors import RequestError, as_request_error, field_error, plain
from mixchat.serving.requests.fields import JSON, RequestObject, to_json, validated
from mixchat.serving.requests.openai import read_completion, token_ids
from mixchat.serving.requests.shared import APIRequest, check_model
from mixchat.serving.web import anthropic, ollama
from mixchat.serving.web.access import IGNORED, Access, error_response, guarded
from mixchat.serving.web.answers import PendingAnswers, WholeAnswer, while_connected
from mixchat.serving.web.bodies import (
    Body,
    RequestMemory,
    WorkTurns,
    body_budget,
    in_thread,
    with_share,
)
from mixchat.serving.web.openai_responses import ResponsesResponses, read_responses
from mixchat.serving.web.page import page_routes
from mixchat.serving.web.request_log import TOKENS, logged
from mixchat.serving.web.responses import (
    CONTENT_TYPE,
    ChatResponses,
    CompletionResponses,
    ResponseBuilder,
    to_prometheus,
)
from mixchat.serving.web.served_models import ServedModels

_MAX_BODY_EXTRA = 1_000_000  # bytes of a body besides its prompt
_MAX_IGNORED = 20  # fields that a response names
_MAX_NOTED = 100  # names
_PER_TOKEN = 40  # bytes of a prompt's token
_CHAT_PATH = "/v1/chat/completions"
_EMBEDDING_PATHS = ("/v1/embeddings", "/api/embed", "/api/embeddings")
_CLIENT_LEFT = 499  # nginx's status for a client that has gone, so nobody reads it

Endpoint = Callable[["AppState", Request], Coroutine[Any, Any, ASGIApp]]
BodyEndpoint = Callable[["AppState", Request, Body], Coroutine[Any, Any, ASGIApp]]
ModelEndpoint = Callable[["AppState", Request, Model, Body], Awaitable[ASGIApp]]
_Fields = TypeVar("_Fields", bound=RequestObject)
Read = Callable[[JSON, Model, bool, ExitStack], APIRequest]

# The reader of a request, and the builder of its response.
_APIS: dict[str, tuple[Read, type[ResponseBuilder]]] = {
    _CHAT_PATH: (read_chat, ChatResponses),
    "/v1/completions": (read_completion, CompletionResponses),
    "/v1/responses": (read_responses, ResponsesResponses),
    anthropic.PATH: (anthropic.read_messages, anthropic.AnthropicResponses),
    "/api/chat": (ollama.read_ollama_chat, ollama.OllamaResponses),
    "/api/generate": (ollama.read_generate, ollama.GenerateResponses),
}


@dataclass
class AppState:
    """The objects that routes share.

    report: gets mixchat's own faults. note: gets a line for each field without an effect, once.
    strict: refuse other servers' fields. budget: bytes that requests may hold.
    """

    models: ServedModels
    report: Callable[[Exception], object]
    note: Note
    strict: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    budget: RequestMemory = field(default_factory=lambda: RequestMemory(body_budget()))

    def __post_init__(self) -> None:
        self._noted = set[str]()
        self.turns = WorkTurns()

    def note_ignored(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._noted and len(self._noted) < _MAX_NOTED:
                self._noted.add(name)
                self.note(f"requests have the field {name}, which has no effect here")

    def explain(self, error: Exception) -> RequestError:
        """Return the client's error, and report a fault of mixchat."""
        explained = as_request_error(error)
        if explained.status == 500:
            self.report(error)
        return explained


def create_app(
    state: AppState, access: Access, *, page: bool = True, log: Note | None = None
) -> ASGIApp:
    """Return the application of ASGI, with the page at `/` if `page`.

    log: gets a line for each request.
    """

    def failed(request: Request, error: Exception) -> Response:
        return error_response(state.explain(error), request.url.path)

    # Whatever a route does ends when its client leaves.
    def get(path: str, endpoint: Endpoint) -> Route:
        async def answer(request: Request) -> ASGIApp:
            return await while_connected(request.receive, endpoint(state, request))

        return Route(path, answer, methods=["GET"])

    def post(path: str, endpoint: BodyEndpoint) -> Route:
        async def answer(request: Request) -> ASGIApp:
            body = await _body(state, request)
            return await while_connected(request.receive, endpoint(state, request, body))

        return Route(path, answer, methods=["POST"])

    def model_post(path: str, endpoint: ModelEndpoint) -> Route:
        return post(path, partial(_with_model, endpoint=endpoint))

    app = Starlette(
        routes=[
            *(model_post(path, partial(_answer, api=api)) for path, api in _APIS.items()),
            model_post(f"{anthropic.PATH}/count_tokens", _count_tokens),
            model_post("/tokenize", _tokenize),
            model_post("/detokenize", _detokenize),
            get("/api/tags", _ollama_models),
            get("/api/ps", _ollama_loaded),
            post("/api/show", _ollama_model),
            get("/api/version", _ollama_version),
            post("/api/pull", _ollama_pull),
            get("/v1/models", _models),
            get("/v1/models/{name:path}", _model),
            get("/health", _health),
            get("/metrics", _metrics),
            *(page_routes() if page else ()),
        ],
        exception_handlers={
            HTTPException: _no_such_route,
            ClientDisconnect: lambda request, error: Response(status_code=_CLIENT_LEFT),
            RequestError: failed,
            MixchatError: failed,
            Exception: failed,
        },
    )
    app.router.redirect_slashes = False
    whole = _with_headers(guarded(with_share(app, state.budget), access))
    return whole if log is None else logged(whole, log)


async def _with_model(
    state: AppState, request: Request, body: Body, *, endpoint: ModelEndpoint
) -> ASGIApp:
    """Call `endpoint` when the request has its model, which it uses until all is computed."""
    path, fields = request.url.path, await body.parse()
    if ollama.asks_nothing(path, fields):
        return await _load_or_unload(state, path, fields)
    with ExitStack() as using:
        model = await state.models.take(fields.get("model"), using)
        response = await endpoint(state, request, model, body)
        if isinstance(response, PendingAnswers):
            response.when_computed(using.pop_all().close)
        return response


async def _answer(
    state: AppState,
    request: Request,
    model: Model,
    body: Body,
    *,
    api: tuple[Read, type[ResponseBuilder]],
) -> ASGIApp:
    read, builder = api
    share = request.state.share
    asked = await _read(state, request, model, body, read)
    # Tools and forms are parts of the body that live as long as the answer.
    if not body.has_form:
        body.drop()
    share.grow(sum(len(prompt.ids) for prompt in asked.prompts) * _PER_TOKEN)
    responses = builder(asked, model)
    answers = PendingAnswers(model, asked, share, responses, state.explain)
    request.scope["state"][TOKENS] = answers.count_tokens
    with ExitStack() as at_end:
        at_end.callback(answers.end)
        await in_thread(answers.submit)
        if asked.stream:
            at_end.pop_all()
            return answers
        whole = await answers.collect()
        data = await in_thread(lambda: to_json(responses.whole(whole)))
    return WholeAnswer(data, share)


async def _count_tokens(state: AppState, request: Request, model: Model, body: Body) -> ASGIApp:
    asked = await _read(state, request, model, body, anthropic.read_counted)
    return _json({"input_tokens": len(asked.prompts[0].ids)})


async def _read(
    state: AppState, request: Request, model: Model, body: Body, read: Read
) -> APIRequest:
    """Check a body's fields and make its prompts. Note what has no effect."""
    with ExitStack() as at_end:
        asked = await body.read(lambda fields: read(fields, model, state.strict, at_end), at_end)
    # A client chose the names, so they are short ASCII.
    request.state.ignored = list(map(plain, asked.ignored[:_MAX_IGNORED]))
    state.note_ignored(request.state.ignored)
    return replace(asked, ignored=())


async def _ollama_models(state: AppState, request: Request) -> Response:
    facts = await state.models.facts(await state.models.contexts())
    return _json({"models": [ollama.model_entry(*item) for item in facts.items()]})


async def _ollama_loaded(state: AppState, request: Request) -> Response:
    names = [state.models.name] if state.models.is_loaded else []
    facts = await state.models.facts(names)
    context = state.models.context
    return _json(ollama.loaded_list(facts, context, state.models.idle_s))


async def _ollama_model(state: AppState, request: Request, body: Body) -> Response:
    fields, contexts = await body.parse(), await state.models.contexts()
    name = ollama.named(fields, contexts)
    facts = (await state.models.facts([name]))[name]
    return _json(ollama.describe(name, contexts[name], facts, thinks=state.models.thinks(name)))


async def _ollama_pull(state: AppState, request: Request, body: Body) -> Response:
    """Answer that a model is here. Agents pull a model that is listed as NAME:latest."""
    ollama.named(await body.parse(), await state.models.contexts())
    line = to_json({"status": "success"}) + b"\n"  # Codex waits for the line's end
    return Response(line, media_type=ollama.OllamaResponses.content_type)


async def _load_or_unload(state: AppState, path: str, body: JSON) -> Response:
    name = ollama.named(body, await state.models.contexts())
    if body.get("keep_alive") in ollama.NO_TIME:
        await state.models.unload(name)
        return _json(ollama.empty_answer(path, name, "unload"))
    async with state.models.use(name):
        return _json(ollama.empty_answer(path, name, "load"))


async def _ollama_version(state: AppState, request: Request) -> Response:
    return _json({"version": ollama.API_VERSION})


async def _models(state: AppState, request: Request) -> Response:
    contexts = await state.models.contexts()
    models = [await _model_object(state, *item) for item in contexts.items()]
    return _json({"object": "list", "data": models})


async def _model(state: AppState, request: Request) -> Response:
    name, contexts = request.path_params["name"], await state.models.contexts()
    if name not in contexts:
        message = f"there is no such model here; this server has {', '.join(map(repr, contexts))}"
        raise RequestError(message, status=404, param="model", code="model_not_found")
    return _json(await _model_object(state, name, contexts[name]))


async def _model_object(state: AppState, name: str, context: Context) -> JSON:
    facts = (await state.models.facts([name]))[name]
    created = state.created if facts is None else int(facts.modified)
    model = {"id": name, "object": "model", "created": created, "owned_by": "mixchat"}
    return {**model, "context_size": context.tokens}


async def _health(state: AppState, request: Request) -> Response:
    return _json({"status": "ok"})


async def _metrics(state: AppState, request: Request) -> Response:
    return Response(to_prometheus(state.models.stats()), media_type=CONTENT_TYPE)


def _read_for(model: Model, fields: type[_Fields], body: JSON) -> _Fields:
    check_model(body.get("model"), model.name)
    return validated(fields, body)


async def _converted(request: Request, body: Body, convert: Callable[[JSON], bytes]) -> Response:
    data = await body.read(convert)
    body.drop()
    return WholeAnswer(data, request.state.share)


class _TokenizeFields(RequestObject):
    ignored = ("model",)
    content: str
    add_special: bool = False


async def _tokenize(state: AppState, request: Request, model: Model, body: Body) -> Response:
    def encoded(fields: JSON) -> bytes:
        text = _read_for(model, _TokenizeFields, fields)
        tokenizer = model.tokenizer
        model.context.check_text(text.content, "content")
        bos = [] if tokenizer.bos_id is None or not text.add_special else [tokenizer.bos_id]
        return to_json({"tokens": bos + tokenizer.encode(text.content)})

    return await _converted(request, body, encoded)


class _DetokenizeFields(RequestObject):
    ignored = ("model",)
    tokens: list[Any]


async def _detokenize(state: AppState, request: Request, model: Model, body: Body) -> Response:
    def decoded(fields: JSON) -> bytes:
        items = _read_for(model, _DetokenizeFields, fields).tokens
        limit = model.context.largest
        tokenizer = model.tokenizer
        if len(items) > limit:
            raise field_error("tokens", f"has {len(items)} items; at most {limit} are taken")
        ids = token_ids(items, tokenizer.vocab_size, "tokens")
        return to_json({"content": tokenizer.decode(ids)})

    return await _converted(request, body, decoded)


async def _body(state: AppState, request: Request) -> Body:
    """Return the body. Refuse one that no model can take before all of it is read."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError("the body is compressed: send it as it is", status=415)
    size = int(request.headers.get("content-length", "0"))
    body = bytearray()
    longest = state.models.context.longest_text
    if not size or size > longest:  # the model that it names may take more than the loaded one
        contexts = await state.models.contexts()
        longest = max(context.longest_text for context in contexts.values())
    limit = longest + _MAX_BODY_EXTRA
    if size <= limit:
        share = request.state.share
        async for piece in request.stream():
            share.grow(len(piece))
            body += piece
            if len(body) > limit:
                break
        else:
            return Body(bytes(body), share, state.turns, state.models.resolve)
    message = f"the body is too large: this server reads {limit} bytes at most"
    raise RequestError(message, status=413, code="request_too_large")


def _json(value: object) -> Response:
    return Response(to_json(value), media_type="application/json")


def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path!a:.80}: {error.detail.lower()}"
    if request.url.path in _EMBEDDING_PATHS:
        message = (
            "this server makes no embeddings: use ollama, llama.cpp's server or "
            "sentence-transformers with an embedding model"
        )
    elif error.status_code == 404:
        message += f"; this server answers chats at {_CHAT_PATH}"
    refused = RequestError(message, status=error.status_code, headers=error.headers)
    return error_response(refused, request.url.path)


def _with_headers(app: ASGIApp) -> ASGIApp:
    """Return `app`, whose responses have an ID, are not cached, and name fields without an effect.

    A client's own ID could forge a line in a log.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = f"req_{secrets.token_hex(12)}"
                headers["cache-control"] = "no-cache"
                if ignored := scope.get("state", {}).get("ignored"):
                    headers[IGNORED] = ", ".join(ignored)
            await send(message)

        # Starlette raises an error again that was answered and reported.
        with suppress(Exception):
            await app(scope, receive, send_with_headers)

    return answer
