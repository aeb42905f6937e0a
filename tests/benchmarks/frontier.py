"""The frontier of bits and loss as data and as a picture, from what `quality.py` measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN = 760, 480, 60  # of the picture, in pixels
COLORS = {"mixchat": "#c0392b", "llama.cpp": "#2c5f9e", "ik_llama.cpp": "#3a8a4d"}


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
        (work / f"frontier-{rounded}.svg").write_text(picture(some), encoding="utf-8")


def picture(points: Sequence[Point]) -> str:
    """Return an SVG picture with the bits from left to right, and the loss in a logarithm."""
    left = math.floor(min(one.bits for one in points) * 2) / 2
    right = math.ceil(max(one.bits for one in points) * 2) / 2
    low = math.floor(math.log2(min(one.kl for one in points)))
    high = math.ceil(math.log2(max(one.kl for one in points)))

    def x(bits: float) -> float:
        return MARGIN + (bits - left) / (right - left or 1) * (WIDTH - 2 * MARGIN)

    def y(kl: float) -> float:
        return MARGIN + (high - math.log2(kl)) / (high - low or 1) * (HEIGHT - 2 * MARGIN)

    def label(at: float, up: float, text: str, more: str = "") -> str:
        return f'<text x="{at:.1f}" y="{up:.1f}" {more}>{escape(text)}</text>'

    shapes = []
    for number in range(low, high + 1):
        up = y(2**number)
        shapes.append(f'<path d="M{MARGIN} {up:.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        shapes.append(label(MARGIN - 6, up + 4, f"{2**number:.3g}", 'text-anchor="end"'))
    for half in range(round(2 * left), round(2 * right) + 1):
        at = x(half / 2)
        shapes.append(f'<path d="M{at:.1f} {MARGIN}V{HEIGHT - MARGIN}" stroke="#ddd"/>')
        shapes.append(label(at, HEIGHT - MARGIN + 18, f"{half / 2:g}", 'text-anchor="middle"'))
    for one in points:
        at, up, color = x(one.bits), y(one.kl), COLORS.get(one.program, "#555")
        shapes.append(f'<circle cx="{at:.1f}" cy="{up:.1f}" r="4" fill="{color}"/>')
        shapes.append(label(at + 7, up + 4, one.name, f'fill="{color}"'))
    for row, program in enumerate(dict.fromkeys(one.program for one in points)):
        up, color = MARGIN + 18 + 16 * row, COLORS.get(program, "#555")
        shapes.append(label(WIDTH - MARGIN - 6, up, program, f'fill="{color}" text-anchor="end"'))
    shapes.append(label(WIDTH / 2, HEIGHT - 14, "bits of a weight", 'text-anchor="middle"'))
    shapes.append(label(MARGIN, MARGIN - 20, "KL divergence, nats a token (mean of the texts)"))
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    style = 'font-family="sans-serif" font-size="12"'
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    lines = "\n".join([background, *shapes])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{lines}\n</svg>\n'
