"""A tiny model with a tokenizer for all bytes, loaded as front ends load it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import write_tokenizer

from mixchat.base.options import LoadOptions
from mixchat.base.progress import QuietReporter
from mixchat.face.load import open_model
from mixchat.face.model import Model


@pytest.fixture(scope="session")
def installed(make_checkpoint: Callable[..., Path], install: Callable[..., Path]) -> Path:
    """An installed model with a tokenizer for all bytes."""
    checkpoint = make_checkpoint(vocab_size=262, std=0.1, intermediate_size=128)
    return install(write_tokenizer(checkpoint))


@pytest.fixture
def load(installed: Path) -> Iterator[Callable[..., Model]]:
    """Loads the model, which is closed after the test."""
    loaded: list[Model] = []

    def start(parallel: int = 4, waiting: int = 100, **options: Any) -> Model:
        load_options = LoadOptions(device="cpu", exact_prompts=True, parallel=parallel)
        reporter = options.pop("reporter", QuietReporter())
        loaded.append(
            open_model(str(installed), load_options, reporter, waiting=waiting, **options)
        )
        return loaded[-1]

    yield start
    for each in loaded:
        each.close()
