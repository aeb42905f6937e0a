"""`mixchat run`: a chat in the terminal, or one answer for a prompt or a pipe."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from mixchat.base.options import DEFAULT_POLICY, LoadOptions
from mixchat.chat.parameters import SAMPLING, checked_overflow
from mixchat.cli.cache_file import NamedFile
from mixchat.cli.change_model import save_report
from mixchat.cli.flags import chat_flags, model_flags
from mixchat.cli.flags.arguments import read_files, read_prompt
from mixchat.cli.flags.checks import checked_bits
from mixchat.cli.flags.config_flag import is_given
from mixchat.cli.jsonl import answer_file
from mixchat.cli.local_models import LocalModels
from mixchat.cli.model_provider import LineRequest, ModelProvider
from mixchat.cli.output.print_answer import OutputOptions, print_answer
from mixchat.cli.server_chat import ServerModels, check_flags
from mixchat.cli.start_chat import find_chat, new_saver, saved_turn, start_chat
from mixchat.cli.worker import serve_rank_0
from mixchat.engine.environment import prepare_environment
from mixchat.experts.workers import torchrun

if TYPE_CHECKING:
    from mixchat.chat.session import ChatSession, Finished
    from mixchat.chat.terminal.active_chat import AfterTurn, Predict
    from mixchat.planning.plan import Prediction

# `run` has a parameter of the same name for each of these options of sampling.
_SAMPLING = tuple(parameter.field for parameter in SAMPLING.values())
# The settings of a saved chat, each where this flag is not given.
_RESUMED = (("system", "system"), ("system", "system_file"), *((name, name) for name in _SAMPLING))


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
    file: chat_flags.File = None,
    model: model_flags.Model = "instruct",
    server: chat_flags.Server = None,
    system: model_flags.System = None,
    system_file: model_flags.SystemFile = None,
    temperature: model_flags.Temperature = None,
    top_p: model_flags.TopP = None,
    top_k: model_flags.TopK = None,
    min_p: model_flags.MinP = None,
    repeat_penalty: model_flags.RepeatPenalty = None,
    seed: model_flags.Seed = None,
    max_tokens: model_flags.MaxTokens = None,
    stop: model_flags.Stop = None,
    schema: chat_flags.Schema = None,
    grammar: chat_flags.Grammar = None,
    ctx_size: model_flags.ContextSize = None,
    overflow: chat_flags.Overflow = "stop",
    resume: chat_flags.Resume = None,
    save: chat_flags.Save = True,
    keep_cache: chat_flags.KeepCache = False,
    raw: chat_flags.Raw = False,
    vi: chat_flags.Vi = False,
    as_json: chat_flags.AsJson = False,
    extract: chat_flags.Extract = False,
    jsonl: chat_flags.JSONLines = None,
    resume_from: chat_flags.ResumeFrom = None,
    keep_failed: chat_flags.KeepFailed = False,
    parallel: model_flags.Parallel = 4,
    stream: chat_flags.Stream = True,
    quiet: chat_flags.Quiet = False,
    kv_bits: model_flags.KVBits = None,
    exact_prompts: model_flags.ExactPrompts = False,
    host_memory: model_flags.HostMemory = None,
    device_memory: model_flags.DeviceMemory = None,
    device: model_flags.Device = None,
    worker: model_flags.Worker = None,
    key_file: model_flags.KeyFile = None,
    cache_policy: model_flags.CachePolicy = DEFAULT_POLICY,
    prompt_cache: model_flags.PromptCache = None,
    trace: model_flags.Trace = None,
    verbose: model_flags.Verbose = False,
) -> None:
    """Chat with a model, or print one answer to a PROMPT or a pipe."""
    output = OutputOptions(as_json, extract, stream, raw, quiet)
    chat_flags.check_first_word(context, prompt or [])
    chat_flags.check_lines(context)
    if server:
        check_flags(context)
    form = chat_flags.read_form(schema, grammar)
    named_file = None if prompt_cache is None else NamedFile.checked(prompt_cache)
    if trace is not None:
        from mixchat.experts.trace import trace_file

        trace_file(trace).check()
    resumed = find_chat(resume)
    load = LoadOptions(
        host_memory=model_flags.budget(host_memory),
        device_memory=model_flags.budgets(device_memory),
        context_size=ctx_size,
        kv_bits=checked_bits(kv_bits),
        exact_prompts=exact_prompts,
        device=device,
        cache_policy=cache_policy,
        trace=trace,
        workers=(*(worker or ()), *_torchrun_workers()),
        key_file=model_flags.key_path(key_file),
    )
    sampling = {name: context.params[name] for name in _SAMPLING}
    place: ModelProvider = (
        ServerModels(server, output, form)
        if server
        else LocalModels(
            load, output, form, usual=model, named_file=named_file, keep_cache=keep_cache
        )
    )
    model = place.choose(model if is_given(context, "model") else None, resumed)
    if not server and torchrun.rank():
        serve_rank_0(model, load)
        return
    model_context = place.context_of(model)
    system_prompt = model_flags.system_prompt(context, model_context)
    if jsonl is not None:
        request = LineRequest(
            jsonl,
            resume_from,
            keep_failed,
            parallel,
            sampling=sampling,
            system=system_prompt,
            max_tokens=max_tokens,
            stop=stop or [],
        )
        try:
            answer_file(place, model, request, output.note)
        finally:
            torchrun.end()
        return
    if not server:
        _note_server(model, output)
    files = read_files(file or [], model_context, output.note)
    question = read_prompt(" ".join(prompt) if prompt else None, files, model_context, output.note)
    output.check(question is None)
    open_model = partial(
        place.open,
        sampling=sampling,
        system=system_prompt,
        max_tokens=max_tokens,
        stop=stop or [],
        overflow=checked_overflow(overflow),
    )
    session = open_model(model)
    saves = save and (question is None or resumed is not None or is_given(context, "save"))
    saver = new_saver(session, model, autosave=saves)
    if resumed is not None:
        saver.resume(resumed, except_for=[of for of, flag in _RESUMED if is_given(context, flag)])

    def hooks(model: str) -> tuple[AfterTurn, Predict]:
        predict = place.predictor(session, model)
        after_turn = _verbose_report(session, predict) if verbose else _nothing
        return after_turn, _reading_seconds(predict)

    after_turn, predict = hooks(model)
    try:
        with place.cache(saver, asks_once=question is not None) as cache:
            if question is None:
                start_chat(
                    saver,
                    cache,
                    place.changer(saver, open_model, hooks),
                    files,
                    raw=raw,
                    vi=vi,
                    after_turn=after_turn,
                    predict=predict,
                )
            else:
                with saved_turn(saver):
                    after_turn(print_answer(session, question, output, model))
    finally:
        torchrun.end()
        save_report(session, saver.model)


def _torchrun_workers() -> tuple[str, ...]:
    """Return the addresses of the workers that torchrun started, for their rank 0."""
    if torchrun.rank() != 0:
        return ()
    prepare_environment()
    return torchrun.published()


def _verbose_report(
    session: ChatSession, predict: Callable[[], Prediction | None]
) -> Callable[[Finished], None]:
    from mixchat.cli.output.verbose import VerboseReport

    return VerboseReport(session.backend.engine, predict)


def _reading_seconds(
    predict: Callable[[], Prediction | None],
) -> Callable[[int, bool], float | None]:
    """Return a function that predicts the seconds of a prompt, in the first turn or later."""

    def seconds(tokens: int, first: bool) -> float | None:
        predicted = predict()
        speed = None if predicted is None else predicted.prompt(tokens, cold=first)
        return None if speed is None else 2 * tokens / (speed.low + speed.high)

    return seconds


def _note_server(model: str, output: OutputOptions) -> None:
    """Tell of a server on this machine that has the model loaded already."""
    from mixchat.serving.client.local_server import is_served_here
    from mixchat.serving.client.server_url import SERVER_PORT

    if not output.quiet and is_served_here(model):
        flag = f"--server 127.0.0.1:{SERVER_PORT}"
        output.note(f"a server with {model} is running: {flag} answers without loading it again")


def _nothing(finished: Finished) -> None:
    """Print nothing after a turn."""
