"""Counts of what the experts' cache did: hits and misses by expert, bytes moved, predictions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

from mixchat.experts.keys import ExpertKey


@dataclass
class ExpertStats:
    """Cumulative counts.

    hits, misses: uses of an expert found in fast memory or not, by expert; what a worker computes
    is a hit. bytes_moved: bytes brought into fast memory. stalled_seconds: time spent waiting for
    them. bytes_read: of experts, from disk, in read_seconds; several GPUs read beside each other,
    and their seconds are summed. predictions: experts that were prefetched; of these,
    right_predictions were then selected by a router, of these late_predictions before they had
    arrived, which makes them misses too.
    """

    hits: Counter[ExpertKey] = field(default_factory=Counter)
    misses: Counter[ExpertKey] = field(default_factory=Counter)
    bytes_moved: int = 0
    stalled_seconds: float = 0.0
    bytes_read: int = 0
    read_seconds: float = 0.0
    predictions: int = 0
    right_predictions: int = 0
    late_predictions: int = 0

    @property
    def needed(self) -> int:
        """Return the uses of experts that fast memory did not hold before they were requested."""
        return self.misses.total() + self.right_predictions - self.late_predictions

    @property
    def hit_rate(self) -> float:
        """Return the hits among all uses, 0 to 1; 0 before the first use."""
        hits = self.hits.total()
        uses = hits + self.misses.total()
        return hits / uses if uses else 0.0

    def copy(self) -> ExpertStats:
        """Return the counts as they are now."""
        return self.since(ExpertStats())

    def since(self, before: ExpertStats) -> ExpertStats:
        """Return the counts between an earlier time and this one."""
        return ExpertStats(
            **{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        )
