"""machine.json: measurements are saved there by what they depend on, and read again."""

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planning_tools import CPU, GPU, GPU_SPEEDS, SPEEDS, without_disk

from mixchat.base import machine
from mixchat.planning import measuring
from mixchat.planning.machine_speeds import Measurement
from mixchat.planning.measuring import SAMPLES, load_measurement, measure_and_save, measurement_key
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import InstalledModel


@pytest.fixture
def blueprint(tiny_model: Path) -> Blueprint:
    with InstalledModel(tiny_model) as installed:
        return installed.blueprint


PLACE = Path("/models")
MADE = Measurement(1.7e9, (SPEEDS,) * SAMPLES, "a CPU", str(PLACE), 0.1)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time and the machine are those of `MADE`."""
    monkeypatch.setattr(machine, "cpu_name", lambda: MADE.cpu)
    monkeypatch.setattr(machine.OtherPrograms, "share", lambda self: MADE.other_programs)
    monkeypatch.setattr(
        measuring,
        "time",
        SimpleNamespace(time=lambda: MADE.measured_at, perf_counter=time.perf_counter),
    )


def test_measuring_again_replaces_what_was_known(tmp_path):
    """A measurement that a busy machine had spoiled stayed for good."""
    path = tmp_path / "new" / "machine.json"
    samples = [dataclasses.replace(SPEEDS, memory_bandwidth=1e9 + n) for n in range(SAMPLES)]
    left = iter(samples)
    made = measure_and_save(path, "here", PLACE, lambda: next(left))
    assert made == dataclasses.replace(MADE, samples=tuple(samples))
    assert load_measurement(path, "here", 0) == made
    slower = dataclasses.replace(SPEEDS, memory_bandwidth=1e9)
    made = measure_and_save(path, "here", PLACE, lambda: slower)
    assert made.samples == (slower,) * SAMPLES
    assert load_measurement(path, "here", 0) == made


def test_each_key_has_its_own_result_and_the_last_ones_stay(tmp_path):
    path = tmp_path / "machine.json"
    results = [dataclasses.replace(SPEEDS, memory_bandwidth=1e9 + index) for index in range(40)]
    made = [
        measure_and_save(path, str(index), PLACE, lambda result=result: result)
        for index, result in enumerate(results)
    ]
    assert load_measurement(path, "39", 0) == made[39]
    assert load_measurement(path, "8", 0) == made[8]
    assert load_measurement(path, "7", 0) is None
    assert load_measurement(path, "39", 1) is None


def entry(**changes: Any) -> str:
    sample = {**dataclasses.asdict(SPEEDS), **changes}
    made = {**dataclasses.asdict(MADE), "samples": [sample] * SAMPLES}
    return json.dumps({"format": 6, "machines": {"here": made}})


DAMAGED = [
    "",
    "{",
    "[" * 100_000,
    '{"format": 6}',
    '{"format": 6, "machines": []}',
    '{"format": 6, "machines": {"here": null}}',
    '{"format": 6, "machines": {"here": [1]}}',
    '{"format": 6, "machines": {"here": {}}}',
    '{"format": 6, "machines": {"here": {"measured_at": 1, "samples": []}}}',
    entry().replace('"format": 6', '"format": 0'),
    entry().replace('"measured_at": 1700000000.0', '"measured_at": "today"'),
    entry(memory_bandwidth=0),
    entry(disk_bandwidth_idle="3e9"),
    entry(memory_bandwidth=float("nan")),
    entry(memory_bandwidth=float("inf")),
    entry(memory_bandwidth=10**400),
    entry(expert_seconds=[]),
    entry(expert_seconds={"1": 1.0}),
    entry(expert_seconds={"cpu": {"1": 1.0, "8": 1.0}}),
    entry(expert_seconds={"one": 1.0, "8": 1.0}),
    entry(expert_seconds={"1": 1.0, "8": None}),
    entry(layer_seconds=0),
    entry(gpus=[{"name": "a GPU"}]),
    entry(gpus=None),
    entry().replace(', "cpu": "a CPU"', ""),
    entry().replace('"other_programs": 0.1', '"other_programs": "some"'),
    entry().replace(', "layer_seconds": 0.001', ""),
]


def test_the_figures_of_gpus_are_saved_and_damaged_ones_are_not_read(tmp_path):
    path = tmp_path / "machine.json"
    made = measure_and_save(path, "here", PLACE, lambda: GPU_SPEEDS)
    assert load_measurement(path, "here", 1) == made
    assert load_measurement(path, "here", 2) is None
    figures = dataclasses.asdict(GPU_SPEEDS.gpus[0])
    for damaged in ({"memory": 0}, {"bus": "fast"}, {"efficiency": {"nf4": -1}}, {"name": "X"}):
        path.write_text(entry(gpus=[figures | damaged]))
        assert (load_measurement(path, "here", 1) is None) == ("name" not in damaged)


def test_a_damaged_or_old_file_is_measured_and_written_again(tmp_path):
    path = tmp_path / "machine.json"
    for text in DAMAGED:
        path.write_text(text)
        assert load_measurement(path, "here", 0) is None, text
        assert measure_and_save(path, "here", PLACE, lambda: SPEEDS) == MADE
        assert load_measurement(path, "here", 0) == MADE


def test_a_link_in_its_place_is_neither_read_nor_written_through(tmp_path):
    path, precious = tmp_path / "machine.json", tmp_path / "precious"
    precious.write_text(entry())
    path.symlink_to(precious)
    other = dataclasses.replace(SPEEDS, memory_bandwidth=1e9)
    assert measure_and_save(path, "here", PLACE, lambda: other).typical == other
    assert precious.read_text() == entry()
    assert not path.is_symlink()
    assert load_measurement(path, "here", 0) == dataclasses.replace(
        MADE, samples=(other,) * SAMPLES
    )


def test_what_lacks_the_disk_is_measured_again_the_next_time(tmp_path):
    path = tmp_path / "machine.json"
    partly = without_disk(SPEEDS)
    assert measure_and_save(path, "here", PLACE, lambda: partly).typical == partly
    assert not path.exists()
    assert measure_and_save(path, "here", PLACE, lambda: SPEEDS) == MADE


def test_a_result_that_cannot_be_saved_is_returned_nevertheless(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "machine.json"
    assert measure_and_save(path, "here", PLACE, lambda: SPEEDS) == MADE


def test_the_key_names_what_a_result_depends_on(blueprint, tmp_path, monkeypatch):
    key = measurement_key(blueprint, tmp_path, CPU)
    assert key == measurement_key(blueprint, tmp_path / "below", CPU)
    larger = dataclasses.replace(
        blueprint, config=dataclasses.replace(blueprint.config, hidden_size=128)
    )
    keys = {
        key,
        measurement_key(larger, tmp_path, CPU),
        measurement_key(blueprint, Path("/proc"), CPU),
        measurement_key(blueprint, tmp_path, GPU),
    }
    for module, name, value in (
        (machine, "cpu_name", "another"),
        (machine, "usable_cores", 77),
        (torch, "get_num_threads", 77),
        (torch.backends.cpu, "get_cpu_capability", "none"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_, value=value: value)
            keys.add(measurement_key(blueprint, tmp_path, CPU))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        keys.add(measurement_key(blueprint, tmp_path, CPU))
    assert len(keys) == 9
