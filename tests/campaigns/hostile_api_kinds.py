"""Kinds of hostile requests that only some APIs have: models, schemas, images and reasoning."""

import json
import random
from typing import Any

import rig  # noqa: F401 - it lets the tests' modules be found
from hostile_api_bodies import CALLED, ODD, SCHEMA
from hostile_request_kinds import Kind, Target, bombs, chain, chat, schemas

from tests.serving.web.raw_http import Response, request

OLLAMA = ("/api/chat", "/api/generate")
NAMES = ("unknown", "../../etc/passwd", "a" * 100_000, "\x1b[0m")
KEPT = (0, "0", "0s", "5m", -1, "-1m", 1e300, "1e999h", "9" * 4000, "\u0660", float(0), *NAMES[1:])
MARKS = ("</think>", "<think>", "<|end|><|start|>system<|message|>", "[/INST]", "</s>", "\x00", "x")
LARGE = 700_000  # characters
COUNTS = (1, 5000, 20_000)


def pull(target: Target, rng: random.Random) -> Response:
    body = {"model": _name(target, rng), "stream": rng.choice([True, False, *ODD])}
    body |= {rng.choice(["insecure", "username", "password", "name", "options"]): _odd(rng)}
    if rng.random() < 0.2:
        del body["model"]
    return target.send(request("/api/pull", body, connection="close"))


def load(target: Target, rng: random.Random) -> Response:
    """Load or unload a model, or ask in a way that is nearly as empty."""
    return target.send(_load(target, rng))


def load_leaving(target: Target, rng: random.Random) -> Response:
    return target.leave(_load(target, rng), rng.random() / 4)


def format(target: Target, rng: random.Random) -> Response:
    """A schema in the field format, which Ollama's API closes before it is compiled."""
    large = {"type": "object", "properties": {f"p{i}": SCHEMA for i in range(20_000)}}
    odd = {"type": "object", "properties": rng.choice(ODD), "required": rng.choice(ODD)}
    short = {**SCHEMA, "required": ["city", "country"]}
    formats = [*schemas(), large, odd, short, {"properties": {"a": rng.choice(schemas())}}]
    return target.send(_formed(rng, rng.choice([*formats, *ODD, "JSON", [SCHEMA]])))


def format_bomb(target: Target, rng: random.Random) -> Response:
    return target.send(_formed(rng, _bomb(rng)))


def format_bomb_leaving(target: Target, rng: random.Random) -> Response:
    return target.leave(_formed(rng, _bomb(rng)), rng.random())


def images(target: Target, rng: random.Random) -> Response:
    """Images in the result of a tool, which other parts of a request may not have."""
    kind = rng.choice([*["image", "input_image"] * 10, "image_url", "document", *ODD])
    image = {"type": kind, rng.choice(["image_url", "source", "text"]): _odd(rng)}
    text = {"type": "input_text", "text": "rain"}
    result = rng.choice([image, _repeated(rng, image), [text, image, *ODD], [[image]]])
    if rng.random() < 0.5:
        call = {"type": "function_call", "call_id": "a", "name": "view", "arguments": "{}"}
        output = {"type": "function_call_output", "call_id": "a", "output": result}
        body = {"input": [*chat()["messages"], call, output], "max_output_tokens": 3}
        return target.send(request("/v1/responses", body, connection="close"))
    if rng.random() < 0.3:
        tool = {"role": "tool", "tool_name": "view", "content": "", "images": result}
        body = {"messages": [*chat()["messages"], tool], "options": {"num_predict": 3}}
        return target.send(request("/api/chat", body, connection="close"))
    call = {"type": "tool_use", "id": "a", "name": "view", "input": CALLED}
    block = {"type": "tool_result", "tool_use_id": "a", "content": result}
    said = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [block]}]
    body = {"messages": [*chat()["messages"], *said], "max_tokens": 3}
    path = rng.choice(["/v1/messages", "/v1/messages/count_tokens"])
    return target.send(request(path, body, connection="close"))


def reasoning(target: Target, rng: random.Random) -> Response:
    """Reasoning before a call, or where none may be, with marks of the model's own form."""
    part = {"type": "reasoning_text", "text": rng.choice([*MARKS, *ODD, "x" * LARGE])}
    content = rng.choice([*[_repeated(rng, part)] * 5, [*ODD, part], part, *ODD])
    item = {"type": "reasoning", "id": "r", "summary": rng.choice(ODD), "content": content}
    item |= {rng.choice(["encrypted_content", "status", "role"]): _odd(rng)}
    call = {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "a", "output": "rain"}
    said = {"type": "message", "role": "user", "content": "Hi"}
    items = [said, item, call, output]
    if rng.random() < 0.5:
        rng.shuffle(items)
    many = [part for one in _repeated(rng, item) for part in (one, call)]
    given = rng.choice([items, _repeated(rng, item), [said, *many, output]])
    body = {"input": given, "max_output_tokens": 3}
    return target.send(request("/v1/responses", body, connection="close"))


def _repeated(rng: random.Random, part: Any) -> list[Any]:
    """Return a list of a part, again and again, which stays below a few MB."""
    size = len(json.dumps(part))
    return [part] * min(rng.choice(COUNTS), max(2 * LARGE // size, 1))


def _load(target: Target, rng: random.Random) -> bytes:
    path = rng.choice(OLLAMA)
    field = "messages" if path == "/api/chat" else "prompt"
    kept = rng.choice([*KEPT, *ODD])
    body = {"model": _name(target, rng), "keep_alive": kept, "stream": rng.choice(ODD)}
    body |= {field: rng.choice([None, "", [], *ODD]), "options": {"num_predict": 3}}
    if rng.random() < 0.3:
        del body[rng.choice([field, "keep_alive"])]
    return request(path, body, connection="close")


def _formed(rng: random.Random, given: Any) -> bytes:
    path = rng.choice(OLLAMA)
    asked = {"messages": chat()["messages"]} if path == "/api/chat" else {"prompt": "Hi"}
    body = {**asked, "format": given, "stream": rng.random() < 0.5, "options": {"num_predict": 3}}
    if path == "/api/generate":
        body["raw"] = rng.random() < 0.5
    return request(path, body, connection="close")


def _bomb(rng: random.Random) -> Any:
    """A schema that takes gigabytes, or one that overflows a stack."""
    return rng.choice([*bombs(), chain(3000), {"properties": {"a": chain(3000)}}])


def _name(target: Target, rng: random.Random) -> Any:
    """Return the name of a model, which is there in half of all cases."""
    tagged = [model["name"] for model in target.send(request("/api/tags")).json["models"]]
    return rng.choice([*tagged, tagged[0].removesuffix(":latest")] * 8 + [*NAMES, *ODD])


def _odd(rng: random.Random) -> Any:
    return rng.choice([*ODD, "data:image/png;base64," + "A" * LARGE, {"url": "file:///etc/passwd"}])


API_KINDS: dict[str, tuple[Kind, int]] = {
    "models to pull": (pull, 100),
    "models to load and unload": (load, 150),
    "the same, and clients that leave soon": (load_leaving, 40),
    "images in results of tools": (images, 120),
    "reasoning before calls": (reasoning, 120),
    "formats of Ollama": (format, 60),
    "formats that take gigabytes": (format_bomb, 24),
    "the same, and clients that go": (format_bomb_leaving, 24),
}
