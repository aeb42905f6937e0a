"""GPUs on paper, and the models that are computed on them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import paper_gpu
import pytest
from paper_runtime import PaperRuntime
from paper_tools import CONTEXT, KINDS, LAYERS, Case, Cases, logits, speeds

from mixchat.base.options import LoadOptions
from mixchat.loading import tiers
from mixchat.loading.loader import load_engine
from mixchat.weights.format.installed_model import InstalledModel


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[PaperRuntime]:
    """GPUs on paper in place of CUDA's; nothing is measured, and everything is copied up."""
    monkeypatch.setattr(tiers, "saved_measurement", lambda *_: speeds(copy=1e12, expert=1.0))
    with paper_gpu.in_place_of_cuda() as runtime:
        yield runtime


@pytest.fixture(scope="module")
def case(make_checkpoint: Callable[..., Path], install: Callable[..., Path]) -> Cases:
    """Return the case of a kind, made when it is first asked for."""
    made: dict[str, Case] = {}

    def case(kind: str) -> Case:
        if kind not in made:
            options = dict(KINDS[kind])
            stored_as = options.pop("stored_as", "float32")
            checkpoint = make_checkpoint(std=0.05, stored_as=stored_as, num_hidden_layers=LAYERS)
            directory = install(checkpoint, **options)
            with InstalledModel(directory) as model:
                blueprint = model.blueprint
            engine = load_engine(directory, LoadOptions(device="cpu", context_size=CONTEXT))
            made[kind] = Case(directory, blueprint, logits(engine))
        return made[kind]

    return case
