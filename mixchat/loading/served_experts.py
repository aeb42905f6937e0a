"""Builds the experts that a worker serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mixchat.base.options import LoadOptions
from mixchat.base.progress import Note
from mixchat.engine.prompt_cache import identity_of
from mixchat.experts.cache import ExpertKey
from mixchat.experts.dispatcher import Dispatcher
from mixchat.experts.gpu_experts import GpuExperts
from mixchat.experts.memory import within_memory
from mixchat.kernels.cpu.compile import require_kernels
from mixchat.loading.devices import usable_devices
from mixchat.loading.tiers import build_experts
from mixchat.loading.workers import ExpertShare
from mixchat.planning.fitting import FreeMemory, fit_experts
from mixchat.planning.torch_threads import choose_threads
from mixchat.weights.format.installed_model import InstalledModel

if TYPE_CHECKING:
    from mixchat.experts.workers.messages import Hello


_Experts = Dispatcher | GpuExperts


class ServedExperts:
    """The `WorkerModel` of an installed model, whose experts stay in memory between two chats.

    Raises `ResourceError` if fewer than two experts fit.
    """

    def __init__(
        self,
        installed: InstalledModel,
        options: LoadOptions,
        devices: Sequence[torch.device],
        note: Note,
    ) -> None:
        self._installed = installed
        self._options = options
        self._device = devices[0]
        self._devices = devices
        self._note = note
        config = installed.config
        self.num_layers = config.num_moe_layers
        self.num_experts = config.num_local_experts
        self.hidden_size = config.hidden_size
        self.identity = identity_of(installed.manifest)
        self.name = installed.directory.name
        self.placement = fit_experts(installed.blueprint, FreeMemory.now(devices), options)
        self._exact = False
        self._held: list[ExpertKey] = []
        self._built: _Experts | None = self._build()

    @property
    def slots(self) -> int:
        return self._experts.slots

    def begin(self, hello: Hello) -> str:
        self._exact = hello.exact_prompts
        self.follow_memory()
        return self._installed.blueprint.expert_arithmetic(self._device, exact=self._exact)

    def hold(self, keys: Sequence[ExpertKey]) -> None:
        if self.placement.layers and set(keys) != set(self._held):
            if self._built is not None:
                self._built.close()
            self._built = None  # GPUs will hold other experts
        self._held = list(keys)

    def follow_memory(self) -> None:
        if self._built is not None:
            self._built.ram.follow_memory()

    def load_next(self) -> bool:
        self._experts.ram.follow_memory()
        # The experts are pinned. Otherwise one that was just loaded is evicted for the next,
        # without end.
        wanted = self._experts.fitting(self._held)
        missing = next((key for key in wanted if not self._experts.holds(key)), None)
        if missing is None:
            return False
        self._experts.load(missing, pinned=wanted)
        return True

    def compute(
        self,
        layer: int,
        experts: Sequence[tuple[int, int]],
        x: torch.Tensor,
        shared_row: bool,
        check: Callable[[], None],
    ) -> torch.Tensor:
        if shared_row:
            selected = torch.tensor([[expert for expert, _ in experts]])
            return self._computed(layer, x, selected)
        outputs = []
        parts = torch.split(x, [count for _, count in experts])
        for (expert, count), rows in zip(experts, parts, strict=True):
            check()
            # A copy is aligned like the rows of the chat's machine. MKL may round other rows
            # differently.
            outputs.append(self._computed(layer, rows.clone(), torch.full((count, 1), expert)))
        return torch.cat(outputs)

    @torch.inference_mode()
    def _computed(self, layer: int, x: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
        """Return the outputs [n * k, D] of experts `selected` [n, k] for x [n, D], on the CPU."""

        def compute() -> torch.Tensor:
            return self._experts.compute(layer, x, selected, exact=self._exact).outputs.cpu()

        return within_memory(self._experts, compute, self._note)

    @property
    def _experts(self) -> _Experts:
        if self._built is None:
            self._built = self._build()
        return self._built

    def _build(self) -> _Experts:
        return build_experts(
            self._installed,
            ExpertShare(self.placement, frozenset(self._held)),
            self._devices,
            self._note,
            predicts=False,
        )


def load_served_experts(directory: Path, options: LoadOptions, note: Note) -> ServedExperts:
    """Open an installed model for a worker. Raises as `load_engine` does."""
    choice = usable_devices(options.device)
    if choice.reason is not None:
        note(choice.reason)
    require_kernels()
    installed = InstalledModel(directory)
    try:
        choose_threads(installed.blueprint)
        return ServedExperts(installed, options, choice.devices, note)
    except BaseException:
        installed.close()
        raise
