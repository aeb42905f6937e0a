"""The report of a run's experts, and the JSON file in which it is saved."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixchat.base.errors import CheckpointError
from mixchat.base.files import read_json_object, write_private_file
from mixchat.base.settings import reports_dir
from mixchat.experts.cache import ExpertKey

if TYPE_CHECKING:
    from mixchat.engine.generate import Engine

# The places of experts, the fastest first, with their names for people.
PLACES = {
    "device": "GPU",
    "other-device": "other GPU",
    "host": "RAM",
    "worker": "worker",
    "disk": "disk",
}
TIERS = tuple(PLACES)
# Scripts read these names of version 1.
_JSON_NAMES = {"predictions": "guesses", "right_predictions": "right_guesses"}


@dataclass(frozen=True)
class ExpertReport:
    """Hits, misses and tiers of a run's experts.

    hits, misses, tiers: lists of layers, each a list of experts. A tier is one of `TIERS`. slots:
    the experts that fit each of the faster tiers. tokens: how many went through the model, in
    `seconds`. The other fields are as in `ExpertStats`.
    """

    model: str
    hits: list[list[int]]
    misses: list[list[int]]
    tiers: list[list[str]]
    slots: dict[str, int]
    bytes_moved: int
    stalled_seconds: float
    predictions: int
    right_predictions: int
    tokens: int
    seconds: float

    @property
    def tiers_used(self) -> list[str]:
        """Return the tiers that hold experts, or may."""
        return [tier for tier in TIERS if tier in {*self.slots, *chain(*self.tiers)}]

    def to_dict(self) -> dict[str, Any]:
        return {_JSON_NAMES.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ExpertReport:
        """Read the result of `to_dict`. Raises `TypeError`, `KeyError` or `ValueError`."""
        report = cls(**{f.name: raw[_JSON_NAMES.get(f.name, f.name)] for f in fields(cls)})
        shape = [len(layer) for layer in report.tiers]
        for matrix in (report.hits, report.misses):
            if [len(layer) for layer in matrix] != shape:
                raise ValueError("hits, misses and tiers differ in shape")
        return report


def report_of(engine: Engine, model: str) -> ExpertReport:
    """Return the report of the engine's experts since its start."""
    config = engine.config
    experts = engine.experts
    stats = engine.experts.stats
    layers = range(config.num_moe_layers)
    keys = [[ExpertKey(n, e) for e in range(config.num_local_experts)] for n in layers]
    return ExpertReport(
        model=model,
        hits=[[stats.hits[key] for key in layer] for layer in keys],
        misses=[[stats.misses[key] for key in layer] for layer in keys],
        tiers=[[experts.tier(key) for key in layer] for layer in keys],
        slots=experts.slots_by_tier,
        bytes_moved=stats.bytes_moved,
        stalled_seconds=stats.stalled_seconds,
        predictions=stats.predictions,
        right_predictions=stats.right_predictions,
        tokens=engine.passes.total_tokens,
        seconds=engine.passes.total_seconds,
    )


def slots_in_words(slots: Mapping[str, int]) -> str:
    """Return counts of slots as `12 RAM slots, 8 worker slots`."""
    return ", ".join(f"{count} {PLACES[tier]} slots" for tier, count in slots.items())


def newest_report_path() -> Path | None:
    """Return the path of the last report, None without one."""
    paths = reports_dir().glob("*.json")
    return max(paths, key=lambda path: path.lstat().st_mtime_ns, default=None)


def save_report(path: Path, report: ExpertReport) -> None:
    """Write a report, whole or not at all. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private_file(path, json.dumps(report.to_dict()).encode())


def load_report(path: Path) -> ExpertReport:
    """Return the report in a file. Raises `CheckpointError` if it cannot be drawn."""
    hint = "The next 'mixchat run' of the model writes a new one."
    try:
        report = ExpertReport.from_dict(read_json_object(path, follow=False))
        _check(report)
    except CheckpointError as error:
        raise CheckpointError(str(error), hint=hint) from None
    except KeyError as error:
        raise CheckpointError(f"{path}: not a report: {error} is missing", hint=hint) from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a report: {error}", hint=hint) from None
    return report


def saved_uses(path: Path) -> Counter[ExpertKey]:
    """Return how often each expert was used. Without a valid report there are no uses."""
    try:
        report = load_report(path)
    except CheckpointError:
        return Counter()
    uses: Counter[ExpertKey] = Counter()
    for matrix in (report.hits, report.misses):
        for layer, counts in enumerate(matrix):
            uses.update({ExpertKey(layer, expert): count for expert, count in enumerate(counts)})
    return +uses


def _check(report: ExpertReport) -> None:
    """Raise `ValueError` unless all values have the right types and ranges."""
    matrices = (report.hits, report.misses, report.tiers)
    if not all(isinstance(rows, list) for rows in chain(matrices, *matrices)):
        raise ValueError("hits, misses and tiers are not lists of lists")
    if len({len(layer) for layer in report.tiers}) != 1 or not report.tiers[0]:
        raise ValueError("it has no experts, or not as many in each layer")
    if not all(tier in TIERS for tier in chain(*report.tiers)):
        raise ValueError(f"a tier is none of {', '.join(TIERS)}")
    if not isinstance(report.model, str) or not isinstance(report.slots, dict):
        raise ValueError("the model has no name, or its slots have none")
    whole = (report.bytes_moved, report.predictions, report.right_predictions, report.tokens)
    counts: list[Any] = [*whole, *report.slots.values(), *chain(*report.hits, *report.misses)]
    if not all(type(count) is int for count in counts):
        raise ValueError("a count is not a whole number")
    numbers: list[Any] = [*counts, report.stalled_seconds, report.seconds]
    # Python reads NaN and Infinity in JSON, and whole numbers too large for a float.
    if not all(type(number) in (int, float) and 0 <= number < 2**63 for number in numbers):
        raise ValueError("a number is out of range")
