"""`mixchat run`: a chat, or one answer."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from mixchat.base.options import LoadOptions
from mixchat.chat.named_prompts import read_named_prompt
from mixchat.chat.saved.cache_saver import checked_cache_file
from mixchat.chat.terminal.open_chat import OpenChat, Resumed, Saving, find_chat
from mixchat.cli.flags import run_flags
from mixchat.cli.flags.arguments import read_files, read_prompt, stdin_is_terminal
from mixchat.cli.flags.run_flags import RunFlags
from mixchat.cli.flags.settings import is_given, value_source
from mixchat.cli.output.print_answer import OutputOptions, print_answer
from mixchat.cli.output.progress import TerminalReporter
from mixchat.face.local_models import LocalModels
from mixchat.serving.answer_file import answer_file
from mixchat.serving.client.server_models import ServerModels, is_served_here
from mixchat.serving.client.server_url import SERVER_IDENTITY, SERVER_PORT

if TYPE_CHECKING:
    from mixchat.base.context import Context
    from mixchat.chat.saved.saved_chat import SavedChat
    from mixchat.chat.session import ModelProvider
    from mixchat.chat.tools.toolbox import Toolbox


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
    --exact-prompts. --prompt-cache replaces an existing FILE only if mixchat wrote it.
    """
    run_flags.check_run_flags(context, flags)
    reporter = TerminalReporter(flags.quiet)
    resumed = find_chat(flags.resume)
    load = LoadOptions(**flags.load)
    parallel = load.parallel
    # Exact prompts make a line's answer the same whichever lines are answered with it.
    load = replace(load, parallel=1) if flags.jsonl is None else replace(load, exact_prompts=True)
    models: LocalModels | ServerModels
    if flags.server:
        models = ServerModels(flags.server, reporter)
    else:
        is_set = value_source(context, "model") != "default"
        models = LocalModels(load, reporter, usual=flags.model, is_set=is_set)
    name = models.choose(
        flags.model if is_given(context, "model") else None,
        None if resumed is None else resumed.model,
        from_server=resumed is not None and resumed.identity == SERVER_IDENTITY,
    )
    size = models.context_of(name)
    if flags.jsonl is not None:
        answer_file(
            models,
            name,
            run_flags.chat_options(context, flags, size, reporter.note),
            reporter,
            prompts=flags.jsonl,
            resume_from=flags.resume_from,
            keep_failed=flags.keep_failed,
            parallel=parallel,
        )
    else:
        _converse(context, flags, models, name, size, resumed, reporter)


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
    if not flags.server and not flags.quiet and is_served_here(name):
        flag = f"--server 127.0.0.1:{SERVER_PORT}"
        reporter.note(f"a server with {name} is running: {flag} answers without loading it again")
    files = read_files(flags.file or [], size, reporter.note)
    words = " ".join(flags.prompt) if flags.prompt else None
    kept = None if flags.kept_prompt is None else read_named_prompt(flags.kept_prompt)
    question = read_prompt(words, files, size, reporter.note, kept)
    output = OutputOptions(flags.as_json, flags.extract, flags.stream, flags.raw)
    output.check(question is None)
    saves = flags.save and (question is None or resumed is not None or is_given(context, "save"))
    new_report = None
    if flags.verbose:
        from mixchat.cli.output.verbose import VerboseReport

        new_report = VerboseReport
    tools = None if flags.server else run_flags.open_tools(flags, reporter.note)
    if tools is not None and question is not None and not flags.quiet:
        _ask_on_stderr(tools)
    chat = OpenChat(
        models,
        name,
        options,
        reporter,
        saving=Saving(saves, cache, flags.keep_cache),
        new_report=new_report,
        form=form,
        resumed=None if resumed is None else Resumed(resumed, run_flags.given_settings(context)),
    )
    chat.tools = tools
    try:
        if question is None:
            from mixchat.chat.terminal.talk import talk
            from mixchat.install.models import DEMO

            title = f"{name}, a toy to see how mixchat works" if name == DEMO else name
            talk(chat, files, title, raw=flags.raw, vi=flags.vi)
        else:
            note = reporter.note
            chat.ask(lambda session: print_answer(session, question, output, name, note))
    finally:
        chat.close()
        if tools is not None:
            tools.servers.close()


def _ask_on_stderr(tools: Toolbox) -> None:
    """Let a person permit tools, if one sits at standard input and standard error."""
    if stdin_is_terminal() and sys.stderr.isatty():
        from mixchat.chat.terminal.screen import Screen
        from mixchat.chat.terminal.tool_permission import ask_permission

        screen = Screen(sys.stderr)
        tools.confirm = lambda name: ask_permission(screen, name)
