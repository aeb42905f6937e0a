"""`mixchat run`: a chat, or one answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from mixchat.base.options import LoadOptions
from mixchat.base.progress import Reporter
from mixchat.chat.saved.cache_saver import checked_cache_file
from mixchat.chat.terminal.open_chat import OpenChat, Resumed, Saving, find_chat
from mixchat.cli.flags import load_flags, run_flags
from mixchat.cli.flags.arguments import read_files, read_prompt
from mixchat.cli.flags.run_flags import RunFlags
from mixchat.cli.flags.settings import is_given
from mixchat.cli.output.print_answer import OutputOptions, print_answer
from mixchat.cli.output.progress import TerminalReporter
from mixchat.face.local_models import LocalModels
from mixchat.serving.answer_file import LineFiles, answer_file
from mixchat.serving.client.server_models import ServerModels, is_served_here
from mixchat.serving.client.server_url import SERVER_IDENTITY, SERVER_PORT

if TYPE_CHECKING:
    from mixchat.base.context import Context
    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.session import ChatSession, ModelProvider
    from mixchat.chat.terminal.active_chat import AfterTurn
    from mixchat.face.reading_time import Predictor


def run(context: typer.Context, flags: RunFlags) -> None:
    """Chat with a model, or print one answer to a PROMPT or a pipe.

    Piped text goes before the PROMPT. A PROMPT of - is the piped text alone, and </dev/null leaves
    it out. 'mixchat run --server' asks a running 'mixchat serve'. Then -m names one of its models,
    by default the first, and MIXCHAT_API_KEY holds its key.

    --jsonl answers a file of prompts, --parallel of them at once. A line may have an "id", and
    fields of requests to 'mixchat serve'. The answers come in order, a JSON object a line. The same
    command with --resume-from resumes an interrupted run, and tries failed lines again. If a line
    has several answers then, the last one counts.

    After --resume or with --prompt-cache, a --seed gives the same answer again only with
    --exact-prompts. --trace and --prompt-cache replace an existing FILE only if mixchat wrote it.
    """
    run_flags.check_run_flags(context, flags)
    reporter = TerminalReporter(flags.quiet)
    resumed = find_chat(flags.resume)
    load = load_flags.load_options(flags, parallel=1)
    if flags.jsonl is not None:
        # Exact prompts make a line's answer the same whichever lines are answered with it.
        load = replace(load, exact_prompts=True, parallel=flags.parallel)
    models = _models(flags, load, reporter)
    name = models.choose(
        flags.model if is_given(context, "model") else None,
        None if resumed is None else resumed.model,
        from_server=resumed is not None and resumed.identity == SERVER_IDENTITY,
    )
    size = models.context_of(name)
    if flags.jsonl is not None:
        files = LineFiles(flags.jsonl, flags.resume_from, flags.keep_failed, flags.parallel)
        options = run_flags.chat_options(context, flags, size, reporter.note)
        answer_file(models, name, options, files, reporter)
    else:
        _converse(context, flags, models, name, size, resumed, reporter)


def _models(flags: RunFlags, load: LoadOptions, reporter: Reporter) -> LocalModels | ServerModels:
    """Check the flags' files, and return the models of the server or of this machine."""
    if load.trace is not None:
        from mixchat.experts.trace import trace_file

        trace_file(load.trace).check()
    if flags.server:
        return ServerModels(flags.server, reporter)
    return LocalModels(load, reporter, usual=flags.model)


def _converse(
    context: typer.Context,
    flags: RunFlags,
    models: ModelProvider,
    name: str,
    size: Context,
    resumed: SavedChat | None,
    reporter: TerminalReporter,
) -> None:
    options = run_flags.chat_options(context, flags, size, reporter.note)
    form = run_flags.read_form(flags, reporter.note)
    cache = None if flags.prompt_cache is None else checked_cache_file(flags.prompt_cache)
    if not flags.server:
        _note_server(name, reporter)
    files = read_files(flags.file or [], size, reporter.note)
    words = " ".join(flags.prompt) if flags.prompt else None
    question = read_prompt(words, files, size, reporter.note)
    output = OutputOptions(flags.as_json, flags.extract, flags.stream, flags.raw)
    output.check(question is None)
    saved_by_default = question is None or resumed is not None
    chat = OpenChat(
        models,
        name,
        options,
        reporter,
        new_report=_verbose_report if flags.verbose else _no_report,
        saving=Saving(
            flags.save and (saved_by_default or is_given(context, "save")), cache, flags.keep_cache
        ),
        form=form,
        resumed=None if resumed is None else Resumed(resumed, run_flags.given_settings(context)),
    )
    try:
        if question is None:
            chat.talk(files, raw=flags.raw, vi=flags.vi)
        else:
            note = reporter.note
            chat.ask(lambda session: print_answer(session, question, output, name, note))
    finally:
        chat.close()


def _verbose_report(session: ChatSession, predictor: Predictor) -> AfterTurn:
    from mixchat.cli.output.verbose import VerboseReport

    return VerboseReport(session.model.engine, predictor)


def _no_report(session: ChatSession, predictor: Predictor) -> AfterTurn:
    return lambda end: None


def _note_server(model: str, reporter: TerminalReporter) -> None:
    """Tell of a server here that has the model."""
    if not reporter.quiet and is_served_here(model):
        flag = f"--server 127.0.0.1:{SERVER_PORT}"
        reporter.note(f"a server with {model} is running: {flag} answers without loading it again")
