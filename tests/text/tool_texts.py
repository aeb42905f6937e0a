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
{%- macro system() -%}
    {%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}
    {{- "Date: " + strftime_now("%Y-%m-%d") + "\\n\\nReasoning: " + reasoning_effort }}
{%- endmacro -%}
{{- "<|start|>system<|message|>" + system() + "<|end|>" }}
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
    {%- elif message.role == "assistant" %}
        {%- if "<|channel|>final<|message|>" in message.content %}
            {{- raise_exception("a message with channels") }}
        {%- endif %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
    {%- else %}
        {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{%- endif %}"""

_LITERAL = """\
{%- macro literal(value) %}
    {%- if value is string %}{{- '<|"|>' + value + '<|"|>' }}
    {%- elif value is boolean %}{{- 'true' if value else 'false' }}
    {%- elif value is mapping %}{{- '{' }}
        {%- for key, inner in value | dictsort %}
            {{- ',' if not loop.first }}{{- key }}:{{- literal(inner) }}
        {%- endfor %}{{- '}' }}
    {%- elif value is sequence %}{{- '[' }}
        {%- for inner in value %}{{- ',' if not loop.first }}{{- literal(inner) }}{%- endfor %}
        {{- ']' }}
    {%- else %}{{- value }}{%- endif %}
{%- endmacro %}
"""
GEMMA = (
    _LITERAL
    + """\
{{- bos_token }}
{%- set rest = messages %}
{%- if tools or enable_thinking or messages[0].role == 'system' %}
    {{- '<|turn>system\\n' }}{{- '<|think|>\\n' if enable_thinking | default(false) }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content | trim }}{%- set rest = messages[1:] %}
    {%- endif %}
    {%- for tool in tools or [] %}
        {{- '<|tool>' + tool.function.name + literal(tool.function.parameters) + '<tool|>' }}
    {%- endfor %}
    {{- '<turn|>\\n' }}
{%- endif %}
{%- set last = namespace(calls=false) %}
{%- for message in rest %}
    {%- if message.role == 'tool' %}
        {{- '<|tool_response>' + literal(message.content) + '<tool_response|>' }}
    {%- else %}
        {%- set last.calls = message.tool_calls is defined %}
        {{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
        {%- if message.reasoning_content %}
            {{- '<|channel>thought\\n' + message.reasoning_content + '\\n<channel|>' }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '<|tool_call>call:' + tool_call.function.name }}
            {{- literal(tool_call.function.arguments) + '<tool_call|>' }}
        {%- endfor %}
        {{- message.content | trim }}{{- '<turn|>\\n' if not last.calls }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not last.calls %}
    {{- '<|turn>model\\n' }}
    {{- '<|channel>thought\\n<channel|>' if not enable_thinking | default(false) }}
{%- endif %}"""
)
GLM = """\
[gMASK]<sop>
{%- for tool in tools or [] %}<|system|>{{ tool | tojson }}{%- endfor %}
{%- if tools %}<tool_call>NAME<arg_key>a</arg_key><arg_value>b</arg_value></tool_call>{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|assistant|>' }}
        {{- '<think>' + m.reasoning_content if m.reasoning_content }}{{- '</think>' + m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>' + call.function.name }}
            {%- for k, v in call.function.arguments.items() %}
                {{- '<arg_key>' + k + '</arg_key>' }}
                {{- '<arg_value>' + (v if v is string else v | tojson) + '</arg_value>' }}
            {%- endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
    {%- else %}
        {{- ('<|observation|>' if m.role == 'tool' else '<|' + m.role + '|>') + m.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' + ('</think>' if enable_thinking is false else '<think>') }}
{%- endif %}"""
LFM = """\
{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\nList of tools: ' + tools | tojson + '<|im_end|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {{- '<think>' + message.thinking + '</think>' if message.thinking is defined }}
    {{- message.content }}
    {%- if message.tool_calls is defined %}
        {{- '<|tool_call_start|>[' }}
        {%- for call in message.tool_calls %}
            {{- ', ' if not loop.first }}{{- call.function.name + '(' }}
            {%- for key, value in call.function.arguments.items() %}
                {{- ', ' if not loop.first }}{{- key + '=' }}
                {{- "'" + value + "'" if value is string else value | string }}
            {%- endfor %}
            {{- ')' }}
        {%- endfor %}
        {{- ']<|tool_call_end|>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QWEN_CODER = """\
{%- for tool in tools or [] %}
    {{- '<function>' + tool.function.name + tool.function.parameters | tojson }}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content %}
        {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content }}
    {%- for tool_call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n<function=' + tool_call.function.name + '>\\n' }}
        {%- for name, value in tool_call.function.arguments | items %}
            {%- set shown = value | string if value is string else value | tojson | safe %}
            {{- '<parameter=' + name + '>\\n' + shown + '\\n</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""

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
