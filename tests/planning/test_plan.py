"""A plan says what loading will do, on machines that are only described."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planning_tools import BLUEPRINT, CPU, GPU, GPU_SPEEDS, SPEEDS

from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.experts.placement import Placement
from mixchat.install.known_models import KNOWN
from mixchat.install.make.outline import known_blueprints
from mixchat.loading.loader import load_engine
from mixchat.planning import fitting, measuring
from mixchat.planning.cards import find_card
from mixchat.planning.expectation import SpeedEstimate
from mixchat.planning.fitting import FreeMemory, fit_model
from mixchat.planning.hardware import Machine
from mixchat.planning.machine_speeds import GPUSpeeds, MachineSpeeds
from mixchat.planning.measuring import measurement_file
from mixchat.planning.plan import ModelPlan, plan_known, predict_speed, recommended, scaled
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import InstalledModel

GB = 10**9
ALL = Placement(256, 0, 256)
FIVE_GB = (MemoryBudget(size=5 * GB),)


def planned(
    device: torch.device, free: FreeMemory, speeds: MachineSpeeds, **options: Any
) -> ModelPlan:
    return ModelPlan.of(fit_model(BLUEPRINT, free, LoadOptions(**options)), device, speeds)


def on_cpu(ram: float, speeds: MachineSpeeds = SPEEDS, **options: Any) -> ModelPlan:
    return planned(CPU, FreeMemory(int(ram * GB)), speeds, **options)


def on_gpus(ram: float, gpu: float, *more: float, **options: Any) -> ModelPlan:
    others = {f"cuda:{number}": int(size * GB) for number, size in enumerate(more, 1)}
    free = FreeMemory(int(ram * GB), int(gpu * GB), other_gpus=others)
    return planned(GPU, free, GPU_SPEEDS, **options)


def test_a_machine_with_16_gb_holds_a_part_and_reads_the_rest():
    found = on_cpu(14.5)
    assert 80 < found.fit.placement.slots < 140
    assert (found.fit.placement.host_slots, found.fit.context) == (0, 8192)
    assert found.speed.hit_rate == found.speed.host_hit_rate < 1
    assert found.speed.token.reading > 0


def test_a_second_gpu_holds_experts_and_makes_tokens_faster():
    one, two, three = on_gpus(64, 11), on_gpus(64, 11, 11), on_gpus(64, 11, 30)
    assert two.fit.placement.layers == (16, 16)
    assert sum(two.fit.placement.by_device) > 2 * one.fit.placement.slots  # context once
    assert two.fit.largest_context == one.fit.largest_context
    speeds = [found.speed.tokens_per_second for found in (one, two, three)]
    assert speeds == sorted(speeds)
    assert three.speed.hit_rate == 1
    assert sum(three.fit.placement.by_device) == 256


def test_two_gpus_have_a_budget_each_or_one_for_both():
    budgets = (MemoryBudget(size=8 * GB), MemoryBudget(size=5 * GB))
    with pytest.raises(UsageError, match="has 2 values, and there is 1 GPU"):
        on_gpus(64, 24, device_memory=budgets)
    assert on_gpus(64, 24, 24, device_memory=budgets[:1]).fit.placement.other_slots > (60,)


@pytest.mark.parametrize(
    ("free", "options"),
    [
        (FreeMemory(int(6 * GB)), LoadOptions()),
        (FreeMemory(int(64 * GB)), LoadOptions(host_memory=MemoryBudget(fraction=1.0))),
        (FreeMemory(int(29.5 * GB)), LoadOptions(host_memory=MemoryBudget(fraction=1.0))),
        (FreeMemory(int(64 * GB), int(5.2 * GB)), LoadOptions()),
        (
            FreeMemory(int(64 * GB), int(24 * GB)),
            LoadOptions(device_memory=(MemoryBudget(size=5 * GB),)),
        ),
    ],
    ids=["little RAM", "much RAM", "a budget", "a GPU", "a budget on a GPU"],
)
def test_the_largest_context_fits_and_one_token_more_does_not(free, options):
    largest = fit_model(BLUEPRINT, free, options).largest_context
    assert 8192 <= largest <= 32768
    fit_model(BLUEPRINT, free, replace(options, context_size=largest))
    with pytest.raises((ResourceError, UsageError)):
        fit_model(BLUEPRINT, free, replace(options, context_size=largest + 1))


def test_what_does_not_fit_is_refused_as_loading_refuses_it():
    with pytest.raises(ResourceError, match=r"at least 4\.3 GB .* 4\.1 GB are free"):
        on_cpu(4.1)
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


def test_looking_at_this_machine_finds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "free_on", lambda device: 7 * GB if device == CPU else 3 * GB)
    there = Machine.now(tmp_path / "not there yet", [CPU])
    assert there.free == FreeMemory(7 * GB, None)
    assert there.gpus == ()
    assert there.memory > 0
    assert there.disk_free > 0
    assert there.cpu
    assert Machine.now(tmp_path, [GPU]).free == FreeMemory(7 * GB, 3 * GB)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_loaded_model_is_predicted_as_planned_without_measuring(home, monkeypatch):
    monkeypatch.setattr(measuring, "take_speeds", None)
    placement = Placement(100, 0, 256)
    assert predict_speed(BLUEPRINT, home, CPU, placement) is None
    measurement_file().parent.mkdir()
    key = measuring.measurement_key(BLUEPRINT, home, CPU)
    content = {"format": 8, "machines": {key: asdict(SPEEDS)}}
    measurement_file().write_text(json.dumps(content))
    found = on_cpu(14.5)
    assert predict_speed(BLUEPRINT, home, CPU, found.fit.placement) == found.speed
    assert predict_speed(BLUEPRINT, home, GPU, placement) is None


@pytest.mark.parametrize(
    ("features", "expert_s", "layer_s"),
    [
        ({"intermediate_size": 7168}, 0.0015, 0.001),
        # Of q, o and each of k and v, with 32, 32 and 8 heads, q and o have 8 now.
        ({"num_attention_heads": 8}, 0.003, 0.0001 + 0.0009 * 32 / 80),
    ],
)
def test_a_cpu_takes_as_long_for_a_part_as_its_bytes_and_a_constant_time_for_a_layer(
    features, expert_s, layer_s
):
    other = Blueprint(replace(BLUEPRINT.config, **features), BLUEPRINT.quantization)
    found = scaled(SPEEDS, BLUEPRINT, other)
    assert found.expert_time(1) == pytest.approx(expert_s, rel=1e-3)
    assert found.layer_seconds == pytest.approx(layer_s)
    assert found.disk_idle == SPEEDS.disk_idle


@pytest.mark.parametrize(
    ("card", "slower"), [("RTX 4060", False), ("RTX 3090", True), ("H100", True)]
)
def test_trellis_codes_take_a_gpu_the_time_of_their_instructions(card, slower):
    """An H100 has bytes for more codes than it has time to decode. 3 bits seemed faster than 4."""
    speeds = replace(SPEEDS, gpus=(GPUSpeeds.of_card(find_card(card)),))
    form = BLUEPRINT.quantization
    three, four = (
        SpeedEstimate(Blueprint(BLUEPRINT.config, replace(form, quant_type=name)), GPU, speeds, ALL)
        for name in ("trellis3", "nf4")
    )
    assert (three.tokens_per_second < four.tokens_per_second) == slower


def known_on(free: float, **options: Any) -> dict[tuple[str, ...], ModelPlan | str]:
    memory, load = FreeMemory(int(free * GB)), LoadOptions(**options)
    return dict(plan_known(known_blueprints(), memory, CPU, load, speeds_of))


def speeds_of(blueprint: Blueprint) -> MachineSpeeds:
    return scaled(SPEEDS, BLUEPRINT, blueprint)


def test_known_models_come_by_size_with_mixtral_last_and_the_estimate_of_a_plan():
    found, catalog = known_on(13), known_blueprints()
    assert [*found][:-1] == sorted([*catalog][:-1], key=lambda names: catalog[names].weights_size)
    instruct = [*found][-1]
    assert instruct == ("instruct", "base")
    fit = fit_model(catalog[instruct], FreeMemory(13 * GB), LoadOptions())
    assert found[instruct] == ModelPlan.of(fit, CPU, speeds_of(catalog[instruct]))


@pytest.mark.parametrize(
    ("free", "room", "name"),
    [
        (5.5, {}, "olmoe"),  # lfm2 would read from the disk
        (14, {}, "gpt-oss"),
        (22, {}, "qwen3.6"),
        (60, {}, "qwen3.6"),  # not instruct, which has no score
        (60, {"granite", "olmoe", "lfm2-24b"}, "lfm2-24b"),  # without scores, the largest
        (60, {"8x22b"}, "8x22b"),  # slower than a person reads, but all that there is room for
        (2, {}, "granite"),  # the fastest, if memory holds none
    ],
)
def test_the_model_with_the_best_score_in_memory_is_recommended(free, room, name):
    """The first advice was to download Mixtral, for half a token a second."""
    found = recommended(known_on(free), lambda names: not room or names[0] in room)
    assert found[0] == name


def test_no_model_is_recommended_if_none_fits():
    assert recommended(known_on(0.1), lambda names: True) is None
    assert recommended({}, lambda names: True) is None


def test_scores_are_parts_of_all_questions_with_their_source_and_month():
    scores = [known.score for known in KNOWN.values() if known.score is not None]
    assert len(scores) >= 6
    for score in scores:
        assert 25 < score.percent < 100
        assert score.source
        assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", score.date)


def test_a_model_that_cannot_run_says_why():
    found = {names[0]: plan for names, plan in known_on(4, context_size=8192).items()}
    assert found["8x22b"] == "does not fit into memory"
    assert found["olmoe"] == "does not run with these flags"  # it has 4096 tokens
    assert isinstance(found["granite"], ModelPlan)
