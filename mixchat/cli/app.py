"""The commands, and the exit codes of their errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from mixchat import __version__
from mixchat.base import interrupts, system
from mixchat.base.errors import MixchatError, UsageError
from mixchat.chat import printing
from mixchat.cli.bench import bench
from mixchat.cli.chats import chats
from mixchat.cli.config import config
from mixchat.cli.download import calibrate, download
from mixchat.cli.flags.run_flags import RunCommand
from mixchat.cli.flags.settings import apply_config, explained, option, with_flags
from mixchat.cli.models import gc, list_models, repair, rm, show_model, stats, verify
from mixchat.cli.output.messages import print_error
from mixchat.cli.plan import plan
from mixchat.cli.run import run as run_model
from mixchat.cli.serve import serve, worker

_INTERRUPTED = 130
_CLOSED_PIPE = 141
_COMPLETING = "_MIXCHAT_COMPLETE"  # which Typer's scripts for shells set
# More than a model has layers. A terminal's library can use no descriptor above it.
_OPEN_FILES = 1024


app = typer.Typer(
    name="mixchat",
    help="Chat with a mixture-of-experts model that is larger than your machine's memory.",
    rich_markup_mode=None,  # Rich's tables leave texts a third of 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="To begin, 'mixchat run -m demo' tries a small model, and 'mixchat plan' shows which "
    "models fit here.",
)
app.command(
    "run",
    cls=RunCommand,
    epilog="config.toml can give most of these flags: see 'mixchat config --help'.",
)(with_flags(run_model))
_COMMANDS: dict[str, Callable[..., None]] = {
    "serve": with_flags(serve),
    "download": with_flags(download),
    "worker": with_flags(worker),
    "plan": with_flags(plan),
    "list": list_models,
    "show": show_model,
    "verify": verify,
    "repair": repair,
    "calibrate": with_flags(calibrate),
    "rm": rm,
    "gc": gc,
    "stats": stats,
    "bench": with_flags(bench),
    "chats": chats,
}
for _name, _function in _COMMANDS.items():
    app.command(_name)(_function)
# Its error names the file to edit, for those who write 'mixchat config set'.
app.command("config", context_settings={"allow_extra_args": True})(config)


def _print_version(wanted: bool) -> None:
    if wanted:
        printing.show(f"mixchat {__version__}")
        raise typer.Exit


_VERSION = option("-V --version", "Print the version.", callback=_print_version, is_eager=True)


@app.callback(invoke_without_command=True)
def _mixchat(context: typer.Context, version: bool = _VERSION) -> None:
    if context.invoked_subcommand is None:
        printing.show(context.get_help())
        return
    try:
        Path.cwd()
    except FileNotFoundError:  # a library of torch ends the process there
        hint = "Change to another one, or to the new one of the same name: cd ."
        raise UsageError("the working directory was deleted", hint=hint) from None
    apply_config(context)


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one command line (`sys.argv` by default) and exit with its exit code."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - it lives as long as the process
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        # Otherwise the whole answer is computed for nobody, and the exit code is 0.
        hint = "To print nothing, send it to /dev/null: >/dev/null"
        sys.exit(print_error(MixchatError("standard output is closed", hint=hint)))
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # a locale may lack most characters
    system.allow_open_files(_OPEN_FILES)
    # A signal ends it like Ctrl-C, so that unfinished files are removed.
    interrupts.install()
    code = _exit_code(sys.argv[1:] if arguments is None else arguments)
    sys.exit(interrupts.exit_code(code))


def _exit_code(arguments: Sequence[str]) -> int:
    try:
        code = _invoke(arguments)
        sys.stdout.flush()
        return code
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except SystemExit:  # by a signal
        _abandon_output()
        raise
    except Exception as error:
        # A library may raise its own error at Ctrl-C. Nothing is printed then.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__cause__ or cause.__context__
        if code := interrupts.exit_code(0):
            pass
        elif cause is not None:
            code = _INTERRUPTED
        else:
            code = _CLOSED_PIPE if isinstance(error, BrokenPipeError) else print_error(error)
    _abandon_output()
    return code


def _invoke(arguments: Sequence[str]) -> int:
    arguments = list(arguments)
    if _COMPLETING in os.environ:
        app(prog_name="mixchat")  # ends the process
    # `app()` would give a closed pipe exit code 1, and print errors its own way.
    command = typer.main.get_command(app)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    try:
        with command.make_context("mixchat", arguments) as context:
            command.invoke(context)
    except typer.Exit as ending:
        return ending.exit_code
    except typer.BadParameter as error:
        raise explained(error) from None
    return 0


def _abandon_output() -> None:
    """Flush, or drop what Python would fail to flush at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
