"""The path of the report of each model's last run: written by `run`, read by `stats`."""

from __future__ import annotations

from pathlib import Path

from mixchat.settings import data_dir


def report_path(name: str) -> Path:
    """Return the path for a model's name as given to `mixchat run -m`.

    Raises as `mixchat.weights.models.resolve` does.
    """
    from mixchat.weights.models import resolve

    return path_of(resolve(name).key)


def path_of(key: str) -> Path:
    """Return the path for the name of an installed model's directory."""
    return data_dir() / "stats" / f"{key}.json"
