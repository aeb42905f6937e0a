"""Chat templates that know tools, in the style of each form of calls, and what they are given."""

from __future__ import annotations

from typing import Any

from mixchat.text.messages import Message
from mixchat.text.tool_call import Tool, ToolCall

TAGS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Functions:' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\nWrite <tool_call>\\n{\\"name\\": NAME}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content and not loop.last %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function %}
            {{- '\\n<tool_call>\\n{\\"name\\": \\"' + call.name + '\\", \\"arguments\\": ' }}
            {{- call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
_TURN = "'<|start_of_role|>' + message.role + '<|end_of_role|>'"
_GRANITE = """\
{%- if tools %}
    {{- '<|start_of_role|>available_tools<|end_of_role|>' + tools | tojson(indent=4) }}
    {{- '<|end_of_text|>\\n<|tool_call|> begins a list of calls.' }}
{%- endif %}
{%- for message in messages %}
    {{- TURN }}
    CALLS
    {{- message.content + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""
GRANITE = _GRANITE.replace("TURN", _TURN).replace(
    "CALLS",
    "{%- for call in message.tool_calls or [] %}{{- '<|tool_call|>' + [call.function] | tojson }}"
    "{%- endfor %}",
)
GRANITE_WITHOUT_CALLS = _GRANITE.replace("TURN", _TURN).replace("    CALLS\n", "")
HARMONY = """\
{%- macro type(spec) %}
    {%- if spec.type == "string" %}
        {{- '"' + spec.enum | join('" | "') + '"' if spec.enum else "string" }}
    {%- elif spec.type == "array" %}{{- type(spec['items']) + "[]" }}
    {%- else %}{{- "any" }}{%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- "<|start|>developer<|message|># Tools\\n\\nnamespace functions {\\n" }}
    {%- for tool in tools %}
        {{- "// " + tool.function.description + "\\ntype " + tool.function.name + " = (_: {" }}
        {%- for name, spec in tool.function.parameters.properties.items() %}
            {{- name + ("" if name in (tool.function.parameters.required or []) else "?") + ": " }}
            {{- type(spec) + ",\\n" }}
        {%- endfor %}
        {{- "}) => any;\\n" }}
    {%- endfor %}
    {{- "}<|end|>" }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if last.name is none %}{{- raise_exception("a result without a call") }}{%- endif %}
        {{- "<|start|>functions." + last.name + " to=assistant<|channel|>commentary<|message|>" }}
        {{- message.content | tojson + "<|end|>" }}
    {%- elif "tool_calls" in message %}
        {%- set call = message.tool_calls[0].function %}
        {%- set last.name = call.name %}
        {%- if message.thinking %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif %}
        {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json" }}
        {{- "<|message|>" + call.arguments | tojson + "<|call|>" }}
    {%- else %}
        {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{%- endif %}"""

WEATHER = Tool(
    "get_weather",
    "The weather at a <place>, & more",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Zürich, or | another"},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "days": {"type": "array", "items": {"type": "integer"}},
            "message": {"type": "boolean"},
        },
        "required": ["city"],
    },
)
NOW = Tool("now", "The time", {"type": "object", "properties": {}})
CALLS = (
    ToolCall("call00001", "get_weather", '{"city": "Z\\u00fcrich", "days": [1, 2.0]}'),
    ToolCall("call00002", "now", "{}"),
)


def conversations(calls: int) -> list[list[Message]]:
    """Conversations with so many calls in an answer, that end with results or a question."""
    made = CALLS[:calls]
    results = [Message("tool", f'{{"t": {i}}}', call_id=call.id) for i, call in enumerate(made)]
    hi = [Message("system", "Be brief"), Message("user", "Hi")]
    loop = [*hi, Message("assistant", "", calls=made), *results]
    thought = [*hi, Message("assistant", "", thinking="Hm.", calls=made), *results]
    answered = [*loop, Message("assistant", "5 degrees"), Message("user", "And?")]
    return [
        hi,
        loop,
        thought,
        answered,
        [*answered, Message("assistant", "", calls=made), *results],
    ]


def as_dicts(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages as transformers gets them."""
    found = []
    for message in messages:
        given: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.calls:
            given["tool_calls"] = [call.to_json() for call in message.calls]
        if message.thinking:
            given |= {"reasoning_content": message.thinking, "thinking": message.thinking}
        found.append(given | ({"tool_call_id": message.call_id} if message.call_id else {}))
    return found
