"""A hub with one large file, which several tests fetch."""

import hashlib
import random
from pathlib import Path
from threading import Event

from fake_hub import FakeHub
from weight_tools import Bar

from mixchat.install.source.transfer import fetch_file

NAME = "model.safetensors"
DATA = random.Random(1).randbytes(100_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


def url(hub: FakeHub) -> str:
    return f"{hub.url}/{hub.repo}/resolve/{hub.commit}/{NAME}"


def fetch(hub: FakeHub, path: Path, bar: Bar | None = None, stop: Event | None = None) -> Path:
    fetch_file(url(hub), path, len(DATA), SHA256, bar or Bar(), stop or Event())
    return path


def ranges(hub: FakeHub) -> list[str | None]:
    """Return the ranges that were requested of the store, None for a whole file."""
    return [request.range for request in hub.requests if request.where == "store"]
