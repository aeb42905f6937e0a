"""Pictures in PNG, drawn by matplotlib where it is installed."""

from __future__ import annotations

import io
from importlib import import_module
from pathlib import Path
from typing import Any

from mixchat.errors import MissingDependencyError, UsageError

_LARGEST = 40.0  # inches that a picture may have, at 100 dots an inch
_LEAST = (8.0, 4.0)


def new_figure(width: float, height: float, title: str) -> Any:
    """A figure of about this size in inches. Raises `MissingDependencyError`."""
    try:
        # By name, because mypy cannot find what need not be installed.
        figures = import_module("matplotlib.figure")
        canvases = import_module("matplotlib.backends.backend_agg")
    except ImportError:
        raise MissingDependencyError(
            "--png needs matplotlib, which is not installed", hint="pip install matplotlib"
        ) from None
    size = (min(max(width, _LEAST[0]), _LARGEST), min(max(height, _LEAST[1]), _LARGEST))
    figure = figures.Figure(figsize=size, dpi=100, layout="constrained")
    canvases.FigureCanvasAgg(figure)
    plain = ascii(" ".join(title.split()))[1:-1]  # no font has every character
    figure.suptitle(plain, parse_math=False)
    return figure


def write_figure(path: Path, figure: Any) -> None:
    """Write it into a file, a pipe or a device. Raises `UsageError`."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    try:
        path.write_bytes(out.getvalue())
    except OSError as error:
        raise UsageError(f"cannot write --png {path}: {error.strerror}") from None
