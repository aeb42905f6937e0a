"""Makes flags, and settings, whose values config.toml and variables give, too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, Signature
from typing import Any, Literal, get_type_hints

import typer

from mixchat.base.errors import UsageError
from mixchat.base.option import Texts, Tokens, options_of
from mixchat.base.options import LoadOptions
from mixchat.base.settings import config_file, read_config
from mixchat.cli.flags.shell_completion import one_of

PREFIX = "MIXCHAT_"
AGAIN = "may be given again"  # of a flag with several values
_DAMAGE = "mixchat.config"  # the error of config.toml, in the context's `meta`
_COMMAND = "run"  # has nearly every setting as a flag
_MORE_SETTINGS = {"serve": ("alias",)}  # that `run` has no flags for
_LARGEST_NUMBER = 10**30  # Python refuses to write numbers of thousands of digits

# What flags are about, in the order of --help.
MODEL = "Model"
PROMPT = "Prompt and input"
SAMPLING = "Sampling"
OUTPUT = "Output"
MEMORY = "Memory and speed"
CHAT = "Chat"
SERVER = "Server"
MACHINE = "Another machine"
MEASURING = "Measuring"
_ORDER = (MODEL, PROMPT, SERVER, MACHINE, MEASURING, SAMPLING, OUTPUT, MEMORY, CHAT, None)

# Checks a value, and raises `UsageError` about the name that the second argument is.
Check = Callable[[Any, str], object]
ValueSource = Literal["flag", "variable", "file", "default"]
_SOURCES: dict[str, ValueSource] = {
    "COMMANDLINE": "flag",
    "ENVIRONMENT": "variable",
    "DEFAULT_MAP": "file",
}


def option(
    usage: str, help: str, heading: str | None = None, default: Any = None, **more: Any
) -> Any:
    """Return an option. `usage` is its flags and its metavar, as in "-n --max-tokens N".

    Without a metavar it is a switch, which is off by default.
    """
    flags = [word for word in usage.split() if word.startswith("-")]
    metavar = next((word for word in usage.split() if not word.startswith("-")), None)
    if metavar is None:
        default = bool(default)
        more = {"show_default": "on" if default else False} | more
    return typer.Option(
        default, *flags, metavar=metavar, help=help, rich_help_panel=heading, **more
    )


def setting(
    usage: str,
    help: str,
    heading: str,
    default: Any = None,
    *,
    check: Check | None = None,
    **more: Any,
) -> Any:
    """Return an option whose first long flag names its key in config.toml and its variable.

    `check` gets the flag, or the variable or key that gave the value.
    """
    name = next(word for word in usage.split() if word.startswith("--")).partition("/")[0]
    variable = PREFIX + name.removeprefix("--").replace("-", "_").upper()
    return option(usage, help, heading, default, **common(variable, check), **more)


def declared(
    declaring: type, name: str, heading: str, default: Any = None, *, shown: str = ""
) -> Any:
    """Return the setting of the option that a dataclass declares.

    shown: the default for a person, in which {} is that of the dataclass. Without it, and if
    nothing else is shown, the setting has the default of the dataclass.
    """
    each = options_of(declaring)[name]
    shown_default = each.shown_default or shown.format(getattr(declaring, name)) or None
    if default is None and shown_default is None:
        default = getattr(declaring, name) or None
    more: dict[str, Any] = {} if shown_default is None else {"show_default": shown_default}
    if isinstance(each, Tokens):
        more["parser"] = _tokens
    if each.words:
        more["autocompletion"] = one_of(*each.words)
    help = each.help
    if isinstance(each, Texts):
        help = f"{help.removesuffix('.')}; {AGAIN}."
    return setting(each.usage, help, heading, default, check=each.checked, **more)


def _tokens(text: str) -> int:
    try:
        return Tokens.parse(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r:.80} is not a valid integer.") from None


@dataclass(frozen=True)
class OptionGroup:
    """Flags for options that a dataclass declares. Their values come in one mapping.

    defaults: other ones than the dataclass has. shown: as for `declared`.
    """

    declaring: type
    names: tuple[str, ...]
    heading: str
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    shown: str = ""

    def parameters(self) -> list[Parameter]:
        """Return a parameter of Typer's for each option, by the option's name."""
        return [self._parameter(name) for name in self.names]

    def values(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of the `raw` values of a shell, variables and config.toml."""
        options = options_of(self.declaring)
        return {
            name: options[name].checked(raw[name], f"--{options[name].key}")
            for name in self.names
            if raw[name] not in (None, [])
        }

    def _parameter(self, name: str) -> Parameter:
        each = options_of(self.declaring)[name]
        default = self.defaults.get(name)
        flag = declared(self.declaring, name, self.heading, default, shown=self.shown)
        flag_type = each.flag_type if each.flag_type is bool else each.flag_type | None
        return _parameter(name, flag, flag_type)


