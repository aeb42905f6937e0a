"""machine.json: measurements are saved there by what they depend on, and read again."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planning_tools import BLIND, BLUEPRINT, CPU, GPU, SPEEDS

from mixchat.base import machine
from mixchat.planning import measuring
from mixchat.planning.machine_speeds import GPUSpeeds, MachineSpeeds
from mixchat.planning.measuring import (
    measure_machine,
    measurement_file,
    measurement_key,
    saved_speeds,
)
from mixchat.weights.format.blueprint import Blueprint


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data directory, on a machine of which all but the speeds is known."""
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "cpu_name", lambda: "a CPU")
    monkeypatch.setattr(machine.OtherPrograms, "share", lambda self: 0.1)
    clock = SimpleNamespace(time=lambda: 1.7e9, perf_counter=time.perf_counter)
    monkeypatch.setattr(measuring, "time", clock)
    return tmp_path


@pytest.fixture
def measured(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MachineSpeeds]:
    """Measure a machine with these speeds."""

    def measured(speeds: MachineSpeeds, blueprint: Blueprint = BLUEPRINT) -> MachineSpeeds:
        monkeypatch.setattr(measuring, "take_speeds", lambda *given: speeds)
        made = measure_machine(blueprint, place, CPU)
        assert made == dataclasses.replace(speeds, cpu="a CPU", directory=str(place))
        return made

    return measured


def test_measuring_again_replaces_what_was_known(place, measured):
    """A measurement that a busy machine had spoiled stayed for good."""
    for layer_s in (0.001, 0.002):
        made = measured(dataclasses.replace(SPEEDS, layer_seconds=layer_s))
        assert saved_speeds(BLUEPRINT, place, CPU) == made


def test_a_measurement_beside_other_programs_is_of_a_busy_machine(place, monkeypatch):
    monkeypatch.setattr(machine.OtherPrograms, "share", lambda self: 0.3)
    monkeypatch.setattr(measuring, "take_speeds", lambda *given: SPEEDS)
    assert measure_machine(BLUEPRINT, place, CPU).is_busy


def test_each_key_has_its_own_result_and_the_last_ones_stay(place, measured):
    models = [
        Blueprint(dataclasses.replace(BLUEPRINT.config, hidden_size=64 * n), BLUEPRINT.quantization)
        for n in range(1, 41)
    ]
    made = [
        measured(dataclasses.replace(SPEEDS, layer_seconds=n), model)
        for n, model in enumerate(models, 1)
    ]
    found = [saved_speeds(model, place, CPU) for model in models]
    assert found == [None] * 8 + made[8:]


def entry(**changes: Any) -> str:
    made = {**dataclasses.asdict(SPEEDS), **changes}
    return json.dumps({"format": 8, "machines": {"here": made}})


DAMAGED = [
    "",
    "{",
    "[" * 100_000,
    '{"format": 8}',
    '{"format": 8, "machines": []}',
    '{"format": 8, "machines": {"here": null}}',
    '{"format": 8, "machines": {"here": [1]}}',
    '{"format": 8, "machines": {"here": {}}}',
    entry().replace('"format": 8', '"format": 0'),
    entry(measured_at="today"),
    entry(measured_at=1e300),
    entry(disk_idle="3e9"),
    entry(disk_busy=None),
    entry(layer_seconds=float("nan")),
    entry(layer_seconds=float("inf")),
    entry(layer_seconds=10**400),
    entry(expert_seconds=[]),
    entry(expert_seconds={"1": 1.0}),
    entry(expert_seconds={"cpu": {"1": 1.0, "8": 1.0}}),
    entry(expert_seconds={"one": 1.0, "8": 1.0}),
    entry(expert_seconds={"1": 1.0, "8": None}),
    entry(layer_seconds=0),
    entry(gpus=[{"name": "a GPU"}]),
    entry(gpus=None),
    entry().replace(', "cpu": ""', ""),
]
GPU_FIGURES = {"name": "a GPU", "memory": 4e11, "bus": 2e10, "compute": 5e13, "lanes": 1e13}
GPU_FIGURES |= {"kernel": 4e-6, "round_trip": 1e-5}


@pytest.mark.parametrize(
    ("changes", "gpus", "is_read"),
    [
        ({}, 1, True),
        ({"name": "X"}, 1, True),
        ({}, 2, False),
        ({"memory": 0}, 1, False),
        ({"bus": "fast"}, 1, False),
        ({"kernel": float("nan")}, 1, False),
    ],
)
def test_the_figures_of_gpus_are_saved_and_damaged_ones_are_not_read(changes, gpus, is_read):
    made = dataclasses.asdict(SPEEDS) | {"gpus": [GPU_FIGURES | changes]}
    found = MachineSpeeds.from_dict(made, gpus)
    assert (found is not None) == is_read
    if found is not None:
        assert found.gpus == (GPUSpeeds(**GPU_FIGURES | changes),)


def test_a_damaged_or_old_file_is_measured_and_written_again(place, measured, monkeypatch):
    monkeypatch.setattr(measuring, "measurement_key", lambda *given: "here")
    measurement_file().write_text(entry())
    assert saved_speeds(BLUEPRINT, place, CPU) == SPEEDS
    for text in DAMAGED:
        measurement_file().write_text(text)
        assert saved_speeds(BLUEPRINT, place, CPU) is None, text
        made = measured(SPEEDS)
        assert saved_speeds(BLUEPRINT, place, CPU) == made


def test_a_link_in_its_place_is_neither_read_nor_written_through(place, measured):
    precious = place / "precious"
    precious.write_text(entry())
    measurement_file().symlink_to(precious)
    made = measured(SPEEDS)
    assert precious.read_text() == entry()
    assert not measurement_file().is_symlink()
    assert saved_speeds(BLUEPRINT, place, CPU) == made


def test_what_lacks_the_disk_is_measured_again_the_next_time(place, measured):
    measured(BLIND)
    assert not measurement_file().exists()


def test_a_result_that_cannot_be_saved_is_returned_nevertheless(place, measured, monkeypatch):
    (place / "file").touch()
    monkeypatch.setenv("MIXCHAT_HOME", str(place / "file"))
    measured(SPEEDS)


def test_the_key_names_what_a_result_depends_on(tmp_path, monkeypatch):
    key = measurement_key(BLUEPRINT, tmp_path, CPU)
    assert key == measurement_key(BLUEPRINT, tmp_path / "below", CPU)
    larger = dataclasses.replace(
        BLUEPRINT, config=dataclasses.replace(BLUEPRINT.config, hidden_size=128)
    )
    keys = {
        key,
        measurement_key(larger, tmp_path, CPU),
        measurement_key(BLUEPRINT, Path("/proc"), CPU),
        measurement_key(BLUEPRINT, tmp_path, GPU),
    }
    for module, name, value in (
        (machine, "cpu_name", "another"),
        (machine, "usable_cores", 77),
        (torch, "get_num_threads", 77),
        (torch.backends.cpu, "get_cpu_capability", "none"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_, value=value: value)
            keys.add(measurement_key(BLUEPRINT, tmp_path, CPU))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        keys.add(measurement_key(BLUEPRINT, tmp_path, CPU))
    assert len(keys) == 9
