"""The numbers of a request by their names, with limits: of Python's callers, flags and bodies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeVar

from mixchat.base.errors import UsageError

if TYPE_CHECKING:
    from mixchat.base.options import RequestedSampling, SamplingOptions

    Sampling = TypeVar("Sampling", bound=SamplingOptions | RequestedSampling)


@dataclass(frozen=True)
class NumberParameter:
    """A number that controls sampling or a length. `field` is its name in Python."""

    field: str
    number_type: Callable[[str], Any]
    fits: Callable[[Any], bool]
    limits: str

    def read(self, name: str, text: str) -> Any:
        """Return the value. Raises `UsageError` if it is not a number within the limits."""
        try:
            value = self.number_type(text)
        except ValueError:
            raise UsageError(f"{name} has to be {self.limits}, not {text!r}") from None
        self.check(name, value)
        return value

    def accepts(self, value: Any) -> bool:
        """Return whether the value is such a number within the limits, as NaN and True never are.

        A number of another library, such as numpy's, can be one.
        """
        is_number = isinstance(value, Integral if self.number_type is int else Real)
        try:
            in_limits = is_number and not isinstance(value, bool) and self.fits(value)
            return in_limits and self.number_type(value) is not None
        except OverflowError:  # a double holds no whole number of 400 digits
            return False

    def check(self, name: str, value: Any) -> None:
        """Raise `UsageError` unless the value is accepted."""
        if not self.accepts(value):
            raise UsageError(f"{name} has to be {self.limits}, not {value!r:.80}")


SAMPLING = {
    "temp": NumberParameter("temperature", float, lambda x: 0 <= x < math.inf, "0 or more"),
    "top-p": NumberParameter("top_p", float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "top-k": NumberParameter("top_k", int, lambda x: x >= 0, "0 or more"),
    "min-p": NumberParameter("min_p", float, lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "repeat-penalty": NumberParameter(
        "repeat_penalty", float, lambda x: 0.01 <= x <= 100, "between 0.01 and 100"
    ),
    "seed": NumberParameter(
        "seed", int, lambda x: 0 <= x < 2**63, "between 0 and 9223372036854775807"
    ),
}
LENGTHS = {
    "max-tokens": NumberParameter(
        "max_tokens", int, lambda x: x >= 0, "1 or more, or 0 for what fits"
    ),
    "ctx-size": NumberParameter("ctx_size", int, lambda x: x >= 1, "1 or more"),
}
# OpenAI's API has narrower limits (serving/requests/shared.py).
PENALTIES = (
    NumberParameter("presence_penalty", float, math.isfinite, "a finite number"),
    NumberParameter("frequency_penalty", float, math.isfinite, "a finite number"),
)
BIAS = NumberParameter("logit_bias", float, math.isfinite, "finite numbers by token id")
TOP_LOGPROBS = NumberParameter("top_logprobs", int, lambda x: x >= 0, "0 or more")


def numbers_of(sampling: SamplingOptions | RequestedSampling) -> dict[str, Any]:
    """Return the numbers that a chat can change, by their names in Python."""
    return {number.field: getattr(sampling, number.field) for number in SAMPLING.values()}


def with_numbers(sampling: Sampling, numbers: Mapping[str, Any]) -> Sampling:
    """Return `sampling` with these numbers, by their names in Python. Bad ones are ignored."""
    known = {number.field: number for number in SAMPLING.values()}
    good = {
        field: value
        for field, value in numbers.items()
        if field in known and value is not None and known[field].fits(value)
    }
    for field in ("top_k", "seed"):
        if field in good:
            good[field] = int(good[field])
    return dataclasses.replace(sampling, **good)
