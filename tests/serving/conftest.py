"""A tiny model with a tokenizer for all bytes, and services over it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mixchat.serving.model_service import ModelService
from mixchat.sessions.cache_file import ServerCaches

from mixchat.base.options import LoadOptions
from mixchat.engine.generate import Engine
from mixchat.loading.loader import load_engine
from mixchat.text.checkpoint_text import CheckpointText
from tests.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def model(make_checkpoint: Callable[..., Path], install: Callable[..., Path]) -> Path:
    """An installed model with a tokenizer for all bytes."""
    checkpoint = make_checkpoint(vocab_size=262, std=0.1, intermediate_size=128)
    return install(write_tokenizer(checkpoint))


@pytest.fixture
def model_service(model: Path) -> Iterator[Callable[..., ModelService]]:
    """Start a service; it is closed after the test."""
    started: list[ModelService] = []

    def start(
        parallel: int = 4, waiting: int = 100, caches: ServerCaches | None = None
    ) -> ModelService:
        text = CheckpointText(model)
        options = LoadOptions(device="cpu", exact_prompts=True, parallel=parallel)
        tokenizer = text.tokenizer()

        def load() -> Engine:
            engine = load_engine(model, options)
            if caches is not None:
                caches.load(engine)
            return engine

        def close(engine: Engine) -> None:
            if caches is not None:
                caches.save(engine)
            engine.close()

        service = ModelService(
            "tiny", load, tokenizer, text.template((2,)), queue=waiting, close=close
        )
        started.append(service)
        return service

    yield start
    for service in started:
        service.close()
