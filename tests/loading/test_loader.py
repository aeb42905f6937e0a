import gc
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patience import wait_until

from mixchat.base.errors import UsageError
from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.experts.placement import Placement
from mixchat.loading.devices import usable_devices
from mixchat.loading.loader import load_engine, speed_predictor


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:0,cuda:1"])
def test_without_a_gpu_a_device_is_best_left_out(name):
    with pytest.raises(UsageError, match="no GPU") as caught:
        usable_devices(name)
    assert "Leave --device out" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["", "tpu", "cuda:99", "cuda:128", "mps", "meta", "cpu:x"])
def test_devices_that_cannot_be_used_are_refused(name):
    with pytest.raises(UsageError, match="--device"):
        usable_devices(name)


def test_more_ram_for_experts_than_there_is_is_noted(tiny_model):
    notes: list[str] = []
    for size in (10**16, 10**6):
        options = LoadOptions(device="cpu", host_memory=MemoryBudget(size=size))
        load_engine(tiny_model, options, notes.append).close()
    (note,) = notes
    assert note.startswith("--host-memory ")
    assert ": there are only " in note


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
@pytest.mark.parametrize("how", ["dropped", "closed"])
def test_an_engine_that_is_dropped_or_closed_leaves_no_file_open(tiny_model, tmp_path, how):
    """Hundreds of them did, until select() could not be told the number of a terminal's file."""
    model = shutil.copytree(tiny_model, tmp_path / "model")  # engines of other tests may live on

    def open_files():
        gc.collect()
        count = 0
        for file in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # another thread has closed it meanwhile
                count += os.readlink(file).startswith(str(model.resolve()))
        return count

    kept = [load_engine(model, LoadOptions(device="cpu"))]
    assert open_files()
    if how == "closed":
        kept[0].close()
    else:
        kept.clear()
    wait_until(lambda: not open_files())  # the thread that read experts has ended


def test_a_closed_engine_that_something_keeps_holds_no_tensors(tiny_model):
    """An error's traceback keeps it, for example, while another model needs the memory."""

    def tensors():
        gc.collect()
        # Those of GPUs on paper, which other tests have left, are of another class.
        return sum(type(one) in (torch.Tensor, torch.nn.Parameter) for one in gc.get_objects())

    def used_engine():
        engine = load_engine(tiny_model, LoadOptions(device="cpu", context_size=64))
        answer = engine.generate([5, 6], sampling=SamplingOptions(), stop_ids=set(), max_tokens=4)
        assert len(list(answer)) == 4
        wait_until(lambda: not engine.experts.is_filling)
        return engine

    used_engine().close()  # modules make constants when they are first used
    before = tensors()
    engine = used_engine()
    assert tensors() > before + 20
    engine.close()
    left = engine.held()[1].config.num_hidden_layers  # the empty addresses of each
    wait_until(lambda: tensors() <= before + left)  # the thread that read experts has ended
    assert (engine.held()[0], engine.is_closed) == ([], True)


def test_the_predicted_speed_is_that_of_the_slots_that_the_engine_has_by_then(
    tiny_model, monkeypatch, tmp_path
):
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    engine = load_engine(tiny_model, LoadOptions(MemoryBudget(fraction=0.5), device="cpu"))
    predict = speed_predictor(tiny_model, "cpu", engine)
    assert predict() is None  # never measured here
    placements: list[Placement] = []
    monkeypatch.setattr(
        "mixchat.loading.loader.predict_speed", lambda *given: placements.append(given[-1])
    )
    predict()
    holder: Any = engine.experts
    holder.ram.resize(2)
    predict()
    counts = [(each.slots, each.host_slots, each.experts) for each in placements]
    assert counts == [(4, 0, 8), (2, 0, 8)]


def test_no_speed_is_predicted_with_workers_whose_speed_is_not_known(tiny_model, monkeypatch):
    monkeypatch.setattr("mixchat.loading.loader.predict_speed", lambda *given: 1.0)
    device, blueprint = torch.device("cpu"), SimpleNamespace(expert_count=8)
    engine: Any = SimpleNamespace(slots_by_tier={"host": 4}, blueprint=blueprint, device=device)
    predict = speed_predictor(tiny_model, "cpu", engine)
    assert predict() == 1.0
    engine.slots_by_tier["worker"] = 4
    assert predict() is None
