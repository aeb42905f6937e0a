"""A model and a machine that the tests of plans share."""

from dataclasses import replace

import torch

from mixchat.experts.placement import Placement
from mixchat.install.known_models import KNOWN
from mixchat.planning.expectation import SpeedEstimate
from mixchat.planning.machine_speeds import GPUSpeeds, MachineSpeeds
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization

CPU = torch.device("cpu")
GPU = torch.device("cpu:0")  # another device by its name
CONFIG = read_config(KNOWN["instruct"].config)
# As both devices compute it here, so that what leaves the "GPU" can go into RAM.
BLUEPRINT = Blueprint(CONFIG, Quantization())
SPEEDS = MachineSpeeds(2e9, 3e9, {1: 0.003, 8: 0.005}, 0.001, measured_at=1.7e9)
GPU_SPEEDS = replace(SPEEDS, gpus=(GPUSpeeds("a GPU", 4e11, bus=2e10, compute=5e13, lanes=1e13),))
BLIND = replace(SPEEDS, disk_busy=None, disk_idle=None)


def estimate(
    slots: int = 256,
    host_slots: int = 0,
    *,
    device: torch.device = CPU,
    speeds: MachineSpeeds | None = None,
    blueprint: Blueprint = BLUEPRINT,
    answers: int = 1,
    other_slots: tuple[int, ...] = (),
) -> SpeedEstimate:
    """Return the estimate with so many experts in slots and in RAM behind a GPU."""
    known = speeds or (SPEEDS if device == CPU else GPU_SPEEDS)
    placement = Placement(slots, host_slots, blueprint.expert_count, other_slots=other_slots)
    return SpeedEstimate(blueprint, device, known, placement, answers)
