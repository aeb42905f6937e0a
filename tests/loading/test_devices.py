"""The device that computes is the faster one, and a line says why if it is not a GPU."""

import importlib.util
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from paper_runtime import PaperRuntime
from paper_tools import CONTEXT, Case, speeds

from mixchat.base.errors import MissingDependencyError, ResourceError, UsageError
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.bench.rounds import Bench, BenchOptions
from mixchat.kernels.gpu import toolchain
from mixchat.kernels.gpu.toolchain import missing  # the double of GPUs replaces the module's
from mixchat.loading import devices
from mixchat.loading.devices import DeviceChoice, devices_for, usable_devices
from mixchat.loading.loader import load_engine
from mixchat.planning.machine_speeds import MachineSpeeds
from mixchat.planning.measuring import estimated_speeds

CPU, GPU, SECOND = torch.device("cpu"), torch.device("paper:0"), torch.device("paper:1")


@pytest.fixture
def chosen(paper: PaperRuntime, case: Any) -> Callable[..., tuple[torch.device, list[str]]]:
    """Return the first device that computes a tiny model, and the notes."""
    tiny: Case = case("nf4")

    def chosen(**options: Any) -> tuple[torch.device, list[str]]:
        notes: list[str] = []
        load = LoadOptions(context_size=CONTEXT, **options)
        first, *_ = devices_for(tiny.blueprint, tiny.directory, load, notes.append)
        return first, notes

    return chosen


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[MachineSpeeds], None]:
    """Let this machine have been measured."""
    return lambda known: monkeypatch.setattr(devices, "saved_speeds", lambda *_: known)


def slow_gpu() -> MachineSpeeds:
    machine = speeds(copy=1e10, expert=1e-6)
    gpu = replace(machine.gpus[0], memory=1e6)
    return replace(machine, gpus=(gpu,), layer_seconds=1e-6)


def test_a_gpu_computes_without_a_word_by_estimate_and_by_measurement(
    chosen, measured, monkeypatch
):
    def estimated(*given: Any) -> MachineSpeeds:
        # The tiny layers of tests take a CPU less time than a GPU's kernels take to start.
        return replace(estimated_speeds(*given), layer_seconds=1e-3)

    monkeypatch.setattr(devices, "estimated_speeds", estimated)
    assert chosen() == (GPU, [])
    measured(speeds(copy=1e10, expert=1e-3))
    assert chosen() == (GPU, [])


def test_a_cpu_that_is_faster_by_the_plan_computes_and_a_line_says_so(chosen, measured):
    """A GPU was always taken, and a person with one was slower than the same person without."""
    measured(slow_gpu())
    device, (note,) = chosen()
    assert device == CPU
    assert "GPU on paper" in note
    assert "slower by the plan" in note
    assert "\n" not in note


@pytest.mark.parametrize(
    "options", [{"device": "paper"}, {"device_memory": (MemoryBudget(fraction=1.0),)}], ids=str
)
def test_who_asks_for_a_gpu_gets_it_although_it_is_slower(chosen, measured, options):
    measured(slow_gpu())
    assert chosen(**options) == (GPU, [])


def test_a_gpu_that_is_too_small_is_left_alone_unless_it_is_named(paper, chosen, case):
    """It was an error, although the CPU had room."""
    paper.memory(GPU).total = 50_000
    device, (note,) = chosen()
    assert device == CPU
    assert "too little memory" in note
    with pytest.raises(ResourceError, match="not enough memory"):
        load_engine(case("nf4").directory, LoadOptions(context_size=CONTEXT, device="paper"))


def test_a_card_below_7_5_is_left_alone_unless_it_is_named(paper, chosen):
    """It crashed at the first kernel."""
    paper.capability = (6, 1)
    device, (note,) = chosen()
    assert device == CPU
    assert "compute capability 6.1" in note
    for name in ("paper", "paper:0"):
        with pytest.raises(UsageError, match=r"compute capability 6\.1"):
            chosen(device=name)


def test_of_two_cards_the_one_that_is_not_too_old_computes(paper, monkeypatch):
    paper.devices = 2
    ages = {0: (6, 1), 1: (8, 6)}
    monkeypatch.setattr(paper, "get_device_capability", lambda device: ages[device.index])
    for text in (None, "paper"):
        choice = usable_devices(text)
        assert choice.devices == [SECOND]
        assert "not used: compute capability" in (choice.reason or "")
    assert usable_devices("paper:1") == DeviceChoice([SECOND])
    with pytest.raises(UsageError, match=r"6\.1"):
        usable_devices("paper:0,paper:1")
    assert paper.current_device() == 1


def test_without_what_triton_needs_the_cpu_computes_unless_a_gpu_is_named(chosen, monkeypatch):
    with monkeypatch.context() as patch:  # undone before the double's own
        patch.setattr(toolchain, "missing", lambda: "no compiler: apt install gcc")
        device, (note,) = chosen()
        assert device == CPU
        assert note.endswith("apt install gcc")
        with pytest.raises(MissingDependencyError, match="apt install gcc"):
            chosen(device="paper")


def test_with_the_triton_of_an_old_pytorch_the_cpu_computes_and_a_line_says_so(chosen, monkeypatch):
    """PyTorch 2.7 and 2.8 bring Triton 3.3 and 3.4, with which the kernels cannot be imported."""
    old = ModuleType("triton")
    old.__version__ = "3.3.1"
    with monkeypatch.context() as patch:  # undone before the double's own
        patch.setattr(toolchain, "missing", missing)
        patch.setattr(importlib.util, "find_spec", lambda name: object())
        patch.setitem(sys.modules, "triton", old)
        device, (note,) = chosen()
        assert device == CPU
        said = "kernels need PyTorch 2.9 and Triton 3.5 or newer, and Triton 3.3.1 is installed"
        assert note == f"the CPU computes, not GPU on paper: {said}: pip install -U torch"
        with pytest.raises(MissingDependencyError, match="pip install -U torch"):
            chosen(device="paper")


@pytest.mark.parametrize(
    ("there", "variables", "said"),
    [
        ({"gcc"}, {}, None),
        ({"clang"}, {}, None),
        ({"gcc"}, {"CC": "icx"}, "CC=icx is not there"),
        ({"icx"}, {"CC": "icx"}, None),
        (set(), {}, "apt install gcc"),
    ],
)
def test_the_c_compiler_is_looked_for_as_triton_does(monkeypatch, there, variables, said):
    monkeypatch.delenv("CC", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(toolchain, "_has_headers", lambda: True)
    found = toolchain.missing()
    assert found is None if said is None else said in found


def test_without_triton_or_python_s_headers_the_package_to_install_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in toolchain.missing()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "apt install python3-dev" in toolchain.missing()
    (tmp_path / "Python.h").touch()
    assert toolchain.missing() is None


def test_loading_for_the_bench_tells_why_the_cpu_computes(paper, case, measured):
    measured(slow_gpu())
    notes: list[str] = []
    options = BenchOptions(prompts=(12,), tokens=1)
    load = LoadOptions(context_size=options.context_size)
    bench = Bench(case("nf4").directory, load, options, notes.append)
    bench.start_cold()
    assert bench.engine.device == CPU
    assert "slower by the plan" in notes[0]
    bench.engine.close()
