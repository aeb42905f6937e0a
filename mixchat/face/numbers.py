"""The numbers of a request by their names, with limits: of Python's callers, flags and bodies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from mixchat.base.errors import UsageError, short_repr

if TYPE_CHECKING:
    from mixchat.base.options import SamplingOptions

# Of what is added to a logit. No model's logits come near it, and sums over all tokens of a
# context, divided by the lowest temperature, stay finite in fp32.
_MAX_ADDED = 1e9


@dataclass(frozen=True)
class NumberParameter:
    """A number that controls sampling or a length. `field` is its name in Python."""

    field: str
    number_type: type[int] | type[float]
    fits: Callable[[Any], bool]
    limits: str

    def read(self, name: str, text: str) -> int | float:
        """Return the value. Raises `UsageError` if it is not a number within the limits."""
        try:
            value = self.number_type(text)
        except ValueError:
            raise UsageError(f"{name} has to be {self.limits}, not {text!r:.80}") from None
        return self.checked(name, value)

    def accepted(self, value: Any) -> int | float | None:
        """Return the value as Python's int or float, or None if it is not within the limits.

        A number of another library, such as numpy's, is converted. NaN and True are never accepted.
        """
        is_number = isinstance(value, Integral if self.number_type is int else Real)
        if not is_number or isinstance(value, bool):
            return None
        try:
            number = self.number_type(value)
        except OverflowError:  # a double holds no whole number of 400 digits
            return None
        return number if self.fits(number) else None

    def checked(self, name: str, value: Any) -> int | float:
        """Return the value as `accepted` does. Raises `UsageError` if it is not accepted."""
        number = self.accepted(value)
        if number is None:
            raise UsageError(f"{name} has to be {self.limits}, not {short_repr(value)}")
        return number


SAMPLING = {
    "temp": NumberParameter("temperature", float, lambda x: 0 <= x < math.inf, "0 or more"),
    "top-p": NumberParameter("top_p", float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "top-k": NumberParameter("top_k", int, lambda x: 0 <= x < 2**31, "between 0 and 2147483647"),
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


def _added(field: str, limits: str) -> NumberParameter:
    return NumberParameter(field, float, lambda x: abs(x) <= _MAX_ADDED, limits)


# OpenAI's API has narrower limits (serving/requests/shared.py).
_ADDED_LIMITS = "between -1e9 and 1e9"
PENALTIES = (_added("presence_penalty", _ADDED_LIMITS), _added("frequency_penalty", _ADDED_LIMITS))
BIAS = _added("logit_bias", f"numbers {_ADDED_LIMITS} by token id")
TOP_LOGPROBS = NumberParameter("top_logprobs", int, lambda x: x >= 0, "0 or more")


def accepted_numbers(numbers: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the numbers of sampling that are within their limits, by their names in Python."""
    return {
        each.field: number
        for each in SAMPLING.values()
        if (number := each.accepted(numbers.get(each.field))) is not None
    }


def with_numbers(sampling: SamplingOptions, numbers: Mapping[str, Any]) -> SamplingOptions:
    """Return `sampling` with these numbers, by their names in Python. Bad ones are ignored."""
    changed: Any = accepted_numbers(numbers)
    return dataclasses.replace(sampling, **changed)
