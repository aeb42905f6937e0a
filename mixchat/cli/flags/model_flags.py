"""The flags of sampling and loading, each of which config.toml and a variable can give, too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mixchat.cli.flags.checks import (
    checked_bits,
    checked_device,
    checked_model,
    checked_policy,
    checked_stops,
    checked_system,
    within_limits,
)
from mixchat.cli.flags.config_flag import AGAIN, setting, setting_argument
from mixchat.cli.flags.shell_completion import among, runnable_models
from mixchat.experts.policies import POLICIES
from mixchat.quantities import MemoryBudget

# Where a flag is not given, the model's generation_config.json decides, then the engine.
Model = Annotated[
    str,
    setting(
        "-m",
        "--model",
        metavar="NAME",
        check=checked_model,
        autocompletion=runnable_models,
        help="base, instruct, demo, ORG/NAME, or one that 'mixchat list' shows.",
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
        help="Sample from the N likeliest tokens; 0: from all.",
        show_default="the model's, else 0",
    ),
]
MinP = Annotated[
    float | None,
    setting(
        "--min-p",
        check=within_limits("min_p"),
        metavar="X",
        help="Drop tokens below this fraction of the top token's probability.",
        show_default="the model's, else 0",
    ),
]
RepeatPenalty = Annotated[
    float | None,
    setting(
        "--repeat-penalty",
        check=within_limits("repeat_penalty"),
        metavar="X",
        help="Penalty on tokens that were used recently; 1: none.",
        show_default="the model's, else 1",
    ),
]
Seed = Annotated[
    int | None,
    setting(
        "--seed",
        check=within_limits("seed"),
        metavar="N",
        help="The same seed gives the same text to the same questions, with the same settings on "
        "the same machine; after --resume or --prompt-cache only with --exact-prompts.",
        show_default="drawn",
    ),
]
MaxTokens = Annotated[
    int | None,
    setting(
        "-n",
        "--max-tokens",
        check=within_limits("max_tokens"),
        metavar="N",
        help="Most tokens of an answer; 0: all that fit.",
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
        show_default="at most 8192",
    ),
]
KVBits = Annotated[
    int | None,
    setting(
        "--kv-bits",
        check=checked_bits,
        autocompletion=among("8", "16"),
        metavar="N",
        help="KV cache precision: 16 or 8 bits; 8 halves its memory.",
        show_default="16",
    ),
]
ExactPrompts = Annotated[
    bool,
    setting(
        "--exact-prompts/--no-exact-prompts",
        show_default=False,
        help="Read prompts with the arithmetic of decoding: slower, and the same text whether a "
        "chat continues, is resumed, or comes from a cache.",
    ),
]
HostMemory = Annotated[
    str | None,
    setting(
        "--host-memory",
        "--expert-memory",
        check=MemoryBudget.parse,
        metavar="SIZE",
        help="RAM for experts: 300MB, 8GiB, or 50% of all experts.",
        show_default="what fits",
    ),
]
DeviceMemory = Annotated[
    str | None,
    setting(
        "--device-memory",
        check=MemoryBudget.parse,
        metavar="SIZE",
        help="GPU memory to use: 8GB, or 50% of the free GPU memory.",
        show_default="what fits",
    ),
]
CachePolicy = Annotated[
    str,
    setting(
        "--cache-policy",
        check=checked_policy,
        autocompletion=among(*POLICIES),
        metavar="NAME",
        help="Experts that stay: most recently used (layered, lru), or most often used (lfu).",
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write which experts each token went to, as JSON Lines. Only a trace is replaced.",
    ),
]
PromptCache = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Keep what the model has read in FILE; the next run resumes from it. "
        "Only a prompt cache is replaced.",
    ),
]
Device = Annotated[
    str | None,
    setting(
        "--device",
        check=checked_device,
        autocompletion=among("cpu", "cuda"),
        metavar="NAME",
        help="cpu, cuda or cuda:N.",
        show_default="the best there is",
    ),
]
Verbose = Annotated[
    bool,
    setting(
        "--verbose/--no-verbose",
        show_default=False,
        help="Print rates and the experts' cache afterwards.",
    ),
]


def model_argument(help: str) -> Any:
    """The argument MODEL of a command that takes the setting `model` where it is left out."""
    return setting_argument(
        "model",
        metavar="MODEL",
        check=checked_model,
        autocompletion=runnable_models,
        help=help,
    )


def budget(text: str | None) -> MemoryBudget | None:
    """An amount of memory, if one was given. Raises `UsageError`."""
    return None if text is None else MemoryBudget.parse(text)
