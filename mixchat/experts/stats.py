"""Counts of what the expert cache did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ExpertStats:
    """Cumulative counts: uses of an expert found in its slot or not, bytes moved into slots, and
    seconds spent waiting for them.
    """

    slots: int = 0
    hits: int = 0
    misses: int = 0
    bytes_moved: int = 0
    stalled_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Hits among all uses, 0 to 1; 0 before the first use."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else 0.0

    def since(self, before: ExpertStats) -> ExpertStats:
        """What came between an earlier count and this one."""
        return ExpertStats(
            self.slots,
            self.hits - before.hits,
            self.misses - before.misses,
            self.bytes_moved - before.bytes_moved,
            self.stalled_seconds - before.stalled_seconds,
        )
