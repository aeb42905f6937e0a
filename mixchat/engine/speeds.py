"""How fast this machine is for a model: what was measured once, or is measured now."""

from __future__ import annotations

from pathlib import Path

import torch

from mixchat.engine.probe import layer_probe
from mixchat.experts.calibration import Calibration, calibration_key, load, load_or_measure
from mixchat.experts.measure import measure
from mixchat.experts.runner import compute
from mixchat.settings import data_dir
from mixchat.weights.blueprint import Blueprint


def calibration_path() -> Path:
    """The file that remembers how fast this machine is."""
    return data_dir() / "machine.json"


def known_speeds(blueprint: Blueprint, directory: Path, device: torch.device) -> Calibration | None:
    """What was measured before for a model of this shape, kept in `directory`; measures nothing."""
    return load(calibration_path(), calibration_key(blueprint, directory, device), device)


def speeds(blueprint: Blueprint, directory: Path, device: torch.device) -> Calibration:
    """The same, measured where it is not known, in about five seconds, and kept."""

    def run() -> Calibration:
        return measure(blueprint, directory, device, compute, layer_probe(blueprint, device))

    key = calibration_key(blueprint, directory, device)
    return load_or_measure(calibration_path(), key, device, run)
