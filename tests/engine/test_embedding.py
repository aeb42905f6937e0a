"""The token embedding, whose rows are read when tokens need them: the same bits, less memory."""

import gc
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import answer, logits
from torch.nn import functional

from mixchat.base.errors import CheckpointError
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.loading.loader import load_engine
from mixchat.weights.format.installed_model import InstalledModel

CPU = LoadOptions(device="cpu")
TIED = {"tie_word_embeddings": True}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bf16": ({}, {}),
    "bf16, dense head": ({}, {"head": 16}),
    "fp32": ({}, {"quant_type": "none"}),
    "tied, bf16": (TIED, {"head": 16}),
    "tied, fp32": (TIED, {"quant_type": "none"}),
    "tied, head apart": (TIED, {}),
}
IDS = [torch.tensor(ids) for ids in ([42], [7, 7, 96, 0, 7, 0], [5 * n % 97 for n in range(100)])]


@pytest.mark.parametrize(("changes", "options"), FORMS.values(), ids=FORMS.keys())
def test_logits_have_the_bits_that_they_have_with_the_table_in_memory(
    changes, options, make_checkpoint, install
):
    engine = load_engine(directory := install(make_checkpoint(**changes), **options), CPU)
    found = [logits(engine, ids, 100) for ids in IDS]
    with InstalledModel(directory) as installed:
        table = installed.tensor(installed.blueprint.embedding)
    engine.passes.model._embedding = lambda ids: functional.embedding(ids, table)
    assert all(map(torch.equal, found, (logits(engine, ids, 100) for ids in IDS)))
    assert engine.passes.model.output.norm.weight.dtype == table.dtype


def memories() -> dict[int, torch.UntypedStorage]:
    """Return the memory of all tensors, by its address; it is kept as long as this is."""
    gc.collect()
    # Tensors of GPUs on paper, which other tests have left, are of another class.
    kinds = torch.Tensor, torch.nn.Parameter
    tensors = [one for one in gc.get_objects() if type(one) in kinds]
    return {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}


@pytest.mark.parametrize("name", ["bf16", "tied, bf16", "tied, head apart"])
def test_the_table_is_held_only_where_it_is_the_head(name, make_checkpoint, install):
    """Of 4,096 tokens it has half a megabyte."""
    changes, options = FORMS[name]
    directory = install(make_checkpoint(vocab_size=4096, **changes), **options)
    before = memories()
    # If all experts fit, their memory would be among what is found.
    engine = load_engine(directory, LoadOptions(MemoryBudget(fraction=0.5), device="cpu"))
    new = [memory.nbytes() for start, memory in memories().items() if start not in before]
    assert abs(sum(new) - engine.blueprint.shared_size) < 100_000


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    """A model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_a_file_that_is_cut_short_after_loading_ends_the_turn_with_its_name(copied):
    """A mapped table would kill the process with SIGBUS here."""
    engine = load_engine(copied, CPU)
    whole = (copied / "shared.safetensors").read_bytes()
    expected = answer(engine, [5, 17, 42])
    engine.forget()
    os.truncate(copied / "shared.safetensors", 4100)
    with pytest.raises(CheckpointError, match=r"shared\.safetensors: cut short"):
        answer(engine, [5, 17, 42])
    (copied / "shared.safetensors").write_bytes(whole)
    assert answer(engine, [5, 17, 42]) == expected


def test_a_model_that_is_removed_after_loading_still_answers(copied):
    engine = load_engine(copied, CPU)
    expected = answer(engine, [5, 17, 42])
    engine.forget()
    shutil.rmtree(copied)
    assert answer(engine, [5, 17, 42]) == expected