def group(declaring: type, heading: str, *names: str, shown: str = "", **defaults: Any) -> Any:
    """Return the group of these options, as the default of a field of flags."""
    return OptionGroup(declaring, names, heading, defaults, shown)


def loading(*names: str, **defaults: Any) -> Any:
    """Return the group of these options of loading a model."""
    return group(LoadOptions, MEMORY, *names, **defaults)


def with_flags(command: Callable[[typer.Context, Any], None]) -> Callable[..., None]:
    """Return a command with a parameter for each field of the dataclass that `command` takes.

    A field with an `OptionGroup` has a parameter for each option of the group.
    """
    flags = get_type_hints(command)["flags"]
    types = get_type_hints(flags)
    groups = {
        each.name: each.default for each in fields(flags) if isinstance(each.default, OptionGroup)
    }

    @wraps(command)
    def run(context: typer.Context, **values: Any) -> None:
        grouped = {name: options.values(values) for name, options in groups.items()}
        single = {flag.name: values[flag.name] for flag in fields(flags) if flag.name not in groups}
        command(context, flags(**single, **grouped))

    parameters = list[Parameter]()
    for each in fields(flags):
        if each.name in groups:
            parameters += groups[each.name].parameters()
        else:
            parameters.append(_parameter(each.name, each.default, types[each.name]))
    parameters.sort(key=_place_in_help)
    first = Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    run.__signature__ = Signature([first, *parameters])  # type: ignore[attr-defined]
    return run


def _parameter(name: str, flag: Any, flag_type: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=flag, annotation=flag_type)


def _place_in_help(parameter: Parameter) -> int:
    return _ORDER.index(getattr(parameter.default, "rich_help_panel", None))


def settings_of(command: Any) -> dict[str, Any]:
    """Return a click command's settings, by their keys in config.toml."""
    return {key: parameter for parameter in command.params if (key := _key(parameter))}


