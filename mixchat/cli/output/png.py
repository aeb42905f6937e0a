"""Pictures in PNG, drawn by matplotlib if it is installed."""

from __future__ import annotations

import io
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from mixchat.base.errors import MissingDependencyError
from mixchat.base.output_file import OutputFile

# Bytes near the start of mixchat's pictures. Only such a file is overwritten. The second are a text
# chunk of PNG.
_PNG, _SOFTWARE = b"\x89PNG\r\n", b"tEXtSoftware\0mixchat"
_LARGEST_INCHES = 40.0  # at 100 dots an inch
_SMALLEST_INCHES = (8.0, 4.0)


def new_figure(width: float, height: float, title: str) -> Any:
    """Return a figure of about this size in inches. Raises `MissingDependencyError`."""
    try:
        # By name, because mypy would not find an optional package.
        figures = import_module("matplotlib.figure")
        canvases = import_module("matplotlib.backends.backend_agg")
    except ImportError:
        # pipx and uv mark their environments with these files. uv's has no pip.
        installation = Path(sys.prefix)
        if (installation / "pipx_metadata.json").exists():
            command = "pipx inject mixchat matplotlib"
        elif (installation / "uv-receipt.toml").exists():
            command = f"uv pip install --python {sys.executable} matplotlib"
        else:
            command = f"{sys.executable} -m pip install matplotlib"
        raise MissingDependencyError(
            "--png needs matplotlib, which is not installed", hint=command
        ) from None
    least_width, least_height = _SMALLEST_INCHES
    size = (
        min(max(width, least_width), _LARGEST_INCHES),
        min(max(height, least_height), _LARGEST_INCHES),
    )
    figure = figures.Figure(figsize=size, dpi=100, layout="constrained")
    canvases.FigureCanvasAgg(figure)
    # No font has all characters, and matplotlib would read dollar signs as mathematics.
    figure.suptitle(ascii(" ".join(title.split()))[1:-1], parse_math=False)
    return figure


def checked_picture(path: Path | None) -> OutputFile | None:
    """Return the file of `--png` if it can be written. Raises `UsageError`."""
    return None if path is None else OutputFile("--png", path, _is_ours).check()


def _is_ours(head: bytes) -> bool:
    return head.startswith(_PNG) and _SOFTWARE in head


def write_figure(file: OutputFile, figure: Any) -> None:
    """Write the figure as PNG. Raises `UsageError`, or `ResourceError` if the disk is full."""
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": "mixchat"})
    file.write(out.getvalue())
