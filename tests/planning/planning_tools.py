"""A model and a machine that the tests of plans share."""

from dataclasses import replace

import torch

from mixchat.install.known_models import KNOWN
from mixchat.planning.gpu_speeds import GPUSpeeds
from mixchat.planning.machine_speeds import MachineSpeeds, Measurement
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization

CPU = torch.device("cpu")
GPU = torch.device("cpu:0")  # another device by its name
CONFIG = read_config(KNOWN["instruct"].config)
# As both devices compute it here, so that what leaves the "GPU" can go into RAM.
BLUEPRINT = Blueprint(CONFIG, Quantization())
SPEEDS = MachineSpeeds(2e9, 3e9, 3e9, 3e10, {1: 0.003, 8: 0.005}, 0.001)
GPU_SPEEDS = replace(SPEEDS, gpus=(GPUSpeeds("a GPU", memory=5e11, bus=2e10, compute=5e13),))


def without_disk(speeds: MachineSpeeds) -> MachineSpeeds:
    """Return the figures of a machine whose disk could not be measured."""
    return replace(speeds, disk_bandwidth=None, disk_bandwidth_idle=None, disk_bandwidth_fresh=None)


def measured(*samples: MachineSpeeds) -> Measurement:
    return Measurement(1.7e9, samples)
