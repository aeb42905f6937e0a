"""Kinds of requests that want much time or memory of a server, or that never take its answer."""

import contextlib
import json
import random
import socket
import time
from typing import Any

from hostile_request_kinds import CHAT, PATHS, Kind, Target, chat

from tests.serving.web.raw_http import Response, read_response, request

LARGE = 900_000  # bytes
FOREIGN_HOSTS = ("localhost:evil.example", "127.0.0.1:80:evil.example", "[::1]:1@evil.example")
FOREIGN_SITES = ("cross-site", "same-site", "", "x")


def long_paths(target: Target, rng: random.Random) -> Response:
    """A long name over many items, whose path grows with each level."""
    return target.send(request(rng.choice(PATHS), _long_path(rng)))


def long_paths_leaving(target: Target, rng: random.Random) -> Response:
    return target.leave(request(rng.choice(PATHS), _long_path(rng)), 0)


def many_values(target: Target, rng: random.Random) -> Response:
    """A body of values that take many times its bytes when they are parsed."""
    return target.send(request(rng.choice(PATHS), _many_values(rng)))


def many_values_leaving(target: Target, rng: random.Random) -> Response:
    return target.leave(request(rng.choice(PATHS), _many_values(rng)), rng.random() / 4)


def shared_texts(target: Target, rng: random.Random) -> Response:
    """Texts that are joined, or that many messages share."""
    path, body = rng.choice([_questions, _thinking, _calls])(rng)
    return target.send(request(path, body, connection="close"))


def tiny_chunks(target: Target, rng: random.Random) -> Response:
    size = rng.choice([1, 2, 20])
    head = request(CHAT, b"", content_length=None, transfer_encoding="chunked")
    return target.send(head, (b"%x\r\n%s\r\n" % (size, b"x" * size)) * 200_000)


def half_closed(target: Target, rng: random.Random) -> Response:
    """A client that sends no more, as `nc -N` does, with a whole request or a part of one."""
    data = request(CHAT, chat("say:we{wait}{wait}ll"))
    data = data[: rng.choice([len(data), len(data), rng.randrange(len(data))])]
    with target.connect() as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while (response := read_response(connection)).status == 102:
            pass
        return response


def slow_reader(target: Target, rng: random.Random) -> Response:
    """A client that takes a long answer slowly, and leaves in its midst."""
    given = {"stream": True, "logprobs": True, "top_logprobs": 3, "n": 8, "max_tokens": 0}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", target.port))
        connection.sendall(request(CHAT, chat("say:" + "a" * 900, **given)))
        with contextlib.suppress(TimeoutError):
            for _ in range(rng.randrange(100)):
                connection.recv(1000)
                time.sleep(0.05)
    raise ConnectionResetError


def foreign_page(target: Target, rng: random.Random) -> Response:
    """A request that a page of another site makes."""
    host, site = rng.choice([(rng.choice(FOREIGN_HOSTS), None), (None, rng.choice(FOREIGN_SITES))])
    given = {"host": host or "localhost", "sec_fetch_site": site}
    given |= {"sec_fetch_mode": "no-cors", "sec_fetch_dest": rng.choice(["image", "empty"])}
    body = rng.choice([None, chat()])
    response = target.send(request("/v1/models" if body is None else CHAT, body, **given))
    assert response.status == 403, response
    return response


def _long_path(rng: random.Random) -> bytes:
    name = b"a" * rng.choice([LARGE // 2, LARGE // 10])
    item = rng.choice([b"0", b'"a"', b"[]", b'{"b":0}'])
    inner = b"[" + b",".join([item] * ((LARGE - len(name)) // (len(item) + 1))) + b"]"
    body = b'{"%s":%s}' % (name, inner)
    if rng.random() < 0.7:
        return body
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": body.decode()}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "a", "content": "r"}
    return json.dumps(chat(messages=[*chat()["messages"], said, result])).encode()


def _many_values(rng: random.Random) -> bytes:
    item = rng.choice([b"[]", b"{}", b'{"":0}', b"[[[[[]]]]]", b'""', b"0", b"1.5"])
    many = b"[" + b",".join([item] * (LARGE // (len(item) + 1))) + b"]"
    return json.dumps(chat()).encode()[:-1] + b',"metadata":{"x":%s}}' % many


def _questions(rng: random.Random) -> tuple[str, Any]:
    count = rng.choice([100, 9_999])
    question = {"role": rng.choice(["user", "system"]), "content": "x" * (LARGE // count - 40)}
    path = rng.choice([CHAT, "/v1/messages", "/v1/messages/count_tokens", "/api/chat"])
    return path, chat(messages=[question] * count + chat()["messages"])


def _thinking(rng: random.Random) -> tuple[str, Any]:
    """Thinking before many calls, each of whose messages has all of it."""
    thought = {"type": "reasoning", "content": [{"text": "x" * (LARGE // 2)}]}
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    said = [call, {"role": "assistant", "content": "y"}] * rng.choice([10, 3000])
    result = {"type": "function_call_output", "call_id": "a", "output": "r"}
    return "/v1/responses", {"input": [*chat()["messages"], thought, *said, call, result]}


def _calls(rng: random.Random) -> tuple[str, Any]:
    calls = [{"function": {"name": f"f{i}", "arguments": {}}} for i in range(8000)]
    results = [{"role": "tool", "tool_name": f"f{i}", "content": ""} for i in range(7999, 0, -1)]
    said = {"role": "assistant", "tool_calls": calls[: rng.choice([100, 8000])]}
    return "/api/chat", {"messages": [*chat()["messages"], said, *results]}


BODY_KINDS: dict[str, tuple[Kind, int]] = {
    "long paths": (long_paths, 40),
    "the same, and clients that do not wait": (long_paths_leaving, 60),
    "many values": (many_values, 60),
    "the same, and clients that leave in between": (many_values_leaving, 60),
    "texts that are joined or shared": (shared_texts, 40),
    "tiny chunks": (tiny_chunks, 24),
    "clients that send no more": (half_closed, 60),
    "slow readers": (slow_reader, 24),
    "pages of other sites": (foreign_page, 60),
}
