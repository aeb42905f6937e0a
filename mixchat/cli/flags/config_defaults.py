"""Turns config.toml into defaults for the flags of every command."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from mixchat.base.errors import UsageError
from mixchat.base.settings import config_file, read_config
from mixchat.cli.flags.config_flag import mark_damaged, settings_of

Defaults = dict[str, dict[str, Any]]
_EVERY = "run"  # the command that has every setting as a flag
_MOST = 10**30  # Python refuses to write numbers of thousands of digits


def apply_config(context: typer.Context) -> None:
    """Make the values of config.toml the defaults of the command that will run."""
    commands = context.command.commands  # type: ignore[attr-defined]
    if not settings_of(commands[context.invoked_subcommand]):
        return
    try:
        context.default_map = config_defaults(commands)
    except UsageError as error:
        mark_damaged(context, error)


def config_defaults(commands: dict[str, Any]) -> Defaults:
    """Return for each command the values of config.toml, by parameter, as strings from a shell.

    Raises `UsageError` for a file that cannot be read, an unknown key, a value of a wrong type.
    """
    path = config_file()
    known, values = settings_of(commands[_EVERY]), read_config(path)
    if unknown := [key for key in values if key not in known]:
        raise _unknown(path, unknown[0], known, commands[_EVERY])
    as_given = {key: _as_given(f"{path}: {key}", known[key], values[key]) for key in values}
    return {name: _defaults_of(command, as_given) for name, command in commands.items()}


def _defaults_of(command: Any, values: dict[str, Any]) -> dict[str, Any]:
    settings = settings_of(command)
    return {settings[key].name: value for key, value in values.items() if key in settings}


def _unknown(path: Path, key: str, known: dict[str, Any], command: Any) -> UsageError:
    """Return the error for a key that is not a setting; its hint names the most similar one."""
    hint = "'mixchat config' shows every setting."
    for parameter in command.params:
        if f"--{key}" in parameter.opts and parameter not in known.values():
            return UsageError(f"{path}: {key} is a flag of one run, not a setting", hint=hint)
    flags = {flag[2:]: name for name, p in known.items() for flag in p.opts if flag[:2] == "--"}
    if near := get_close_matches(key.lower().replace("_", "-"), flags, 1):
        hint = f"Did you mean {flags[near[0]]}? {hint}"
    return UsageError(f"{path}: there is no setting {key!r}", hint=hint)


def _as_given(where: str, parameter: Any, value: Any) -> Any:
    """Return a value of TOML as the shell would give it, so that it is checked like a flag."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise UsageError(f"{where} has to be true or false, not {value!r:.40}")
        return value
    if parameter.multiple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UsageError(f'{where} has to be a list of texts, such as ["END"]')
        return [_as_text(where, item) for item in value]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{where} has to be {_wanted(parameter)}, not {_kind(value)}")
    return _as_text(where, value)


def _as_text(where: str, value: str | int | float) -> str:
    if isinstance(value, int) and abs(value) > _MOST:
        raise UsageError(f"{where} is too large a number")
    text = str(value)
    if "\0" in text:
        raise UsageError(f"{where} has a NUL character, which no text has")
    return text


def takes_number(parameter: Any) -> bool:
    """Return whether the values of a parameter are numbers, by its metavar."""
    return parameter.metavar in ("N", "X")


def _wanted(parameter: Any) -> str:
    return "a number" if takes_number(parameter) else "text in quotes"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a table"
    return "a date or time"
