"""Experts of a model of sixteen, and their digests."""

import hashlib

import torch

from mixchat.experts.cache import ExpertKey
from mixchat.experts.store import ExpertSource, new_block
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


def load(source: ExpertSource, key: ExpertKey, size: int) -> str:
    block = new_block(size).fill_(0xEE)
    for _ in source.load(key, block):
        pass
    return digest(block)
