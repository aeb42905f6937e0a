"""The known models on a machine, from the figures of one model."""

from dataclasses import replace

import pytest
from planning_tools import BLUEPRINT, CPU, SPEEDS, measured

from mixchat.base.options import LoadOptions
from mixchat.install.make.outline import known_blueprints
from mixchat.planning.expectation import expect
from mixchat.planning.fitting import FreeMemory, fit_model
from mixchat.planning.plan import fit_known, scaled
from mixchat.weights.format.blueprint import Blueprint

GB = 10**9
HALF = Blueprint(replace(BLUEPRINT.config, intermediate_size=7168), BLUEPRINT.quantization)
NARROW = Blueprint(replace(BLUEPRINT.config, num_attention_heads=8), BLUEPRINT.quantization)


def test_a_cpu_takes_as_long_for_a_part_as_its_bytes_and_a_constant_time_for_a_layer():
    (sample,) = scaled(measured(SPEEDS), BLUEPRINT, HALF).samples
    assert sample.expert_time(1) == pytest.approx(0.0015)
    assert (sample.layer_seconds, sample.disk_bandwidth) == (0.001, 2e9)
    (sample,) = scaled(measured(SPEEDS), BLUEPRINT, NARROW).samples
    # Of q, o and each of k and v, with 32, 32 and 8 heads, q and o have 8 now.
    assert sample.layer_seconds == pytest.approx(0.0001 + 0.0009 * 32 / 80)
    assert sample.expert_time(1) == pytest.approx(0.003, rel=1e-3)


def rows(free, **options):
    def measurement(blueprint):
        return scaled(measured(SPEEDS), BLUEPRINT, blueprint)

    known, load = known_blueprints(), LoadOptions(**options)
    return list(fit_known(known, FreeMemory(int(free * GB)), CPU, load, measurement))


def test_the_known_models_come_by_their_size_with_the_same_prediction_as_a_plan():
    found = rows(13)
    assert [row.names[0] for row in found] == [
        "granite",
        "olmoe",
        "lfm2",
        "mellum2",
        "gpt-oss",
        "lfm2-24b",
        "gemma4",
        "glm-4.7-flash",
        "qwen3",
        "qwen3.6",
        "instruct",
        "qwen3-coder-next",
        "8x22b",
    ]
    assert sorted(name for row in found for name in row.names)[:2] == ["8x22b", "base"]
    for row, blueprint in zip(
        found, sorted(known_blueprints().values(), key=lambda each: each.size), strict=True
    ):
        fit = fit_model(blueprint, FreeMemory(13 * GB), LoadOptions())
        measurement = scaled(measured(SPEEDS), BLUEPRINT, blueprint)
        assert row.expected == expect(blueprint, CPU, measurement, fit.placement)
        assert row.fit == fit


def test_a_model_that_cannot_run_says_why():
    problems = {row.names[0]: row.problem for row in rows(4, context_size=8192)}
    assert problems["8x22b"] == "does not fit into memory"
    assert problems["olmoe"] == "does not run with these flags"  # it has 4096 tokens
    assert problems["granite"] is None
