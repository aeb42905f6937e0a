"""The flags of sampling and loading. Most are settings, which config.toml can give, too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mixchat.base.model_config import Context
from mixchat.base.quantities import MemoryBudget
from mixchat.chat.plain_text import read_text_file
from mixchat.cli.flags.checks import (
    checked_bits,
    checked_device,
    checked_model,
    checked_policy,
    checked_stops,
    checked_system,
    checked_system_file,
    checked_workers,
    within_limits,
)
from mixchat.cli.flags.config_flag import (
    AGAIN,
    chosen,
    setting,
    setting_argument,
    settings_of,
)
from mixchat.cli.flags.shell_completion import one_of, runnable_models
from mixchat.experts.cache import POLICIES

# Where a flag is not given, the model's generation_config.json decides, then the engine.
Model = Annotated[
    str,
    setting(
        "-m",
        "--model",
        metavar="NAME",
        check=checked_model,
        autocompletion=runnable_models,
        help="base, instruct, demo, ORG/NAME, or a name that 'mixchat list' shows.",
    ),
]
System = Annotated[
    str | None,
    setting(
        "-s",
        "--system",
        metavar="TEXT",
        check=checked_system,
        help="System prompt; an empty one removes it.",
    ),
]
SystemFile = Annotated[
    Path | None,
    setting(
        "--system-file",
        metavar="FILE",
        check=checked_system_file,
        help="Take the system prompt from FILE, in place of --system.",
    ),
]
Temperature = Annotated[
    float | None,
    setting(
        "--temp",
        "--temperature",
        check=within_limits("temperature"),
        metavar="X",
        help="Sampling temperature; 0 is greedy.",
        show_default="the model's, else 0.7",
    ),
]
TopP = Annotated[
    float | None,
    setting(
        "--top-p",
        check=within_limits("top_p"),
        metavar="X",
        help="Sample from the smallest set of tokens whose probabilities sum to X.",
        show_default="the model's, else 1",
    ),
]
TopK = Annotated[
    int | None,
    setting(
        "--top-k",
        check=within_limits("top_k"),
        metavar="N",
        help="Sample from the N most likely tokens; 0: from all.",
        show_default="the model's, else 0",
    ),
]
MinP = Annotated[
    float | None,
    setting(
        "--min-p",
        check=within_limits("min_p"),
        metavar="X",
        help="Drop tokens less likely than X times the most likely one.",
        show_default="the model's, else 0",
    ),
]
RepeatPenalty = Annotated[
    float | None,
    setting(
        "--repeat-penalty",
        check=within_limits("repeat_penalty"),
        metavar="X",
        help="Penalty for tokens that occur among the last 64; 1: none.",
        show_default="the model's, else 1",
    ),
]
Seed = Annotated[
    int | None,
    setting(
        "--seed",
        check=within_limits("seed"),
        metavar="N",
        help="The same seed gives the same answers to the same questions, with the same settings "
        "on the same machine; after --resume or --prompt-cache only with --exact-prompts.",
        show_default="random",
    ),
]
MaxTokens = Annotated[
    int | None,
    setting(
        "-n",
        "--max-tokens",
        check=within_limits("max_tokens"),
        metavar="N",
        help="Maximum length of an answer in tokens; 0: as many as fit.",
        show_default="the model's, else a quarter of the context",
    ),
]
Stop = Annotated[
    list[str] | None,
    setting(
        "--stop",
        check=checked_stops,
        metavar="TEXT",
        help=f"End the answer before TEXT; {AGAIN}.",
    ),
]
ContextSize = Annotated[
    int | None,
    setting(
        "--ctx-size",
        check=within_limits("ctx_size"),
        metavar="N",
        help="Context size in tokens.",
        show_default="the model's, at most 8192",
    ),
]
Parallel = Annotated[
    int,
    setting(
        "--parallel",
        metavar="N",
        min=1,
        max=64,
        help="Answers that are generated at once, each with a context of its own.",
    ),
]
KVBits = Annotated[
    int | None,
    setting(
        "--kv-bits",
        check=checked_bits,
        autocompletion=one_of("8", "16"),
        metavar="N",
        help="Bits of each number in the KV cache: 16, or 8 to halve its memory.",
        show_default="16",
    ),
]
ExactPrompts = Annotated[
    bool,
    setting(
        "--exact-prompts/--no-exact-prompts",
        show_default=False,
        help="Process prompts with the arithmetic of decoding: slower, but the answers are the "
        "same whether a chat continues, is resumed, or comes from a cache.",
    ),
]
HostMemory = Annotated[
    str | None,
    setting(
        "--host-memory",
        check=MemoryBudget.parse,
        metavar="SIZE",
        help="RAM for experts: 300MB, 8GiB, or 50% of all experts.",
        show_default="all that fits",
    ),
]
DeviceMemory = Annotated[
    str | None,
    setting(
        "--device-memory",
        check=MemoryBudget.parse_list,
        metavar="SIZE",
        help="GPU memory to use: 8GB, or 50% of the free GPU memory; 12GB,8GB of two GPUs.",
        show_default="all that fits",
    ),
]
CachePolicy = Annotated[
    str,
    setting(
        "--cache-policy",
        check=checked_policy,
        autocompletion=one_of(*POLICIES),
        metavar="NAME",
        help="Experts that stay in memory: most recently used, counted by layer (layered) or "
        "overall (lru).",
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write which experts each token is routed to, as JSON Lines. An existing FILE is "
        "replaced only if it is a trace.",
    ),
]
PromptCache = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Save the KV cache in FILE; the next run then processes only what is new. An existing "
        "FILE is replaced only if it is a prompt cache.",
    ),
]
Device = Annotated[
    str | None,
    setting(
        "--device",
        check=checked_device,
        autocompletion=one_of("cpu", "cuda"),
        metavar="NAME",
        help="cpu, cuda (all GPUs), cuda:N, or several: cuda:0,cuda:1.",
        show_default="cuda if there is a GPU, else cpu",
    ),
]
Worker = Annotated[
    list[str] | None,
    setting(
        "--worker",
        check=checked_workers,
        metavar="HOST[:PORT]",
        help=f"Compute experts on the machine HOST, too, where 'mixchat worker' runs; {AGAIN}.",
    ),
]
KeyFile = Annotated[
    Path | None,
    setting(
        "--key-file",
        metavar="FILE",
        help="The workers' key, which 'mixchat worker --new-key' makes.",
        show_default="worker.key in the data directory",
    ),
]
Verbose = Annotated[
    bool,
    setting(
        "--verbose/--no-verbose",
        show_default=False,
        help="Print speeds and expert cache figures after each answer.",
    ),
]


def model_argument(help: str, **about: Any) -> Any:
    """Return the argument MODEL of a command; where it is left out, the setting `model` counts."""
    return setting_argument(
        "model",
        metavar="MODEL",
        check=checked_model,
        autocompletion=runnable_models,
        help=help,
        **about,
    )


def key_path(path: Path | None) -> Path | None:
    """Return the path of the key, if one was given; a ~ in front is the home directory."""
    return None if path is None else expanded(path)


def expanded(path: Path) -> Path:
    """Return a path with the home directory for a ~ in front.

    A shell replaces none in --key-file=~/FILE, in a variable or in config.toml.
    """
    return Path(os.path.expanduser(path))


def system_prompt(context: typer.Context, size: Context) -> str | None:
    """Return the text of --system, or of the file of --system-file; None without one.

    Raises `UsageError` where both are given, `PromptError` where the file is empty, not text, too
    long for the context, or cannot be read.
    """
    settings = settings_of(context.command)
    setting = chosen(context, settings["system"], settings["system-file"])
    if setting is None:
        return None
    value = context.params[setting.name]
    if setting.name == "system":
        return value or None
    return read_text_file(expanded(value), size)


def budget(text: str | None) -> MemoryBudget | None:
    """Return the amount of memory, if one was given. Raises `UsageError`."""
    return None if text is None else MemoryBudget.parse(text)


def budgets(text: str | None) -> tuple[MemoryBudget, ...]:
    """Return the amounts of memory that were given. Raises `UsageError`."""
    return () if text is None else MemoryBudget.parse_list(text)
