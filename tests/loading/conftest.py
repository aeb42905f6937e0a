"""GPUs on paper, and the models that are computed on them."""

import functools
import os
from collections.abc import Iterator

import paper_gpu
import pytest
from paper_runtime import PaperRuntime
from paper_tools import PASSES, Card, Case, Cases, random_case, speeds

from mixchat.loading import tiers


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[PaperRuntime | Card]:
    """GPUs on paper in place of CUDA's; nothing is measured, and everything is copied up.

    They are real ones if MIXCHAT_TEST_GPU is cuda.
    """
    monkeypatch.setattr(tiers, "saved_speeds", lambda *_: speeds(copy=1e12, expert=1.0))
    if os.environ.get("MIXCHAT_TEST_GPU", "cpu") != "cpu":
        yield Card()
        return
    with paper_gpu.in_place_of_cuda() as runtime:
        yield runtime


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Return the case of a kind, made when it is first asked for."""

    @functools.cache
    def case(kind: str) -> Case:
        return random_case(tmp_path_factory.mktemp("case") / "model", kind, PASSES)

    return case


@pytest.fixture(scope="module")
def small_case(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Return a case of one layer and short passes, for Triton's interpreter."""

    def case(kind: str) -> Case:
        directory = tmp_path_factory.mktemp("small") / "model"
        return random_case(directory, kind, ([5, 9, 33], [60], [2]), num_hidden_layers=1)

    return case
