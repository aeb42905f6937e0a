"""The flags of sampling and loading, and the limits that their values have to keep."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from mixchat.errors import UsageError
from mixchat.experts.policies import POLICIES
from mixchat.settings import MemoryBudget

if TYPE_CHECKING:
    from mixchat.engine.sampling import SamplingOptions

# Where a flag is not given, the model's generation_config.json decides, then the engine.
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temp",
        "--temperature",
        metavar="X",
        help="How freely to choose; 0 is greedy.",
        show_default="the model's, else 0.7",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Choose among the likeliest tokens of this total chance.",
        show_default="the model's, else 1",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Choose among the N likeliest tokens; 0: among all.",
        show_default="the model's, else 0",
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Leave out what is below this part of the best chance.",
        show_default="the model's, else 0",
    ),
]
RepeatPenalty = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Above 1: avoid tokens that were there already.",
        show_default="the model's, else 1",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(metavar="N", help="The same seed gives the same text.", show_default="drawn"),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "-n", "--max-tokens", metavar="N", help="The longest answer.", show_default="what fits"
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End the answer before TEXT; may be given again."),
]
ContextSize = Annotated[
    int | None,
    typer.Option(metavar="N", help="Tokens of the conversation.", show_default="at most 8192"),
]
KVBits = Annotated[
    int | None,
    typer.Option(
        "--kv-bits",
        metavar="N",
        help="Bits of a number in the KV cache; 8 takes half of the memory.",
        show_default="16",
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        "--host-memory",
        "--expert-memory",
        metavar="SIZE",
        help="RAM for experts: 300MB, 8GiB, or 50% of all of them.",
        show_default="what fits",
    ),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What may be taken of a GPU's memory: 8GB, or 50% of what is free.",
        show_default="what fits",
    ),
]
CachePolicy = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Which experts stay: layered or lru (those used last), or lfu (most often).",
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write which experts each token went to, as JSON Lines."),
]
PromptCache = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Keep what the model has read in FILE; the next run goes on from it."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.", show_default="the best there is"),
]


@dataclass(frozen=True)
class Sampling:
    """`SamplingOptions` as the command line gives them: checked before anything heavy is loaded.

    None is what was not given.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None

    def check(self) -> None:
        """Raise `UsageError` for the first value outside its limits; NaN is outside of all."""
        for name, (flag, fits, limits) in _LIMITS.items():
            value = getattr(self, name)
            _require(flag, value, value is None or fits(value), limits)

    def options(self, own: Mapping[str, Any] = MappingProxyType({})) -> SamplingOptions:
        """The same for the engine, `own` being what the model's makers advise.

        What they advise beyond the limits is left out. A seed is drawn here, so that it can be
        shown and repeated.
        """
        from mixchat.engine.sampling import SamplingOptions

        advised = {k: v for k, v in own.items() if _LIMITS[k][1](v)}
        given = {key: value for key, value in asdict(self).items() if value is not None}
        return SamplingOptions(**{"seed": secrets.randbelow(2**32), **advised, **given})


_Fits = Callable[[Any], bool]
_LIMITS: dict[str, tuple[str, _Fits, str]] = {
    "temperature": ("--temp", lambda x: 0 <= x < math.inf, "0 or more"),
    "top_p": ("--top-p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "top_k": ("--top-k", lambda x: x >= 0, "0 or more"),
    "min_p": ("--min-p", lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "repeat_penalty": ("--repeat-penalty", lambda x: 0.01 <= x <= 100, "between 0.01 and 100"),
    "seed": ("--seed", lambda x: 0 <= x < 2**63, "between 0 and 9223372036854775807"),
}


def budget(text: str | None) -> MemoryBudget | None:
    """An amount of memory, if one was given. Raises `UsageError`."""
    return None if text is None else MemoryBudget.parse(text)


def checked_policy(name: str) -> str:
    """The name, if it is a cache policy's. Raises `UsageError`."""
    if name not in POLICIES:
        raise UsageError(f"--cache-policy has to be {', '.join(POLICIES)}, not {name!r}")
    return name


def checked_bits(bits: int | None) -> Literal[8, 16] | None:
    """The bits, if a KV cache can have them. Raises `UsageError`."""
    if bits is None or bits == 8 or bits == 16:
        return cast("Literal[8, 16] | None", bits)
    raise UsageError(f"--kv-bits has to be 8 or 16, not {bits}")


def check_lengths(max_tokens: int | None, context_size: int | None) -> None:
    """Raise `UsageError` for a length below one token."""
    _require("--max-tokens", max_tokens, max_tokens is None or max_tokens >= 1, "1 or more")
    _require("--ctx-size", context_size, context_size is None or context_size >= 1, "1 or more")


def _require(flag: str, value: object, fits: bool, limits: str) -> None:
    if not fits:
        raise UsageError(f"{flag} has to be {limits}, not {value}")
