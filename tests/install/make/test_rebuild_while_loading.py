"""A model that is made anew while it is loaded is loaded as it was, or not at all.

The manifest was read, then the files were opened: those that a rebuild had replaced in between
were read as what they no longer were, and the text was nonsense.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rebuild_tools import DENSE, FIRST, LAST, reform

from mixchat.base.errors import CheckpointError
from mixchat.install.make import rebuild
from mixchat.weights.format.installed_model import InstalledModel


@pytest.fixture
def dense(tiny_checkpoint: Path, install: Callable[..., Path], tmp_path: Path) -> Path:
    """A model with attention and head in 16 bits that a test may change."""
    made = install(tiny_checkpoint, **DENSE)
    return Path(shutil.copytree(made, tmp_path / "models" / "mine"))


class TestLoadingBeside:
    @pytest.mark.parametrize("moment", ["shared.safetensors", FIRST, LAST])
    def test_files_of_two_models_are_not_loaded(self, dense, monkeypatch, moment):
        opened = InstalledModel._open

        def beside(model: InstalledModel, name: str, expected: Any) -> Any:
            file = opened(model, name, expected)
            if name == moment:
                monkeypatch.undo()
                reform(dense)
            return file

        monkeypatch.setattr(InstalledModel, "_open", beside)
        with pytest.raises(CheckpointError, match="changed while it was being loaded"):
            InstalledModel(dense)
        with InstalledModel(dense):
            pass

    def test_a_file_that_was_replaced_since_is_not_opened_past_the_page_cache(
        self, dense, monkeypatch
    ):
        monkeypatch.setattr(rebuild, "_has_links", lambda directory: False)
        with InstalledModel(dense) as model:
            stride = model.blueprint.expert.stride
            before, after = (torch.empty(stride, dtype=torch.uint8) for _ in range(2))
            model.read_expert(0, 1, before)
            reform(dense)
            assert not model.open_direct()
            model.read_expert(0, 1, after)
            assert torch.equal(before, after)
