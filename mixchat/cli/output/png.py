"""Pictures in PNG, drawn by matplotlib if it is installed."""

from __future__ import annotations

import io
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from mixchat.base.errors import MissingDependencyError
from mixchat.base.output_file import OutputFile

# Bytes near the start of mixchat's pictures. The second are a text chunk of PNG.
_PNG, _SOFTWARE = b"\x89PNG\r\n", b"tEXtSoftware\0mixchat"
_LARGEST_INCHES = 40.0  # at 100 dots an inch
_SMALLEST_INCHES = (8.0, 4.0)


def _install_line(package: str) -> str:
    """Return the command that adds a package to this installation of mixchat."""
    installation = Path(sys.prefix)
    if (installation / "pipx_metadata.json").exists():
        return f"pipx inject mixchat {package}"
    if (installation / "uv-receipt.toml").exists():
        return f"uv pip install --python {sys.executable} {package}"
    return f"{sys.executable} -m pip install {package}"


def new_figure(width: float, height: float, title: str) -> Any:
    """Return a figure of about this size in inches. Raises `MissingDependencyError`."""
    try:
        # By name, because mypy would not find an optional package.
        figures = import_module("matplotlib.figure")
        canvases = import_module("matplotlib.backends.backend_agg")
    except ImportError:
        raise MissingDependencyError(
            "--png needs matplotlib, which is not installed", hint=_install_line("matplotlib")
        ) from None
    least_width, least_height = _SMALLEST_INCHES
    size = (
        min(max(width, least_width), _LARGEST_INCHES),
        min(max(height, least_height), _LARGEST_INCHES),
    )
    figure = figures.Figure(figsize=size, dpi=100, layout="constrained")
    canvases.FigureCanvasAgg(figure)
    plain = ascii(" ".join(title.split()))[1:-1]  # no font has all characters
    figure.suptitle(plain, parse_math=False)
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
