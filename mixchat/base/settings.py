"""The directories of mixchat's files, and the settings in config.toml."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mixchat.base.errors import UsageError

_CONFIG_BYTES_MAX = 10**6


def data_dir() -> Path:
    """Return the directory of mixchat's data, `MIXCHAT_HOME` or the system's own."""
    if home := os.environ.get("MIXCHAT_HOME"):
        return Path(home).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_data_dir("mixchat", appauthor=False))


def models_dir() -> Path:
    """Return the directory of all models."""
    return data_dir() / "models"


def reports_dir() -> Path:
    """Return the directory of the reports of models' last runs."""
    return data_dir() / "stats"


def report_path_by_key(key: str) -> Path:
    """Return the path of the report of an installed model, by its key."""
    return reports_dir() / f"{key}.json"


def server_caches_dir(key: str) -> Path:
    """Return the directory of a server's KV caches for the model `key`."""
    return data_dir() / "server" / key


def config_file() -> Path:
    """Return the file of settings, `MIXCHAT_CONFIG` or the system's config.toml."""
    if name := os.environ.get("MIXCHAT_CONFIG"):
        return Path(name).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_config_dir("mixchat", appauthor=False)) / "config.toml"


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings of a file. It may be missing unless `MIXCHAT_CONFIG` names it.

    Raises `UsageError`.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_CONFIG_BYTES_MAX + 1)
    except FileNotFoundError:
        if os.environ.get("MIXCHAT_CONFIG"):
            raise UsageError(f"{path}: there is no such file (MIXCHAT_CONFIG names it)") from None
        return {}
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in its name
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be read ({reason})") from None
    if len(data) > _CONFIG_BYTES_MAX:
        raise UsageError(f"{path}: too large for a file of settings")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"the byte 0x{data[error.start]:02x} in line {line}"
        raise UsageError(f"{path}: not UTF-8: {byte}") from None
    import tomllib

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        hint = 'Write each line as KEY = VALUE, text in quotes: model = "demo".'
        raise UsageError(f"{path}: not TOML: {error}", hint=hint) from None
