"""The command line: the commands, and the one place where an error becomes an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, NoReturn

import typer

from mixchat import __version__
from mixchat.cli.bench import bench
from mixchat.cli.download import download
from mixchat.cli.models import list_models, show
from mixchat.cli.plan import plan
from mixchat.cli.report import report
from mixchat.cli.run import run as run_model
from mixchat.cli.simulate import simulate
from mixchat.cli.stats import stats
from mixchat.cli.upkeep import convert, gc, repair, rm, verify

INTERRUPTED = 130
CLOSED_PIPE = 141

app = typer.Typer(
    name="mixchat",
    help="Chat with a mixture-of-experts model that is larger than your machine's memory.",
    add_completion=False,
    # Rich would add a third to the time that --help takes, and reads brackets as markup.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run_model)
app.command("download")(download)
app.command("plan")(plan)
app.command("list")(list_models)
app.command("show")(show)
app.command("verify")(verify)
app.command("repair")(repair)
app.command("convert")(convert)
app.command("rm")(rm)
app.command("gc")(gc)
app.command("stats")(stats)
app.command("simulate")(simulate)
app.command("bench")(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mixchat {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _mixchat(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one command line (`sys.argv` by default) and exit with its exit code."""
    _prepare_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    sys.exit(_exit_code(sys.argv[1:] if arguments is None else arguments))


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Go as Ctrl-C would make us go, so that what is half-built is removed on the way out."""
    sys.exit(128 + number)


def _exit_code(arguments: Sequence[str]) -> int:
    try:
        code = _invoke(arguments)
        sys.stdout.flush()
        return code
    except (KeyboardInterrupt, typer.Abort):
        _abandon_output()
        return INTERRUPTED
    except Exception as error:
        code = CLOSED_PIPE if _is_closed_pipe(error) else report(error)
        _abandon_output()
        return code


def _invoke(arguments: Sequence[str]) -> int:
    # Not `app()`: that turns a closed pipe into exit code 1, and prints errors its own way.
    command = typer.main.get_command(app)
    try:
        with command.make_context("mixchat", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as ending:
        return ending.exit_code
    return 0


def _is_closed_pipe(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def _prepare_streams() -> None:
    """Let there be an output, and let no character be able to break it."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it lives as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")


def _abandon_output() -> None:
    """Flush what can be flushed; else Python would try again at exit, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
