"""The path of the report of each model's last run, which `run` writes."""

from __future__ import annotations

from pathlib import Path

from mixchat.base.settings import data_dir


def report_path(name: str) -> Path:
    """Return the path for a model's name as given to `mixchat run -m`.

    Raises as `mixchat.weights.models.resolve` does.
    """
    from mixchat.weights.models import resolve

    return report_path_by_key(resolve(name).key)


def newest_report_path() -> Path | None:
    """Return the path of the report that was written last; None without one."""
    paths = (data_dir() / "stats").glob("*.json")
    return max(paths, key=lambda path: path.lstat().st_mtime_ns, default=None)


def report_path_by_key(key: str) -> Path:
    """Return the path for the key of an installed model: the name of its directory."""
    return data_dir() / "stats" / f"{key}.json"
