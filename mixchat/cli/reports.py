"""Where the report of each model's last run is kept: written by `run`, read by `stats`."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

from mixchat.errors import CheckpointError
from mixchat.experts.stats import TIERS, ExpertReport
from mixchat.files import read_json_object, write_private_file
from mixchat.settings import data_dir


def report_path(name: str) -> Path:
    """Where the report of the last run of a model is, or will be.

    `name` is one as for `mixchat run -m`; raises as `mixchat.weights.models.resolve` does.
    """
    from mixchat.weights.models import resolve

    return path_of(resolve(name).key)


def path_of(key: str) -> Path:
    """The same by the name of the directory that keeps the model."""
    return data_dir() / "stats" / f"{key}.json"


def save_report(path: Path, report: ExpertReport) -> None:
    """Keep a report in place of an earlier one, whole or not at all. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private_file(path, json.dumps(report.to_dict()).encode())


def load_report(path: Path) -> ExpertReport:
    """The report in a file. Raises `CheckpointError` where there is none that can be drawn."""
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


def _check(report: ExpertReport) -> None:
    """Raise `ValueError` unless everything has the type and the range that it has to have."""
    matrices = (report.hits, report.misses, report.tiers)
    if not all(isinstance(rows, list) for rows in chain(matrices, *matrices)):
        raise ValueError("hits, misses and tiers are not lists of lists")
    if len({len(layer) for layer in report.tiers}) != 1 or not report.tiers[0]:
        raise ValueError("it has no experts, or not as many in each layer")
    if not all(tier in TIERS for tier in chain(*report.tiers)):
        raise ValueError(f"a tier is none of {', '.join(TIERS)}")
    if not isinstance(report.model, str) or not isinstance(report.slots, dict):
        raise ValueError("the model has no name, or its slots have none")
    whole = (report.bytes_moved, report.guesses, report.right_guesses, report.tokens)
    counts: list[Any] = [*whole, *report.slots.values(), *chain(*report.hits, *report.misses)]
    if not all(type(count) is int for count in counts):
        raise ValueError("a count is not a whole number")
    # JSON as Python reads it has NaN and Infinity, and whole numbers too large for a float.
    if not all(_in_range(number) for number in (*counts, report.stalled_seconds, report.seconds)):
        raise ValueError("a number is out of range")


def _in_range(number: object) -> bool:
    return type(number) in (int, float) and 0 <= number < 2**63  # type: ignore[operator]
