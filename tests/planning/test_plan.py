"""A plan says what loading will do, on machines that are only described."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planning_tools import BLUEPRINT, CPU, GPU, GPU_SPEEDS, SPEEDS, measured, without_disk

from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.cli.output.plan_report import PlanReport
from mixchat.experts.placement import Placement
from mixchat.install.make.outline import Outline
from mixchat.loading.loader import load_engine
from mixchat.planning import fitting, measuring
from mixchat.planning.expectation import LONG_PROMPT, PROMPT
from mixchat.planning.fitting import FreeMemory, fit_model
from mixchat.planning.hardware import Machine, OtherGPU
from mixchat.planning.machine_speeds import MachineSpeeds, Measurement
from mixchat.planning.measuring import measurement_file
from mixchat.planning.plan import MachinePlan, plan_model, predict_speed
from mixchat.weights.format.installed_model import InstalledModel

GB = 10**9


def machine(ram: float, gpu: float | None = None) -> Machine:
    device = None if gpu is None else int(gpu * GB)
    name = None if gpu is None else "a GPU"
    free = FreeMemory(int(ram * GB), device)
    return Machine("a CPU", 8, 64 * GB, free, 500 * GB, name, device)


def planned(
    device: torch.device, there: Machine, known: Measurement, options: LoadOptions
) -> MachinePlan:
    return plan_model(there, device, fit_model(BLUEPRINT, there.free, options), known)


def on_cpu(ram: float, *samples: MachineSpeeds, **options: Any) -> MachinePlan:
    known = measured(*samples or (SPEEDS,))
    return planned(CPU, machine(ram), known, LoadOptions(**options))


def on_gpu(gpu: float, ram: float, **options: Any) -> MachinePlan:
    return planned(GPU, machine(ram, gpu), measured(GPU_SPEEDS), LoadOptions(**options))


def speed(found: MachinePlan) -> float:
    assert found.expected.tokens_per_second is not None
    return found.expected.tokens_per_second


def test_a_machine_with_16_gb_holds_a_part_and_reads_the_rest():
    found = on_cpu(14.5)
    slots = found.fit.placement.slots
    assert 80 < slots < 140
    assert (found.expected.held, found.fit.placement.host_slots, found.fit.context) == (
        slots,
        0,
        8192,
    )
    assert found.expected.hit_rate == found.expected.host_hit_rate
    assert found.expected.cost.read == pytest.approx(64 * (1 - found.expected.hit_rate))
    assert speed(found) == 1 / found.expected.cost.seconds
    assert found.cold.seconds > 8  # 26 GB at 3 GB a second


def test_a_machine_that_holds_all_reads_nothing():
    found = on_cpu(64)
    assert (found.expected.hit_rate, found.fit.placement.slots) == (1.0, 256)
    assert found.expected.cost.read == 0


def on_two_gpus(first: float, second: float, ram: float, **options: Any) -> MachinePlan:
    there = machine(ram, first)
    other = OtherGPU("cuda:1", "another GPU", int(second * GB))
    free = replace(there.free, other_gpus={"cuda:1": other.memory})
    there = replace(there, free=free, other_gpus=(other,))
    return planned(GPU, there, measured(GPU_SPEEDS), LoadOptions(**options))


def test_a_second_gpu_holds_experts_and_makes_tokens_faster():
    one, two, three = on_gpu(11, 64), on_two_gpus(11, 11, 64), on_two_gpus(11, 30, 64)
    assert two.fit.placement.layers == (16, 16)
    assert sum(two.fit.placement.by_device) > 2 * one.fit.placement.slots  # context once
    assert two.fit.largest_context == one.fit.largest_context
    assert speed(one) < speed(two) < speed(three)
    assert three.expected.hit_rate == 1
    assert sum(three.fit.placement.by_device) == 256


def test_two_gpus_have_a_budget_each_or_one_for_both():
    budgets = (MemoryBudget(size=8 * GB), MemoryBudget(size=5 * GB))
    with pytest.raises(UsageError, match="has 2 values, and there is 1 GPU"):
        on_gpu(24, 64, device_memory=budgets)
    assert on_two_gpus(24, 24, 64, device_memory=budgets[:1]).fit.placement.other_slots > (60,)


def test_a_plan_for_two_gpus_names_both():
    outline = Outline("a model", BLUEPRINT, Path("models"), installed=True)
    shown = PlanReport(outline, on_two_gpus(11, 11, 64), details=True).as_text()
    assert "GPU       a GPU, 11 GB, 11 GB free" in shown
    assert "cuda:1    another GPU, 11 GB, 11 GB free" in shown
    assert re.search(r"cuda:1  +\d+ experts; \S+ GB left free", shown)
    assert "are on the GPUs" in shown
    unused = PlanReport(outline, on_two_gpus(11, 0.5, 64), details=True).as_text()
    assert "cuda:1  not used, for two experts do not fit; 500 MB left free" in unused
    found = json.loads(json.dumps(PlanReport(outline, on_two_gpus(11, 11, 64)).as_json()))
    assert found["machine"]["other_gpus"] == [
        {"device": "cuda:1", "name": "another GPU", "memory": 11 * GB}
    ]
    assert found["machine"]["free"]["other_gpus"] == {"cuda:1": 11 * GB}
    assert len(found["fit"]["placement"]["other_slots"]) == 1


@pytest.mark.parametrize(
    ("there", "options"),
    [
        (machine(6), LoadOptions()),
        (machine(64), LoadOptions(host_memory=MemoryBudget(fraction=1.0))),
        (machine(29.5), LoadOptions(host_memory=MemoryBudget(fraction=1.0))),
        (machine(64, 5.2), LoadOptions()),
        (machine(64, 24), LoadOptions(device_memory=(MemoryBudget(size=5 * GB),))),
    ],
    ids=["little RAM", "much RAM", "a budget", "a GPU", "a budget on a GPU"],
)
def test_the_largest_context_fits_and_one_token_more_does_not(there, options):
    largest = fit_model(BLUEPRINT, there.free, options).largest_context
    assert 8192 <= largest <= 32768
    fit_model(BLUEPRINT, there.free, replace(options, context_size=largest))
    with pytest.raises((ResourceError, UsageError)):
        fit_model(BLUEPRINT, there.free, replace(options, context_size=largest + 1))


def test_what_does_not_fit_is_refused_as_loading_refuses_it():
    with pytest.raises(ResourceError, match=r"at least 4\.3 GB .* 4\.1 GB are free"):
        on_cpu(4.1)
    with pytest.raises(UsageError, match="2 to 32768"):
        on_cpu(64, context_size=40000)
    with pytest.raises(UsageError, match="--device-memory is for a GPU"):
        on_cpu(64, device_memory=(MemoryBudget(size=GB),))


@pytest.mark.parametrize("budget", [None, MemoryBudget(fraction=0.5)])
@pytest.mark.parametrize("context", [None, 64])
def test_a_plan_places_what_loading_places(tiny_model, monkeypatch, budget, context):
    free = GB + 300_000  # so that all but some of the memory is the reserve
    with InstalledModel(tiny_model) as installed:
        planned = fit_model(
            installed.blueprint, FreeMemory(free), LoadOptions(budget, context_size=context)
        )
    monkeypatch.setattr("mixchat.planning.fitting.free_on", lambda device: free)
    options = LoadOptions(host_memory=budget, context_size=context, device="cpu")
    engine = load_engine(tiny_model, options)
    assert engine.context_size == planned.context
    assert engine.experts.slots_by_tier == {"host": planned.placement.slots}


def test_a_speed_is_a_range_over_all_samples_with_the_typical_one_within():
    """One sample gave 0.99 tokens a second where others gave 0.53 to 0.81."""
    samples = [replace(SPEEDS, layer_seconds=seconds) for seconds in (0.001, 0.004, 0.02)]
    found = on_cpu(14.5, *samples)
    alone = [on_cpu(14.5, sample) for sample in samples]
    assert (found.expected.speed.low, found.expected.speed.high) == (
        speed(alone[2]),
        speed(alone[0]),
    )
    assert speed(found) == speed(alone[1])
    assert found.expected.speed.measured_at == found.measurement.measured_at == 1.7e9


def test_without_figures_of_the_disk_there_is_a_plan_without_speed():
    blind = without_disk(SPEEDS)
    found = on_cpu(14.5, blind)
    assert found.expected.speed is None
    assert (found.expected.cost, found.cold, found.warm) == (None, None, None)
    assert found.expected.tokens_per_second is None
    assert on_cpu(30.5, blind).expected.speed is not None  # a memory that holds all needs no disk


def test_looking_at_this_machine_finds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "free_on", lambda device: 7 * GB if device == CPU else 3 * GB)
    there = Machine.now(tmp_path / "not there yet", [CPU])
    assert there.free == FreeMemory(7 * GB, None)
    assert there.gpu is None
    assert there.memory > 0
    assert there.disk_free > 0
    assert there.cpu
    assert Machine.now(tmp_path, [GPU]).free == FreeMemory(7 * GB, 3 * GB)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_loaded_model_is_predicted_as_planned_without_measuring(home, monkeypatch):
    monkeypatch.setattr(measuring, "take_sample", None)
    placement = Placement(100, 0, 256)
    assert predict_speed(BLUEPRINT, home, CPU, placement) is None
    measurement_file().parent.mkdir()
    slow = replace(SPEEDS, layer_seconds=2 * SPEEDS.layer_seconds)
    key = measuring.measurement_key(BLUEPRINT, home, CPU)
    content = {"format": 6, "machines": {key: asdict(measured(SPEEDS, slow))}}
    measurement_file().write_text(json.dumps(content))
    found = on_cpu(14.5, SPEEDS, slow)
    predicted = predict_speed(BLUEPRINT, home, CPU, found.fit.placement)
    assert predicted.decode() == found.expected.speed
    assert predicted.prompt(LONG_PROMPT, cold=False) == found.prompt
    from_disk, warm = (predicted.prompt(PROMPT, cold=cold) for cold in (True, False))
    assert from_disk.high < warm.high
    assert predict_speed(BLUEPRINT, home, GPU, placement) is None
