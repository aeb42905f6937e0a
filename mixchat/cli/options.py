"""The flags of sampling and loading, and the limits that their values have to keep."""

from __future__ import annotations

import math
import secrets
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from mixchat.errors import UsageError

if TYPE_CHECKING:
    from mixchat.engine.sampling import SamplingOptions

Temperature = Annotated[
    float,
    typer.Option("--temp", "--temperature", metavar="X", help="How freely to choose; 0 is greedy."),
]
TopP = Annotated[
    float, typer.Option(metavar="X", help="Choose among the likeliest tokens of this total chance.")
]
TopK = Annotated[
    int, typer.Option(metavar="N", help="Choose among the N likeliest tokens; 0: among all.")
]
MinP = Annotated[
    float, typer.Option(metavar="X", help="Leave out what is below this part of the best chance.")
]
RepeatPenalty = Annotated[
    float, typer.Option(metavar="X", help="Above 1: avoid tokens that were there already.")
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
ExpertMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Fast memory for experts: 300MB, 8GiB, or 50% of all of them.",
        show_default="what fits",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.", show_default="the best there is"),
]


@dataclass(frozen=True)
class Sampling:
    """`SamplingOptions` as the command line gives them: checked before anything heavy is loaded."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repeat_penalty: float
    seed: int | None

    def check(self) -> None:
        """Raise `UsageError` for the first value outside its limits; NaN is outside of all."""
        _require("--temp", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _require("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _require("--top-k", self.top_k, self.top_k >= 0, "0 or more")
        _require("--min-p", self.min_p, 0 <= self.min_p < 1, "at least 0 and below 1")
        penalty = self.repeat_penalty
        _require("--repeat-penalty", penalty, 0.01 <= penalty <= 100, "between 0.01 and 100")
        fits = self.seed is None or 0 <= self.seed < 2**63
        _require("--seed", self.seed, fits, "between 0 and 9223372036854775807")

    def options(self) -> SamplingOptions:
        """The same for the engine. A seed is drawn here, so that it can be shown and repeated."""
        from mixchat.engine.sampling import SamplingOptions

        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        return SamplingOptions(**asdict(replace(self, seed=seed)))


def check_lengths(max_tokens: int | None, context_size: int | None) -> None:
    """Raise `UsageError` for a length below one token."""
    _require("--max-tokens", max_tokens, max_tokens is None or max_tokens >= 1, "1 or more")
    _require("--ctx-size", context_size, context_size is None or context_size >= 1, "1 or more")


def _require(flag: str, value: object, fits: bool, limits: str) -> None:
    if not fits:
        raise UsageError(f"{flag} has to be {limits}, not {value}")
