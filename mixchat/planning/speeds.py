"""The speed of this machine for a model: as it was measured before, or as it is measured now."""

from __future__ import annotations

from pathlib import Path

import torch

from mixchat.planning.calibration import (
    Calibration,
    Measurement,
    calibration_key,
    load,
    measure_and_keep,
)
from mixchat.planning.measure import SAMPLE, measure
from mixchat.planning.probe import layer_probe
from mixchat.settings import data_dir
from mixchat.weights.format.blueprint import Blueprint


def calibration_path() -> Path:
    """The file that remembers how fast this machine is."""
    return data_dir() / "machine.json"


def known_speeds(blueprint: Blueprint, directory: Path, device: torch.device) -> Measurement | None:
    """The measurement made before for a model of this shape in `directory`; measures nothing."""
    return load(calibration_path(), calibration_key(blueprint, directory, device), device)


def measure_speeds(blueprint: Blueprint, directory: Path, device: torch.device) -> Measurement:
    """Measure this machine, in about ten seconds, and keep that in place of what was known."""

    def sample() -> Calibration:
        probe = layer_probe(blueprint, device)
        return measure(blueprint, directory, device, probe, effort=SAMPLE)

    key = calibration_key(blueprint, directory, device)
    return measure_and_keep(calibration_path(), key, sample)
