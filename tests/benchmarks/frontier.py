"""The frontier of bits and loss as data and as a picture, from what `quality.py` measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """A form: bits of a weight, KL divergence in nats, rise of perplexity as a fraction."""

    program: str
    name: str
    rounded: str
    bits: float
    kl: float
    rise: float
    texts: dict[str, tuple[float, float]]  # KL divergence and rise by the text


def draw(points: Sequence[Point], work: Path) -> None:
    """Write frontier.json with all points, and a picture for each way of rounding."""
    (work / "frontier.json").write_text(json.dumps([asdict(one) for one in points], indent=1))
    for rounded in dict.fromkeys(one.rounded for one in points):
        some = [one for one in points if one.rounded == rounded]
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": ""}):
            picture(some).savefig(work / f"frontier-{rounded}.svg", metadata={"Date": None})


def picture(points: Sequence[Point]) -> Figure:
    """Return a picture with the bits from left to right, and the loss in a logarithm."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for program in dict.fromkeys(one.program for one in points):
        some = [one for one in points if one.program == program]
        axes.scatter([one.bits for one in some], [one.kl for one in some], label=program)
    for one in points:
        axes.annotate(one.name, (one.bits, one.kl), (5, 3), textcoords="offset points", size=8)
    axes.set(yscale="log", xlabel="bits of a weight", ylabel="KL divergence, nats a token")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure
