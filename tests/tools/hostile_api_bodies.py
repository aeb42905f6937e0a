"""Bodies of the APIs of Anthropic, Ollama and OpenAI with all their parts, and changes to them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

ODD: list[Any] = [
    *(None, True, -1, 0, 1.5, 10**30, 10**400, "", "x", [], [[]], {}, {"a": {}}, "\x00"),
]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALLED = {"city": "Oslo"}
FUNCTION = {"name": "weather", "description": "Weather", "parameters": SCHEMA}
REASONING = {"type": "reasoning_text", "text": "Hm."}
IMAGE = {"type": "input_image", "image_url": "data:,"}
HI = {"role": "user", "content": "Hi"}
MESSAGES = {
    "model": "",
    "max_tokens": 3,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        HI,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "a", "name": "weather", "input": CALLED},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "a",
                    "content": [{"type": "text", "text": "rain"}, {"type": "image"}],
                    "is_error": False,
                },
                {"type": "text", "text": "And?"},
            ],
        },
    ],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "stop_sequences": ["x"],
    "stream": False,
    "metadata": {"user_id": "a"},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
    "tools": [{"name": "weather", "description": "Weather", "input_schema": SCHEMA}],
    "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
}
# The body of each API.
APIS: dict[str, dict[str, Any]] = {
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": MESSAGES,
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [REASONING]},
            {"type": "message", "role": "assistant", "content": "Let me see."},
            {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": [IMAGE]},
        ],
        "instructions": "Be brief.",
        "max_output_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "stream": False,
        "store": False,
        "metadata": {"a": "b"},
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "low", "summary": "auto"},
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "text": {
            "verbosity": "low",
            "format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True},
        },
        "tools": [{"type": "function", **FUNCTION}, {"type": "web_search"}],
        "tool_choice": {"type": "function", "name": "weather"},
    },
    "/api/chat": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            HI,
            {
                "role": "assistant",
                "content": "",
                "thinking": "Hm.",
                "tool_calls": [{"function": {"name": "weather", "arguments": CALLED}}],
            },
            {"role": "tool", "tool_name": "weather", "content": "rain"},
        ],
        "stream": False,
        "think": "low",
        "keep_alive": "5m",
        "options": {"num_predict": 3, "temperature": 0.5, "stop": ["x"], "num_ctx": 100},
        "format": SCHEMA,
        "tools": [{"type": "function", "function": FUNCTION}],
    },
    "/api/generate": {
        "prompt": "Hi",
        "system": "Be brief.",
        "raw": False,
        "stream": False,
        "think": True,
        "images": [],
        "suffix": "",
        "context": [1, 2],
        "options": {"num_predict": 3, "seed": 1, "repeat_penalty": 1.1},
        "format": "json",
    },
    "/api/pull": {"model": "demo", "stream": False, "insecure": False},
}
_FORMS = ("tools", "tool_choice", "text", "output_config", "format")


def changed(rng: random.Random, *, forms: bool = False) -> tuple[str, dict[str, Any]]:
    """Return an API's path and a body with one to three changes, with schemas only if `forms`."""
    path = rng.choice(list(APIS))
    body = deepcopy(APIS[path])
    for name in () if forms else _FORMS:
        body.pop(name, None)
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(list(_places(body)))
        kind = rng.random()
        if kind < 0.6:
            holder[key] = deepcopy(rng.choice(ODD))
        elif kind < 0.7:
            del holder[key]
        elif kind < 0.8:
            holder[key] = [holder[key]] * rng.choice([1, 2, 20])
        elif kind < 0.9:
            _, other = rng.choice(list(_places(body)))
            holder[key] = {str(other): holder[key]}
        else:
            other_holder, other = rng.choice(list(_places(body)))
            holder[key] = deepcopy(other_holder[other])
    _keep_short(path, body)
    return path, body


def _keep_short(path: str, body: dict[str, Any]) -> None:
    """Limit an answer that would have thousands of tokens, which looks like a server that hangs."""
    if not path.startswith("/api/"):
        limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        body[limit] = body.get(limit) or 3
        return
    options = body["options"] = {} if body.get("options") is None else body["options"]
    if isinstance(options, dict) and options.get("num_predict") in (None, 0, -1):
        options["num_predict"] = 3


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each part of a body as its holder and its name or number there."""
    names = (
        value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    )
    for name in names:
        yield value, name
        yield from _places(value[name])