def all_settings(commands: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of all commands, by their keys in config.toml."""
    settings = settings_of(commands[_COMMAND])
    for command, keys in _MORE_SETTINGS.items():
        more = settings_of(commands[command])
        settings |= {key: more[key] for key in keys}
    return settings


def value_source(context: typer.Context, name: str) -> ValueSource:
    """Return the source of a parameter's value, by its name in Python."""
    source = context.get_parameter_source(name)
    return _SOURCES.get(source.name, "default") if source else "default"


def is_given(context: typer.Context, name: str) -> bool:
    """Return whether a flag gives a parameter, by its name in Python."""
    return value_source(context, name) == "flag"


def refuse_together(
    context: typer.Context, flag: str, excluded: Collection[str], hint: str | None = None
) -> None:
    """Raise `UsageError` if flags are given that `flag` excludes, named as in Python."""
    wrong = [
        _shown(parameter)
        for parameter in context.command.params
        if parameter.name in excluded and is_given(context, parameter.name)
    ]
    if wrong:
        raise UsageError(f"{flag} does not go with {', '.join(wrong)}", hint=hint)


def chosen(context: typer.Context, *parameters: Any) -> Any:
    """Return the one that counts of settings that exclude each other, if any.

    Flags go before variables, and these before config.toml. Raises `UsageError` for two in one
    source.
    """
    for source in ("flag", "variable", "file"):
        set_there = [each for each in parameters if value_source(context, each.name) == source]
        if len(set_there) > 1:
            if source == "variable":
                names = [each.envvar for each in set_there]
            else:
                names = [("" if source == "file" else "--") + str(_key(each)) for each in set_there]
            origin = f"{config_file()}: " if source == "file" else ""
            raise UsageError(f"{origin}{' and '.join(names)} exclude each other")
        if set_there:
            return set_there[0]
    return None


def apply_config(context: typer.Context) -> None:
    """Make the values of config.toml the defaults of the invoked command."""
    commands = context.command.commands  # type: ignore[attr-defined]
    if not settings_of(commands[context.invoked_subcommand]):
        return
    try:
        context.default_map = config_defaults(commands)
    except UsageError as error:
        context.meta[_DAMAGE] = error  # until a setting is needed, for --help needs none


def config_defaults(commands: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return for each command the values of config.toml, by parameter, as strings from a shell.

    Raises `UsageError` for a bad file, key or type.
    """
    path = config_file()
    known = all_settings(commands)
    values = read_config(path)
    for key in values:
        if key in known:
            continue
        hint = "'mixchat config' shows every setting."
        of_run = (each for each in commands[_COMMAND].params if each not in known.values())
        if any(f"--{key}" in parameter.opts for parameter in of_run):
            raise UsageError(f"{path}: {key} is a flag of one run, not a setting", hint=hint)
        flags = {flag[2:]: name for name, p in known.items() for flag in p.opts if flag[:2] == "--"}
        if near := get_close_matches(key.lower().replace("_", "-"), flags, 1):
            hint = f"Did you mean {flags[near[0]]}? {hint}"
        raise UsageError(f"{path}: there is no setting {key!r}", hint=hint)
    words = {key: _as_word(f"{path}: {key}", known[key], values[key]) for key in values}
    return {
        name: {
            parameter.name: words[key]
            for key, parameter in settings_of(command).items()
            if key in words
        }
        for name, command in commands.items()
    }


def takes_number(parameter: Any) -> bool:
    """Return whether a parameter takes numbers, by its metavar."""
    return parameter.metavar in ("N", "X")


def explained(error: typer.BadParameter) -> Exception:
    """Return the error with the variable or file that gave the value, if no flag did."""
    context: Any = error.ctx
    parameter: Any = error.param
    if context is None or value_source(context, parameter.name) in ("flag", "default"):
        return error
    hint = f"'{context.command_path} --help' explains it."
    return UsageError(f"{_given_name(context, parameter)}: {error.message}", hint=hint)


def _as_word(where: str, parameter: Any, value: Any) -> Any:
    """Return a value of TOML as the shell would give it."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise UsageError(f"{where} has to be true or false, not {value!r:.40}")
        return value
    if parameter.multiple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UsageError(f'{where} has to be a list of texts, such as ["END"]')
        return [_as_text(where, item) for item in value]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        wanted = "a number" if takes_number(parameter) else "text in quotes"
        types = {bool: str(value).lower(), list: "a list", dict: "a table"}
        actual = types.get(type(value), "a date or time")
        raise UsageError(f"{where} has to be {wanted}, not {actual}")
    return _as_text(where, value)


def _as_text(where: str, value: str | int | float) -> str:
    if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
        raise UsageError(f"{where} is too large a number")
    text = str(value)
    if "\0" in text:
        raise UsageError(f"{where} has a NUL character, which no text has")
    return text


def _shown(parameter: Any) -> str:
    long = next((opt for opt in parameter.opts if opt.startswith("--")), None)
    return str(long or parameter.metavar)


def common(variable: str, check: Check | None) -> dict[str, Any]:
    """Return what options and arguments have in common that a variable and config.toml set."""

    def checked(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
        if damage := context.meta.get(_DAMAGE):
            raise damage
        if value is not None and check is not None:
            name = _given_name(context, parameter)
            try:
                check(value, name)
            except UsageError as error:
                is_named = str(error).startswith(name)
                message = str(error) if is_named else f"{name}: {error}"
                raise UsageError(message, hint=error.hint) from None
        return value

    return {"envvar": variable, "show_envvar": False, "callback": checked}


def _given_name(context: typer.Context, parameter: Any) -> str:
    """Return the name of a parameter in the shell, the environment or config.toml."""
    names = {"variable": parameter.envvar, "file": f"{config_file()}: {_key(parameter)}"}
    return str(names.get(value_source(context, parameter.name)) or _shown(parameter))


def _key(parameter: Any) -> str | None:
    variable = parameter.envvar
    if not isinstance(variable, str) or not variable.startswith(PREFIX):
        return None
    return variable.removeprefix(PREFIX).replace("_", "-").lower()
