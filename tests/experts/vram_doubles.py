"""Slots of a GPU on paper, with experts of 1,000 bytes that come through four stages of 64."""

import gc
import threading
import time
from typing import Any

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
    """RAM without experts, and the disk. Reads of the experts in `held` wait until `go`.

    `reached` is set when every thread waits. A thread that came later took another expert first.
    """

    def __init__(self, sizes: tuple[int, ...] = (SIZE,) * LAYERS) -> None:
        self.sizes = sizes
        self.begun: list[ExpertKey] = []
        self.held: set[ExpertKey] = set()
        self._waiting = 0
        self.reached, self.go = threading.Event(), threading.Event()

    def borrow(self, load: ExpertLoad) -> None:
        """Lend nothing."""

    def read(self, key: ExpertKey, block: torch.Tensor, start: int) -> None:
        self.begun.append(key)
        if key in self.held:
            self._waiting += 1
            if self._waiting >= vram._STAGES:
                self.reached.set()
            self.go.wait()
        block.copy_(bytes_of(key, self.sizes[key.layer])[start : start + len(block)])

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


def filled(memories: Memories, *sizes: int) -> VramTier:
    """Return slots of these sizes with the first experts of both layers."""
    vram = memories.slots(*sizes)
    vram.fill_slots()
    settle(vram)
    vram.publish()
    return vram


def content(vram: VramTier, key: ExpertKey) -> torch.Tensor:
    """Return the bytes that kernels of the current stream read."""
    expert: Any = vram.expert(key)
    return (expert ^ 0).cpu()
