"""Experts of a model of sixteen, and their digests."""

import hashlib

import torch

from mixchat.experts.cache import ExpertKey
from mixchat.experts.store import ReadExpert, new_block
from mixchat.weights.format.installed_model import InstalledModel

LAYERS, EXPERTS = 4, 4
KEYS = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
A, B, C, D = KEYS[0], KEYS[1], KEYS[2], KEYS[3]


def whole(installed: InstalledModel, key: ExpertKey) -> torch.Tensor:
    block = new_block(installed.blueprint.expert.stride)
    installed.read_expert(*key, block)
    return block


def digest(block: torch.Tensor) -> str:
    return hashlib.sha256(block.numpy().tobytes()).hexdigest()[:16]


def disk(installed: InstalledModel, *, direct: bool = False) -> ReadExpert:
    """Return a function that reads experts, as the loader makes it."""

    def read(key: ExpertKey, block: torch.Tensor, start: int) -> None:
        installed.read_expert(*key, block, start, direct=direct)

    return read
