"""Options have one declaration, whose names, limits and help all doors show."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import typer
from chat_doubles import make_session

from mixchat.base.errors import UsageError
from mixchat.base.option import options_of
from mixchat.base.options import (
    ChatOptions,
    LoadOptions,
    SamplingOptions,
    accepted_numbers,
    with_numbers,
)
from mixchat.chat import parameters
from mixchat.cli.app import app
from mixchat.face.arguments import request_of
from mixchat.face.load import checked_load_options
from mixchat.face.request import checked_request
from mixchat.serving.requests.chat import read_chat
from mixchat.serving.requests.errors import RequestError
from mixchat.serving.web.anthropic import read_messages
from mixchat.serving.web.ollama import read_ollama_chat
from mixchat.serving.web.openai_responses import read_responses
from tests.serving.web.scripted_model import scripted_model

RUN: Any = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
NAMES = [name for name, option in options_of(SamplingOptions).items() if option.usage]
DECLARED = {
    name: option
    for declaring in (SamplingOptions, ChatOptions, LoadOptions)
    for name, option in options_of(declaring).items()
}
ADDED = (-1e9, 1e9), (-1.1e9, 1.1e9, math.nan), "between -1000000000 and 1000000000"
# The values at the limits of an option, values beyond them, and the limits as errors tell them.
LIMITS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], str]] = {
    "temperature": ((0.0, 1e9), (-0.1, math.inf, math.nan), "0 or more"),
    "top_p": ((1e-9, 1.0), (0.0, 1.1), "above 0 and at most 1"),
    "top_k": ((0, 2**31 - 1), (-1, 2**31), "between 0 and 2147483647"),
    "min_p": ((0.0, 0.999), (-0.1, 1.0), "at least 0 and below 1"),
    "repeat_penalty": ((0.01, 100.0), (0.009, 101.0), "between 0.01 and 100"),
    "seed": ((0, 2**63 - 1), (-1, 2**63), "between 0 and 9223372036854775807"),
    "presence_penalty": ADDED,
    "frequency_penalty": ADDED,
    "max_tokens": (
        (0, 2**31 - 1),
        (-1, 2**31),
        "between 1 and 2147483647, or 0 for what fits",
    ),
    "top_logprobs": ((0, 2**31 - 1), (-1,), "between 0 and 2147483647"),
    "overflow": (("stop", "drop-oldest"), ("drop",), "stop or drop-oldest"),
    "think": (("show", "hide", "on", "off"), ("yes",), "show, hide, on or off"),
    "context_size": ((2, 2**31 - 1), (1, 2**31), "between 2 and 2147483647"),
    "least_context": ((0, 2**31 - 1), (-1, 2**31), "between 0 and 2147483647"),
    "kv_bits": ((8, 16), (4,), "8 or 16"),
    "parallel": ((1, 64), (0, 65), "between 1 and 64"),
}
MODEL = scripted_model()


def from_flag(name, value):
    flag = f"--{DECLARED[name].key}"
    with RUN.make_context("run", [f"{flag}={value}", "Hi"]):
        return flag


def from_variable(name, value):
    variable = "MIXCHAT_" + DECLARED[name].key.replace("-", "_").upper()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable, str(value))
        with RUN.make_context("run", ["Hi"]):
            return variable


def from_file(name, value):
    with RUN.make_context("run", ["Hi"], default_map={name: str(value)}):
        return f"config.toml: {DECLARED[name].key}"


def from_set(name, value):
    parameters.change(make_session(""), DECLARED[name].key, str(value))
    return DECLARED[name].key


def from_python(name, value):
    if name in options_of(LoadOptions):
        checked_load_options({name: value})
    else:
        checked_request(request_of(**{name: value}), SamplingOptions(), 8, ())
    return name


def from_body(read: Callable[..., object], body: dict[str, Any], **renamed: str):
    """Return a door for the API of `read`, with the names that it has for some options."""

    def door(name, value):
        field = renamed.get(name, name)
        fields = {"max_tokens": 9, **body}
        if "." in field:
            fields["options"] = {field.removeprefix("options."): value}
        else:
            fields[field] = value
        read(fields, MODEL, False, ExitStack())
        return field

    return door


MESSAGES = {"messages": [{"role": "user", "content": "Hi"}]}
ollama = {name: f"options.{name}" for name in (*NAMES, "presence_penalty", "frequency_penalty")}
API_NAMES = (*NAMES, "presence_penalty", "frequency_penalty", "max_tokens")
FLAGGED = [name for name in LIMITS if DECLARED[name].usage]
# Each door, the options that it takes, and the values that have another meaning or limit there.
DOORS: dict[str, tuple[Any, Any, dict[str, tuple[Any, ...]]]] = {
    "flag": (from_flag, FLAGGED, {}),
    "variable": (from_variable, FLAGGED, {}),
    "config.toml": (from_file, FLAGGED, {}),
    "/set": (from_set, parameters.NAMES, {}),
    "Python": (from_python, set(LIMITS) - {"think"}, {}),
    "OpenAI": (from_body(read_chat, MESSAGES), API_NAMES, {}),
    "repetition_penalty": (
        from_body(read_chat, MESSAGES, repeat_penalty="repetition_penalty"),
        ["repeat_penalty"],
        {},
    ),
    "max_completion_tokens": (
        from_body(read_chat, MESSAGES | {"max_tokens": None}, max_tokens="max_completion_tokens"),
        ["max_tokens"],
        {},
    ),
    "Responses": (
        from_body(read_responses, {"input": "Hi"}, max_tokens="max_output_tokens"),
        ["temperature", "top_p", "seed", "max_tokens"],
        {},
    ),
    "Anthropic": (
        from_body(read_messages, MESSAGES),
        ["temperature", "top_p", "top_k", "max_tokens"],
        {},
    ),
    "Ollama": (
        from_body(read_ollama_chat, MESSAGES, **ollama, max_tokens="options.num_predict"),
        API_NAMES,
        {"seed": (-1,), "max_tokens": (-1,)},  # drawn by chance, and as many as fit
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_value_at_its_limit_is_taken_and_one_beyond_it_is_refused_in_one_line(door):
    """Each door stated the limits again, and some had none or others."""
    enter, names, meant = DOORS[door]
    for name, (usable, beyond, rule) in LIMITS.items():
        if not {name, DECLARED[name].key} & {*names}:
            continue
        for value in usable:
            shown = enter(name, value)
        for value in set(beyond) - {*meant.get(name, ())}:
            with pytest.raises((UsageError, RequestError)) as refused:
                enter(name, value)
            assert f"{shown} has to be {rule}, not " in str(refused.value)
            assert "\n" not in str(refused.value)


def test_every_option_with_limits_is_in_the_table():
    assert {name for name, option in DECLARED.items() if hasattr(option, "least")} <= {
        *LIMITS,
        "logit_bias",
    }


def test_every_declared_option_has_a_flag_of_its_name_and_help():
    for name, option in DECLARED.items():
        if option.usage:
            (parameter,) = [each for each in RUN.params if each.name == name]
            assert f"--{option.key}" in parameter.opts
            assert parameter.help.startswith(option.help.removesuffix("."))


def test_what_the_models_makers_advise_goes_before_the_defaults_and_behind_the_flags():
    advised = {"temperature": 0.2, "top_p": 0.9, "top_k": -1, "repeat_penalty": float("nan")}
    options = with_numbers(with_numbers(SamplingOptions(), advised), {"top_p": 0.5})
    assert (options.temperature, options.top_p) == (0.2, 0.5)
    assert (options.top_k, options.repeat_penalty) == (0, 1.0)


def test_options_carry_every_value_over():
    given = dict(zip(NAMES, (0.1, 0.2, 3, 0.4, 1.5, 6), strict=True))
    options = with_numbers(SamplingOptions(), given)
    assert options == replace(SamplingOptions(), **given)
    assert accepted_numbers(vars(options)).items() >= given.items()


def helps() -> dict[str, dict[str, str]]:
    """The help of each option, by the option and the command."""
    found: dict[str, dict[str, str]] = {}
    for name, command in typer.main.get_command(app).commands.items():
        for option in (each for each in command.params if each.param_type_name == "option"):
            found.setdefault(option.opts[0], {})[name] = " ".join(option.help.split())
    return found


def test_a_flag_has_the_same_help_in_all_commands():
    """`--json` and `--dense-bits` had three texts each."""
    unlike = {flag for flag, texts in helps().items() if len(set(texts.values())) > 1}
    assert unlike == {
        "--json",
        "--keep-cache",
        "--expert-bits",
        "--dense-bits",
        "--prompt",
    }  # mean other things


def test_the_help_of_a_flag_is_one_sentence():
    texts = {text for commands in helps().values() for text in commands.values()}
    assert [text for text in texts if ". " in text or not text.endswith(".")] == []


def test_the_first_line_of_a_command_fits_the_list_of_commands(mixchat):
    """Three of 18 were cut off."""
    listed = mixchat("--help", COLUMNS="80").stdout.decode().partition("Commands:\n")[2]
    for name, command in typer.main.get_command(app).commands.items():
        summary = " ".join(command.help.partition("\n\n")[0].split())
        assert command.hidden or f"  {name:9}  {summary}\n" in listed
