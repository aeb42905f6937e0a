"""Slots of a GPU on paper, with experts of 1,000 bytes that come through four stages of 64."""

import gc
import threading
import time
from typing import Any

import numpy as np
import torch
from paper_runtime import PaperRuntime

from mixchat.experts import vram
from mixchat.experts.cache import ExpertKey
from mixchat.experts.load_queue import ExpertLoad
from mixchat.experts.vram import VramTier

GPU = torch.device("paper", 0)
LAYERS, EXPERTS, SIZE = 2, 4, 1000
KEYS = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
STAGE = 64


def bytes_of(key: ExpertKey, size: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * key.layer + key.expert)
    return torch.randint(256, (size,), dtype=torch.uint8, generator=generator)


class Form:
    """Stands in for an `ExpertSpec`: an expert is its block."""

    def __init__(self, size: int) -> None:
        self.stride = self.nbytes = size

    def build(self, block: torch.Tensor) -> torch.Tensor:
        return block[: self.stride]


class Memories:
    """RAM, which lends the blocks of some experts, and the disk.

    Reads of the experts in `held` wait until `go`, and those of `bad` ones fail after a stage.
    `reached` is set when every thread waits. A thread that came later took another expert first.
    """

    def __init__(self, sizes: tuple[int, ...] = (SIZE,) * LAYERS) -> None:
        self.sizes = sizes
        self.in_ram: dict[ExpertKey, torch.Tensor] = {}
        self.readers: list[ExpertLoad] = []
        self.read_bytes: dict[ExpertKey, int] = {}
        self.held: set[ExpertKey] = set()
        self._waiting: list[ExpertKey] = []
        self.bad: set[ExpertKey] = set()
        self.reached, self.go = threading.Event(), threading.Event()

    def borrow(self, load: ExpertLoad) -> torch.Tensor | None:
        if load.key not in self.in_ram:
            return None
        self.readers.append(load)
        return self.in_ram[load.key]

    @property
    def lent(self) -> list[ExpertKey]:
        return [load.key for load in self.readers if not (load.ended or load.cancelled)]

    def read(self, key: ExpertKey, block: torch.Tensor, start: int) -> None:
        if key in self.held:
            self._waiting.append(key)
            if len(self._waiting) >= vram._STAGES:
                self.reached.set()
            self.go.wait()
        if key in self.bad and start:
            raise OSError("the disk says no")
        block.copy_(bytes_of(key, self.sizes[key.layer])[start : start + len(block)])
        self.read_bytes[key] = self.read_bytes.get(key, 0) + len(block)

    def slots(self, *sizes: int, reserve: int = 0) -> VramTier:
        """Return slots of a GPU, of these sizes."""
        ram: Any = self
        forms: Any = [Form(size) for size in self.sizes]
        return VramTier(
            GPU, range(LAYERS), EXPERTS, forms.__getitem__, sizes, self.read, ram, reserve
        )


def quiet(paper: PaperRuntime) -> int:
    """Return the GPU's bytes taken, once the threads of earlier tests have ended."""
    looks = list[int]()
    while len(looks) < 5 or set(looks[-5:]) != {looks[-1]}:
        gc.collect()
        time.sleep(0.03)
        looks.append(paper.memory(GPU).taken + len(paper.locked))
    return paper.memory(GPU).taken


def settle(vram: VramTier) -> None:
    """Wait until nothing is on its way."""
    for load in list(vram._loads.values()):
        load._ended.wait()


def filled(memories: Memories, count: int = 4) -> VramTier:
    """Return slots with the first experts of both layers."""
    vram = memories.slots(*[SIZE] * count)
    vram.fill_slots()
    settle(vram)
    vram.publish()
    return vram


def use(vram: VramTier, key: ExpertKey, tokens: int = 20) -> None:
    """Count an expert in so many tokens."""
    for _ in range(tokens):
        vram.policy.note_rows(key, 1)


def content(vram: VramTier, key: ExpertKey) -> torch.Tensor:
    """Return the bytes that kernels of the current stream read."""
    expert: Any = vram.expert(key)
    return (expert ^ 0).cpu()


def table_of(vram: VramTier) -> np.ndarray:
    return np.asarray(vram.table.cpu().numpy())
