"""What a token costs: a pure model of time, out of what was measured and what fits where."""

from __future__ import annotations

from dataclasses import dataclass

from mixchat.planning.calibration import Calibration

# Of what could be read while the cores compute, the part that is. Measured with
# `tests/benchmarks/beyond_memory.py`: reading ahead does not begin early enough for all of it.
OVERLAP = 0.5


@dataclass(frozen=True)
class Shape:
    """What of a model counts here: `expert` is the bytes of one, `head` the bytes of its head."""

    layers: int
    experts_per_token: int
    expert: int
    head: int


@dataclass(frozen=True)
class TokenCost:
    """Seconds of one decoded token, and what they go into.

    computing: the layers, the chosen experts, the head; copying: of `copied` experts from RAM to a
    GPU; reading: of `read` experts from disk, with nothing beside it; slowed: the part of its speed
    that the disk has while the cores compute.
    """

    computing: float
    copying: float
    reading: float
    copied: float
    read: float
    slowed: float = 1.0

    @property
    def hidden(self) -> float:
        """Seconds that are saved because moving and computing go on side by side."""
        return OVERLAP * min(self.computing * self.slowed, self.copying + self.reading)

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.computing + self.copying + self.reading - self.hidden


def token_cost(
    shape: Shape,
    speeds: Calibration,
    device: str,
    *,
    hit_rate: float,
    host_hit_rate: float,
) -> TokenCost | None:
    """The cost of a decoded token on `device`; None where the disk is needed and was not measured.

    hit_rate: uses of experts that the slots hold; host_hit_rate: uses of those that the slots or
    RAM behind them hold. Both 0 to 1.
    """
    uses = shape.layers * shape.experts_per_token
    computing = (
        shape.layers * speeds.layer_seconds
        + uses * speeds.expert_time(device, 1)
        + shape.head / shape.expert * speeds.expert_time(device, 1)
    )
    return moving_cost(
        shape,
        speeds,
        computing,
        missing=uses * (1 - hit_rate),
        read=uses * (1 - host_hit_rate),
    )


def moving_cost(
    shape: Shape, speeds: Calibration, computing: float, *, missing: float, read: float
) -> TokenCost | None:
    """The cost of what takes `computing` seconds, misses so many experts, and reads so many of
    these; None where the disk is needed and was not measured.
    """
    if read and speeds.disk_bandwidth is None:
        return None
    copied = missing if speeds.copy_bandwidth else 0.0
    busy = speeds.disk_bandwidth or 1.0
    alone = max(speeds.disk_bandwidth_idle or busy, busy)
    return TokenCost(
        computing=computing,
        copying=copied * shape.expert / speeds.copy_bandwidth if speeds.copy_bandwidth else 0.0,
        reading=read * shape.expert / alone,
        copied=copied,
        read=read,
        slowed=busy / alone if read else 1.0,
    )
