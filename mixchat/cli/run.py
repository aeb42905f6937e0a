"""`mixchat run`: a chat, or one answer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from mixchat.base.options import DEFAULT_POLICY, LoadOptions
from mixchat.base.progress import Reporter
from mixchat.chat.printing import say
from mixchat.cli.flags import load_flags, run_flags
from mixchat.cli.flags.arguments import read_files, read_prompt
from mixchat.cli.flags.settings import is_given
from mixchat.cli.output.print_answer import OutputOptions, print_answer
from mixchat.cli.output.progress import TerminalReporter
from mixchat.engine.environment import prepare_environment
from mixchat.experts.workers import torchrun
from mixchat.sessions.answer_lines import LineFiles, answer_file
from mixchat.sessions.cache_file import checked_cache_file
from mixchat.sessions.local_models import LocalModels
from mixchat.sessions.open_chat import OpenChat, find_chat
from mixchat.sessions.server_models import ServerModels
from mixchat.sessions.servers import serve_rank_0

if TYPE_CHECKING:
    from mixchat.base.model_config import Context
    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.session import ChatSession
    from mixchat.chat.terminal.active_chat import AfterTurn
    from mixchat.sessions.provider import ChatOptions, ModelProvider, Predictor


def run(
    context: typer.Context,
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="The question. Standard input goes before it, unless it is a terminal; "
            "</dev/null leaves it out. A single - reads the question from standard input.",
        ),
    ] = None,
    file: run_flags.File = None,
    model: load_flags.Model = "instruct",
    server: run_flags.Server = None,
    system: run_flags.System = None,
    system_file: run_flags.SystemFile = None,
    temperature: run_flags.Temperature = None,
    top_p: run_flags.TopP = None,
    top_k: run_flags.TopK = None,
    min_p: run_flags.MinP = None,
    repeat_penalty: run_flags.RepeatPenalty = None,
    seed: run_flags.Seed = None,
    max_tokens: run_flags.MaxTokens = None,
    stop: run_flags.Stop = None,
    schema: run_flags.Schema = None,
    grammar: run_flags.Grammar = None,
    ctx_size: load_flags.ContextSize = None,
    overflow: run_flags.Overflow = "stop",
    think: run_flags.Think = "show",
    resume: run_flags.Resume = None,
    save: run_flags.Save = True,
    keep_cache: run_flags.KeepCache = False,
    raw: run_flags.Raw = False,
    vi: run_flags.Vi = False,
    as_json: run_flags.AnswerAsJson = False,
    extract: run_flags.Extract = False,
    jsonl: run_flags.JSONLines = None,
    resume_from: run_flags.ResumeFrom = None,
    keep_failed: run_flags.KeepFailed = False,
    parallel: load_flags.Parallel = 4,
    stream: run_flags.Stream = True,
    quiet: run_flags.Quiet = False,
    kv_bits: load_flags.KVBits = None,
    exact_prompts: load_flags.ExactPrompts = False,
    host_memory: load_flags.HostMemory = None,
    device_memory: load_flags.DeviceMemory = None,
    device: load_flags.Device = None,
    worker: load_flags.Worker = None,
    key_file: load_flags.KeyFile = None,
    cache_policy: load_flags.CachePolicy = DEFAULT_POLICY,
    prompt_cache: run_flags.PromptCache = None,
    trace: load_flags.Trace = None,
    verbose: run_flags.Verbose = False,
) -> None:
    """Chat with a model, or print one answer to a PROMPT or a pipe."""
    run_flags.check_run_flags(context)
    reporter = TerminalReporter(quiet)
    resumed = find_chat(resume)
    load = load_flags.load_options(context.params, parallel=1)
    models = _models(context, load, reporter)
    name = models.choose(model if is_given(context, "model") else None, resumed)
    if torchrun.rank() and not server:
        serve_rank_0(name, load, reporter, say)
        return
    size = models.context_of(name)
    options = run_flags.chat_options(context, size)
    try:
        if jsonl is not None:
            files = LineFiles(jsonl, resume_from, keep_failed, parallel)
            answer_file(models, name, options, files, reporter)
        else:
            _converse(context, models, name, options, size, resumed, reporter)
    finally:
        torchrun.end()


def _models(context: typer.Context, load: LoadOptions, reporter: Reporter) -> ModelProvider:
    """Check the flags' files, and return the models of the server or of this machine."""
    flags = context.params
    form = run_flags.read_form(flags["schema"], flags["grammar"])
    cache, trace = flags["prompt_cache"], load.trace
    named = None if cache is None else checked_cache_file(cache)
    if trace is not None:
        from mixchat.experts.trace import trace_file

        trace_file(trace).check()
    if flags["server"]:
        return ServerModels(flags["server"], form, reporter)
    if torchrun.rank() == 0:
        prepare_environment()
        load = replace(load, workers=(*load.workers, *torchrun.published()))
    return LocalModels(
        load,
        reporter,
        usual=flags["model"],
        form=form,
        prompt_cache=named,
        keep_cache=flags["keep_cache"],
    )


def _converse(
    context: typer.Context,
    models: ModelProvider,
    name: str,
    options: ChatOptions,
    size: Context,
    resumed: SavedChat | None,
    reporter: TerminalReporter,
) -> None:
    flags = context.params
    if not flags["server"]:
        _note_server(name, reporter)
    words, note = flags["prompt"], reporter.note
    files = read_files(flags["file"] or [], size, note)
    question = read_prompt(" ".join(words) if words else None, files, size, note)
    output = OutputOptions(flags["as_json"], flags["extract"], flags["stream"], flags["raw"])
    output.check(question is None)
    saved_by_default = question is None or resumed is not None
    chat = OpenChat(
        models,
        name,
        options,
        reporter,
        new_report=_verbose_report if flags["verbose"] else _no_report,
        autosave=flags["save"] and (saved_by_default or is_given(context, "save")),
        resumed=resumed,
        except_for=run_flags.given_settings(context),
    )
    try:
        if question is None:
            chat.talk(files, raw=output.raw, vi=flags["vi"])
        else:
            chat.ask(partial(print_answer, question=question, output=output, model=name, note=note))
    finally:
        chat.close()


def _verbose_report(session: ChatSession, predictor: Predictor) -> AfterTurn:
    from mixchat.cli.output.verbose import VerboseReport

    return VerboseReport(session.backend.engine, predictor)


def _no_report(session: ChatSession, predictor: Predictor) -> AfterTurn:
    return lambda finished: None


def _note_server(model: str, reporter: TerminalReporter) -> None:
    """Tell of a server here that has the model."""
    from mixchat.serving.client.local_server import is_served_here
    from mixchat.serving.client.server_url import SERVER_PORT

    if not reporter.quiet and is_served_here(model):
        flag = f"--server 127.0.0.1:{SERVER_PORT}"
        reporter.note(f"a server with {model} is running: {flag} answers without loading it again")
