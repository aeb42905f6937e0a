"""Settings: flags that config.toml and variables give, too, and where a value comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import typer

from mixchat.base.errors import UsageError
from mixchat.base.settings import config_file

PREFIX = "MIXCHAT_"
_DAMAGE = "mixchat.config"  # in the context's `meta`: the error that reading config.toml raised

AGAIN = "may be given again"  # of a flag with several values, which are a list in config.toml

ValueSource = Literal["flag", "variable", "file", "default"]
# By pydantic's names of errors.
_KINDS = {
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
}
_LIMITS = {"greater_than_equal": ("at least", "ge"), "less_than_equal": ("at most", "le")}
_SOURCES: dict[str, ValueSource] = {
    "COMMANDLINE": "flag",
    "ENVIRONMENT": "variable",
    "DEFAULT_MAP": "file",
}


def setting(*flags: str, check: Callable[[Any], object] | None = None, **about: Any) -> Any:
    """Return an option whose first long flag names its key in config.toml and its variable.

    `check` raises `UsageError` for a value that cannot be used; the error then says where the value
    comes from. `about` is passed to `typer.Option`.
    """
    name = next(flag for flag in flags if flag.startswith("--")).partition("/")[0]
    variable = PREFIX + name.removeprefix("--").replace("-", "_").upper()
    option: Any = typer.Option  # whose first parameter is a default, or a flag in an Annotated
    return option(*flags, **_how(variable, check), **about)


def setting_argument(key: str, *, check: Callable[[Any], object], **about: Any) -> Any:
    """Return an argument whose default is the setting `key`."""
    return typer.Argument(**_how(PREFIX + key.upper(), check), **about)


def settings_of(command: Any) -> dict[str, Any]:
    """Return the parameters of a click command that are settings, by their keys in config.toml."""
    return {key: parameter for parameter in command.params if (key := _key(parameter))}


def value_source(context: typer.Context, parameter: Any) -> ValueSource:
    """Return where the value of a parameter comes from."""
    source = context.get_parameter_source(parameter.name)
    return _SOURCES.get(source.name, "default") if source else "default"


def is_given(context: typer.Context, name: str) -> bool:
    """Return whether a flag gives a parameter, by its name in Python."""
    source = context.get_parameter_source(name)
    return source is not None and _SOURCES.get(source.name) == "flag"


def refuse_together(
    context: typer.Context, flag: str, others: Iterable[str], hint: str | None = None
) -> None:
    """Raise `UsageError` where flags are given, by their names in Python, that `flag` excludes."""
    names = set(others)
    given = [
        _shown(parameter)
        for parameter in context.command.params
        if parameter.name in names and is_given(context, parameter.name)
    ]
    if given:
        raise UsageError(f"{flag} does not go with {', '.join(given)}", hint=hint)


def _shown(parameter: Any) -> str:
    """Return a flag, or the word that help has for an argument."""
    long = next((opt for opt in parameter.opts if opt.startswith("--")), None)
    return str(long or parameter.metavar)


def chosen(context: typer.Context, *parameters: Any) -> Any:
    """Return the one of some settings that counts, where each excludes the others; None for none.

    A flag goes before a variable, and that before config.toml. Raises `UsageError` where two are
    given in one place.
    """
    for source in ("flag", "variable", "file"):
        given = [each for each in parameters if value_source(context, each) == source]
        if len(given) > 1:
            raise UsageError(f"{_place(source, given)} exclude each other")
        if given:
            return given[0]
    return None


def mark_damaged(context: typer.Context, error: UsageError) -> None:
    """Store an error of config.toml until a setting is needed: --help needs none."""
    context.meta[_DAMAGE] = error


def explained(error: typer.BadParameter) -> Exception:
    """Return the error with the value and what is allowed; it names the variable or the file if the
    value comes from there."""
    context: Any = error.ctx
    message = error.message
    if (details := getattr(error.__cause__, "errors", None)) is not None:
        message = f"{_shown(error.param)} has to be {_allowed(details()[0])}"
    elif context is None or value_source(context, error.param) in ("flag", "default"):
        return error
    return _named(context, error.param, message, f"'{context.command_path} --help' explains it.")


def _allowed(detail: Mapping[str, Any]) -> str:
    """Return `a number, not 'hot'` for what pydantic says of a value."""
    kind, given = detail["type"], detail.get("ctx", {})
    _, listed, choices = detail["msg"].rstrip(".").partition(" is not one of ")
    if listed:
        allowed = " or ".join(choices.replace("'", "").rsplit(", ", 1))
    elif kind in _LIMITS:
        word, limit = _LIMITS[kind]
        allowed = f"{word} {given[limit]}"
    else:
        allowed = _KINDS.get(kind, detail["msg"])
    return f"{allowed}, not {detail['input']!r}"


def _place(source: ValueSource, parameters: Sequence[Any]) -> str:
    """Return the names that settings have in the place where they are given."""
    if source == "file":
        return f"{config_file()}: {' and '.join(str(_key(each)) for each in parameters)}"
    if source == "variable":
        return " and ".join(each.envvar for each in parameters)
    return " and ".join(f"--{_key(each)}" for each in parameters)


def _how(variable: str, check: Callable[[Any], object] | None) -> dict[str, Any]:
    return {"envvar": variable, "show_envvar": False, "callback": _checker(check)}


def _checker(check: Callable[[Any], object] | None) -> Callable[..., Any]:
    def checked(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
        if damage := context.meta.get(_DAMAGE):
            raise damage
        if value is not None and check is not None:
            try:
                check(value)
            except UsageError as error:
                raise _named(context, parameter, str(error), error.hint) from None
        return value

    return checked


def _named(context: typer.Context, parameter: Any, message: str, hint: str | None) -> UsageError:
    where = {
        "variable": parameter.envvar,
        "file": f"{config_file()}: {_key(parameter)}",
    }.get(value_source(context, parameter))
    if where is None:
        return UsageError(message, hint=hint)
    flag = next((flag for flag in parameter.opts if message.startswith(f"{flag} ")), None)
    problem = f" {message[len(flag) + 1 :]}" if flag else f": {message}"
    return UsageError(where + problem, hint=hint)


def _key(parameter: Any) -> str | None:
    variable = parameter.envvar
    if not isinstance(variable, str) or not variable.startswith(PREFIX):
        return None
    return variable.removeprefix(PREFIX).replace("_", "-").lower()
