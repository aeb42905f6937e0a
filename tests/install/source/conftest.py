"""A hub with a large file."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub
from large_file import DATA, NAME


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub({NAME: DATA}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
