"""The kinds of hostile requests: each sends one to a server, and returns the response."""

import contextlib
import random
import socket
import time
from collections.abc import Callable
from typing import Any

import rig  # noqa: F401 - it lets the tests' modules be found
from form_bombs import bomb, late_bomb
from hostile_api_bodies import APIS, ODD, changed

from tests.serving.web.raw_http import Response, read_response, request

HANG = 300.0  # seconds, since a busy machine takes long for hundreds of requests
LARGE = 100_000_000  # bytes
CHAT = "/v1/chat/completions"
PATHS = (CHAT, "/v1/completions", "/tokenize", "/detokenize", *APIS, "/api/show", "/api/pull")


class Target:
    """The server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=HANG)

    def send(self, *pieces: bytes) -> Response:
        with self.connect() as connection:
            with contextlib.suppress(ConnectionError):  # it may have answered before the end
                for piece in pieces:
                    connection.sendall(piece)
            return read_response(connection)

    def leave(self, data: bytes, after: float) -> Response:
        """Send data, wait some seconds, and leave without an answer: `ConnectionResetError`."""
        with self.connect() as connection:
            connection.sendall(data)
            time.sleep(after)
        raise ConnectionResetError


Kind = Callable[[Target, random.Random], Response]


def chat(content: Any = "Hi", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 3} | more


def large_body(target: Target, rng: random.Random) -> Response:
    piece = rng.choice([b" ", b"[", b"a", b"\xff"]) * 1_000_000
    head = request(CHAT, b"", content_length=str(LARGE))
    return target.send(head, *[piece] * (LARGE // len(piece)))


def large_chunks(target: Target, rng: random.Random) -> Response:
    head = request(CHAT, b"", content_length=None, transfer_encoding="chunked")
    piece = b"100000\r\n" + rng.choice([b" ", b"{"]) * 0x100000 + b"\r\n"
    return target.send(head, *[piece] * (LARGE // len(piece)), b"0\r\n\r\n")


def deep(target: Target, rng: random.Random) -> Response:
    depth = rng.choice([65, 1000, 100_000, 500_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
    core = opening * depth + (b"1" + closing * depth if rng.random() < 0.5 else b"")
    inner = rng.choice([core, b'{"messages":' + core + b"}", b'{"metadata":' + core + b"}"])
    return target.send(request(rng.choice(PATHS), inner))


SHORT: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "Hi", "max_output_tokens": 3},
    "/v1/messages": chat(),
    "/v1/messages/count_tokens": {"messages": chat()["messages"]},
    "/api/chat": {"messages": chat()["messages"], "options": {"num_predict": 3}},
    "/api/generate": {"prompt": "Hi", "options": {"num_predict": 3}},
}
FIELDS = (
    *("model", "messages", "prompt", "stream", "stream_options", "n", "stop", "seed", "max_tokens"),
    *("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "logprobs", "top_logprobs"),
    *("logit_bias", "response_format", "presence_penalty", "frequency_penalty", "echo", "best_of"),
    *("tools", "user", "store", "content", "tokens", "unknown"),
)


def wrong_type(target: Target, rng: random.Random) -> Response:
    path = rng.choice(PATHS)
    known = {CHAT: chat(), PATHS[1]: {"prompt": "Hi", "max_tokens": 3}, **SHORT}
    body = dict(known.get(path, {}))
    for _ in range(rng.randint(1, 3)):
        body[rng.choice(FIELDS)] = rng.choice(ODD)
    return target.send(request(path, body))


def wrong_message(target: Target, rng: random.Random) -> Response:
    part = {"type": rng.choice(["text", "image_url", 5]), "text": rng.choice(ODD)}
    content = rng.choice([*ODD, [part], [part] * 2000])
    message = {"role": rng.choice(["user", "tool", *ODD[:6]]), "content": content}
    return target.send(request(CHAT, chat(messages=[message] * rng.choice([1, 2, 20_000]))))


def no_json(target: Target, rng: random.Random) -> Response:
    values = [b"NaN", b"-Infinity", b"1e999", b"9" * 9999, b'"\\ud800"', b'"\\udc00x"', b"01", b"'"]
    bodies = [b'{"temperature": %s}', b'{"user": %s}', b'{"n": 1, "n": %s}', b'{"a": %s', b"%s"]
    body = rng.choice(bodies) % rng.choice(values)
    return target.send(request(rng.choice(PATHS), rng.choice([body, rng.randbytes(200)])))


def no_http(target: Target, rng: random.Random) -> Response:
    good = bytearray(request(rng.choice(PATHS), chat()))
    for _ in range(rng.randint(1, 8)):
        good[rng.randrange(60)] = rng.randrange(256)
    return target.send(rng.choice([bytes(good) + b"\r\n\r\n", rng.randbytes(400) + b"\r\n\r\n"]))


def injection(target: Target, rng: random.Random) -> Response:
    evil = rng.choice(["a\r\nx-evil: 1", "a\nx-evil: 1", "\x1b[31m", "a\x00b", "%0d%0ax-evil:1"])
    name = rng.choice(["x_request_id", "origin", "authorization", "user_agent", "content_type"])
    data = rng.choice(
        [
            request(CHAT, chat(), **{name: evil}),
            request(f"/v1/models/{evil}"),
            request(CHAT, chat(model=evil)),
            request(CHAT, chat(**{evil: 1})),
            request("/health", host=evil),
        ]
    )
    response = target.send(data)
    assert not any("evil" in name for name in response.headers), response
    return response


def smuggling(target: Target, rng: random.Random) -> Response:
    both = {"content_length": "5", "transfer_encoding": rng.choice(["chunked", "xchunked", "gzip"])}
    more = rng.choice(
        [both, {"content_length": "+5"}, {"content_length": "5, 6"}, {"te": "x" * 70_000}]
    )
    return target.send(request(CHAT, b"0\r\n\r\nGET /x HTTP/1.1\r\n\r\n", **more))


def slow(target: Target, rng: random.Random) -> Response:
    data = request(CHAT, chat())
    with target.connect() as connection:
        start = rng.choice([1, 20, len(data) - 20])
        connection.sendall(data[:start])
        with contextlib.suppress(ConnectionError):
            for byte in data[start : start + 15]:
                connection.sendall(bytes([byte]))
                time.sleep(1)
        return read_response(connection)


def api(target: Target, rng: random.Random) -> Response:
    """A body of one of the other APIs, of which a few parts are changed."""
    path, body = changed(rng)
    return target.send(request(path, body, connection="close"))


def api_with_forms(target: Target, rng: random.Random) -> Response:
    path, body = changed(rng, forms=True)
    return target.send(request(path, body, connection="close"))


def leaving(target: Target, rng: random.Random) -> Response:
    path, stream, text = rng.choice([CHAT, *SHORT]), rng.random() < 0.5, "x " * 200
    body = chat(text, stream=stream, n=4, max_tokens=200)
    if path in SHORT:
        body = SHORT[path] | {"stream": stream}
        body |= {name: text for name in ("input", "prompt") if name in body}
    data = request(path, body)
    return target.leave(data[: rng.choice([len(data) // 2, len(data)])], rng.random() / 4)


def greedy(target: Target, rng: random.Random) -> Response:
    bodies = [
        chat("x" * rng.choice([1_000_000, 1_400_000])),
        chat("\U0001f600" * 100_000),
        chat(" " * 400_000 + "\u0300" * 100_000),
        chat(logit_bias={str(i): 1 for i in range(60_000)}),
        chat(stop=["x" * 500] * 33),
        chat(n=17),
        chat(n=10**9),
        chat(max_tokens=10**18),
        {"prompt": [[1] * 30_000] * 16},
        {"prompt": ["x" * 60_000] * 17},
        {"tokens": list(range(8000)) * 40},
        {"content": "ab" * 500_000},
    ]
    body = rng.choice(bodies)
    path = PATHS[1] if "prompt" in body else "/detokenize" if "tokens" in body else CHAT
    return target.send(request("/tokenize" if "content" in body else path, body))


def schemas() -> list[dict[str, Any]]:
    """Return schemas that would take long to compile, or whose answers could not end."""
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(28):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    return [
        deep,
        {"$ref": "#"},
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "string", "pattern": "((a{0,100}){0,100}){0,100}"},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
        {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
        {"type": "integer", "multipleOf": 999999937},
        {"properties": {f"p{i}": {"type": "integer", "minimum": i} for i in range(5000)}},
        {"enum": [f"value {i}" for i in range(20_000)]},
        {"allOf": [{"anyOf": [{"const": j} for j in range(3)]} for _ in range(12)]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ]


def schema(target: Target, rng: random.Random) -> Response:
    return target.send(request(CHAT, chat(response_format=by_schema(rng.choice(schemas())))))


def chain(length: int) -> dict[str, Any]:
    """Return a schema of references, each to the next one, which can overflow a stack."""
    parts = {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**parts, f"d{length}": {}}}


def bombs() -> list[dict[str, Any]]:
    """Return schemas that take gigabytes when they are compiled."""
    keys = {"type": "object", "patternProperties": {f"a.{{{n}}}b": {} for n in range(1, 31)}}
    return [bomb(), bomb("(a|b).{%d}c"), keys]


def by_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def gigabytes(rng: random.Random) -> dict[str, Any]:
    """A body whose schema takes gigabytes, when it is compiled or behind the answer's beginning."""
    early = chat(response_format=by_schema(rng.choice([*bombs(), chain(3000)])))
    late = chat(response_format=by_schema(late_bomb()))
    late["messages"].append({"role": "assistant", "content": '"x'})
    return rng.choice([early, late])


