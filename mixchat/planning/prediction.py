"""Predicts how fast a loaded model is, from what was measured before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mixchat.experts.placement import Placement
from mixchat.planning.calibration import Measurement
from mixchat.planning.expectation import SpeedRange, expect
from mixchat.planning.machine_speed import saved_measurement
from mixchat.planning.prompts import prompt_speed
from mixchat.weights.format.blueprint import Blueprint


@dataclass(frozen=True)
class Prediction:
    """The speed of a model, with the experts that its slots hold by now."""

    blueprint: Blueprint
    device: torch.device
    measurement: Measurement
    placement: Placement

    def decode(self) -> SpeedRange | None:
        """Return the speed of decoding; None where the disk is needed and was not measured."""
        return expect(self.blueprint, self.device, self.measurement, self.placement).speed

    def prompt(self, tokens: int, *, cold: bool) -> SpeedRange | None:
        """Return the speed of a prompt; `cold`: all experts come from disk."""
        placement = None if cold else self.placement
        return prompt_speed(self.blueprint, self.device, self.measurement, placement, tokens)


def predict_speed(
    blueprint: Blueprint, directory: Path, device: torch.device, placement: Placement
) -> Prediction | None:
    """Return the prediction for a loaded model, by the saved measurement.

    None where this machine was never measured for a model of its shape; `mixchat plan` does that.
    """
    saved = saved_measurement(blueprint, directory, device)
    return None if saved is None else Prediction(blueprint, device, saved, placement)
