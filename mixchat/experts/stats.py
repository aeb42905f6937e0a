"""What the experts' cache did: counts by expert, and a report of them that can be kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mixchat.experts.keys import ExpertKey

TIERS = ("device", "host", "disk")  # where an expert can be, the fastest first


@dataclass
class ExpertStats:
    """Cumulative counts.

    hits, misses: uses of an expert found in fast memory or not, by expert. bytes_moved: bytes
    brought into fast memory. stalled_seconds: time spent waiting for them. guesses: experts that
    were sent for before a router asked for them; of these, right_guesses were then asked for, of
    these late_guesses before they had arrived, which makes them misses too.
    """

    hits: Counter[ExpertKey] = field(default_factory=Counter)
    misses: Counter[ExpertKey] = field(default_factory=Counter)
    bytes_moved: int = 0
    stalled_seconds: float = 0.0
    guesses: int = 0
    right_guesses: int = 0
    late_guesses: int = 0

    @property
    def needed(self) -> int:
        """Uses of experts that fast memory did not hold before they were sent for."""
        return self.misses.total() + self.right_guesses - self.late_guesses

    @property
    def hit_rate(self) -> float:
        """Hits among all uses, 0 to 1; 0 before the first use."""
        hits = self.hits.total()
        uses = hits + self.misses.total()
        return hits / uses if uses else 0.0

    def copy(self) -> ExpertStats:
        """The counts as they are now."""
        return self.since(ExpertStats())

    def since(self, before: ExpertStats) -> ExpertStats:
        """What came between an earlier count and this one."""
        return ExpertStats(
            **{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        )


@dataclass(frozen=True)
class ExpertReport:
    """What a run did with its experts, layer by layer: to look at, or to keep as JSON.

    `hits`, `misses` and `tiers` are lists of layers, each a list of experts; a tier is `device`,
    `host` or `disk`: where the expert was at the end. `slots` is the count of experts that fit each
    of the faster tiers, `tokens` how many went through the model, `seconds` how long that took.
    """

    model: str
    hits: list[list[int]]
    misses: list[list[int]]
    tiers: list[list[str]]
    slots: dict[str, int]
    bytes_moved: int
    stalled_seconds: float
    guesses: int
    right_guesses: int
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ExpertReport:
        """The reverse. Raises `TypeError`, `KeyError` or `ValueError` where it cannot be one."""
        report = cls(**{f.name: raw[f.name] for f in fields(cls)})
        shape = [len(layer) for layer in report.tiers]
        for matrix in (report.hits, report.misses):
            if [len(layer) for layer in matrix] != shape:
                raise ValueError("hits, misses and tiers differ in shape")
        return report