def schema_bomb(target: Target, rng: random.Random) -> Response:
    return target.send(request(CHAT, gigabytes(rng)))


def schema_bomb_leaving(target: Target, rng: random.Random) -> Response:
    return target.leave(request(CHAT, gigabytes(rng)), rng.random())


def foreign(target: Target, rng: random.Random) -> Response:
    """Fields of other servers, with values that no server has."""
    names = ("think", "options", "keep_alive", "reasoning_effort", "repetition_penalty", "tools")
    return target.send(request(CHAT, chat(**{rng.choice(names): rng.choice(ODD)})))


KINDS: dict[str, tuple[Kind, int]] = {
    "100 MB, its length declared": (large_body, 6),
    "100 MB in chunks": (large_chunks, 6),
    "deep JSON": (deep, 60),
    "wrong types": (wrong_type, 200),
    "wrong messages": (wrong_message, 60),
    "other APIs, changed bodies": (api, 400),
    "the same with tools and schemas": (api_with_forms, 200),
    "no JSON": (no_json, 80),
    "no HTTP": (no_http, 80),
    "header injection": (injection, 60),
    "request smuggling": (smuggling, 40),
    "slow senders": (slow, 24),
    "clients that leave": (leaving, 60),
    "asking for too much": (greedy, 60),
    "fields of other servers": (foreign, 60),
    "hostile schemas": (schema, 40),
    "schemas that take gigabytes": (schema_bomb, 20),
    "the same, and clients that leave": (schema_bomb_leaving, 20),
}
