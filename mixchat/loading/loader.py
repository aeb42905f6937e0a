"""Builds an `Engine` out of an installed model, a device and options."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.nn import functional

from mixchat.base import gpu, machine
from mixchat.base.model_config import ModelConfig
from mixchat.base.options import LoadOptions
from mixchat.base.progress import Note
from mixchat.base.safetensors import TensorSpec
from mixchat.base.settings import models_dir
from mixchat.engine.caches.sequence_cache import new_caches
from mixchat.engine.chunk_sizer import PREFILL_CHUNK
from mixchat.engine.decoder import new_decoder
from mixchat.engine.generate import Engine
from mixchat.engine.layers.block import describe
from mixchat.engine.layers.operations import RMSNorm
from mixchat.engine.layers.rope import rotary_embeddings
from mixchat.engine.model import Embedding, Transformer
from mixchat.engine.prompt_cache import identity_of
from mixchat.engine.speculation import Speculation
from mixchat.experts.cache import ExpertKey
from mixchat.experts.gpu_experts import GpuExperts
from mixchat.experts.holder import ExpertRunner
from mixchat.experts.placement import Placement
from mixchat.experts.sharing import in_proportion
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.compile import require_kernels
from mixchat.loading.devices import devices_for, note_excess, usable_devices
from mixchat.loading.tiers import build_experts
from mixchat.loading.workers import connect_workers, divide_experts
from mixchat.planning.expectation import SpeedEstimate
from mixchat.planning.fitting import FreeMemory, fit_model
from mixchat.planning.plan import predict_speed
from mixchat.planning.torch_threads import choose_threads
from mixchat.weights.format.blueprint import HEAD, Blueprint
from mixchat.weights.format.expert import Expert, ExpertSpec
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.on_device import build_linear
from mixchat.weights.matrix.quant_type import Linear

Wrap = Callable[[ExpertRunner], ExpertRunner]


def load_engine(
    directory: Path,
    options: LoadOptions,
    note: Note = lambda text: None,
    *,
    wrap: Wrap = lambda runner: runner,
) -> Engine:
    """Build the engine of an installed model, as `build_engine` does."""
    return build_engine(InstalledModel(directory), options, note, wrap=wrap)


def build_engine(
    installed: InstalledModel,
    options: LoadOptions,
    note: Note = lambda text: None,
    *,
    wrap: Wrap = lambda runner: runner,
) -> Engine:
    """Build the engine of an open model, which it closes at the end, or if this fails.

    `note` gets messages for a person. `wrap` puts something between the model and its
    `ExpertRunner`. Raises `CheckpointError` if the model is damaged, `UsageError` if an option
    cannot be used, `ResourceError` if the model does not fit, `MissingDependencyError` if the CPU
    is too old.
    """
    start = time.perf_counter()
    with ExitStack() as on_error:
        on_error.callback(installed.close)
        require_kernels()
        config = installed.config
        blueprint = installed.blueprint
        note_excess(options, machine.total_memory(), note)
        devices = devices_for(blueprint, installed.directory, options, note)
        device = devices[0]
        exact = options.exact_prompts
        fit = fit_model(blueprint, FreeMemory.now(devices), options)
        dtype = blueprint.quantization.dtype
        context = fit.context
        arithmetic = blueprint.expert_arithmetic(device, exact=exact)
        # Workers come first, because experts that they hold need not be read here.
        workers = connect_workers(installed, options, arithmetic, note)
        share = divide_experts(installed, fit.placement, workers)
        # This precedes the kernels' steps, which are made for a count of threads.
        choose_threads(blueprint)
        experts = build_experts(installed, share, devices, note)
        layers = range(config.num_moe_layers)
        each = range(config.num_local_experts)
        runner = wrap(experts)
        # Speculation verifies many rows at once. Workers round many rows otherwise than one, and a
        # recording must have only tokens of the text.
        alone = not workers and runner is experts
        speculates = options.speculation and alone and passes_are_exact(blueprint, device)
        on = devices_of_layers(config, fit.placement, devices)
        model = _build_model(installed, runner, context, on)
        caches = new_caches(
            config, context, dtype, on, options.kv_bits, options.parallel, fit.checkpoints
        )
        if isinstance(runner, GpuExperts):
            # Triton is imported only if a GPU computes.
            from mixchat.engine.gpu_decoder import new_gpu_decoder

            model.set_decoder(new_gpu_decoder(blueprint, model, caches, runner))
        else:
            model.set_decoder(new_decoder(model.blocks, caches[0], blueprint, model.output))
        # Experts are loaded while a person types. Otherwise the first prompt waits for the disk.
        experts.fill([ExpertKey(layer, expert) for layer in layers for expert in each])
        directory = installed.directory
        engine = Engine(
            model,
            caches,
            experts,
            blueprint,
            prefill_chunk=1 if exact and not chunks_are_exact(blueprint, device) else PREFILL_CHUNK,
            exact_prompts=exact,
            # A state cannot be cut to the tokens before rejected ones.
            speculation=Speculation() if speculates and not caches[0].needs_checkpoints else None,
            note=note,
            identity=identity_of(installed.manifest),
            name=directory.name if directory.parent == models_dir() else str(directory),
            context_is_chosen=options.context_size is not None,
            load_seconds=time.perf_counter() - start,
        )
        on_error.pop_all()
    return engine


def devices_of_layers(
    config: ModelConfig, placement: Placement, devices: Sequence[torch.device]
) -> list[torch.device]:
    """Return the device that computes each layer."""
    layers = placement.layers or (config.num_hidden_layers,)
    pairs = zip(devices, layers, strict=True)
    return [device for device, count in pairs for _ in range(count)]


def speed_predictor(
    directory: Path, device_name: str | None, engine: Engine
) -> Callable[[], SpeedEstimate | None]:
    """Return a function that predicts the engine's speed with the slots it has by then.

    It returns None if this machine was not measured for such a model, or if there are workers.
    """

    def predict() -> SpeedEstimate | None:
        if "worker" in engine.slots_by_tier:
            return None
        first = engine.device
        more = []
        if gpu.is_gpu(first):
            first, *more = usable_devices(device_name).devices
        held = dict(engine.slots_by_tier)
        elsewhere = held.pop("other-device", 0)
        in_ram = held.pop("host")
        slots = held.pop("device", None)
        count = engine.blueprint.expert_count
        if slots is None:
            placement = Placement(in_ram, 0, count)
        else:
            spread = tuple(in_proportion(elsewhere, [1 for _ in more])) if elsewhere else ()
            placement = Placement(slots, in_ram, count, other_slots=spread)
        return predict_speed(engine.blueprint, directory, first, placement)

    return predict


def chunks_are_exact(blueprint: Blueprint, device: torch.device) -> bool:
    """Return whether prefill gives a token the same bits alone as in a chunk."""
    if device.type != "cpu":
        return False
    dtype = blueprint.quantization.dtype
    return all(rows.can_compute(dtype, columns) for columns in blueprint.norm_columns) and all(
        matrix.can_be_exact for matrix in blueprint.typical_matrices
    )


def passes_are_exact(blueprint: Blueprint, device: torch.device) -> bool:
    """Return whether chunks and their logits are exact."""
    head = blueprint.head
    return chunks_are_exact(blueprint, device) and (head is None or head.can_be_exact)


def _build_model(
    installed: InstalledModel,
    runner: ExpertRunner,
    context: int,
    on: Sequence[torch.device],
) -> Transformer:
    """Build the model with each layer on its device, and the head on the last layer's."""
    blueprint = installed.blueprint
    first = on[0]
    last = on[-1]
    config = blueprint.config
    dtype = blueprint.quantization.dtype
    tensors = {device: _InstalledTensors(installed, device) for device in dict.fromkeys(on)}
    ropes = {device: rotary_embeddings(config, context, dtype, device) for device in tensors}
    # The embedding's table is in memory only if it is the head.
    embedding: Embedding
    if blueprint.head is None:
        table = installed.tensor(blueprint.embedding).to(last)
        weight = LinearSpec(HEAD, len(table), table.shape[1], "none", dtype)
        head = build_linear(weight, [table])

        def embedding(ids: torch.Tensor) -> torch.Tensor:
            rows = functional.embedding(ids.to(last, non_blocking=True), table)
            return rows.to(first, non_blocking=True)
    else:
        head = installed.linear(blueprint.head, last)

        def embedding(ids: torch.Tensor) -> torch.Tensor:
            return installed.rows(blueprint.embedding, ids).to(first, non_blocking=True)

    norm = RMSNorm(tensors[last].tensor(blueprint.norm), config.rms_norm_eps)
    blocks = [
        describe(layer, blueprint, tensors[device], ropes[device][layer], runner)
        for layer, device in enumerate(on)
    ]
    return Transformer(config, embedding, blocks, norm, head)


class _InstalledTensors:
    def __init__(self, installed: InstalledModel, device: torch.device) -> None:
        self._installed = installed
        self._device = device

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        return self._installed.tensor(spec).to(self._device)

    def linear(self, spec: LinearSpec) -> Linear:
        return self._installed.linear(spec, self._device)

    def parts(self, spec: LinearSpec, count: int) -> list[Linear]:
        return self._installed.parts(spec, count, self._device)

    def expert(self, spec: ExpertSpec) -> Expert:
        if not gpu.is_gpu(self._device):
            return Expert(self.linear(spec.gate_up), self.linear(spec.down), spec.swiglu)
        # The matrices form one block, like an expert's, so that the same kernels compute them.
        tensors = map(self._installed.tensor, (*spec.gate_up.tensors, *spec.down.tensors))
        block = torch.cat([tensor.view(-1).view(torch.uint8) for tensor in tensors])
        return spec.build(block.to(self._device))
