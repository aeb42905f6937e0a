"""From a checkpoint in bf16 to a kept model in 4 bits, one tensor at a time.

Never more than one expert is in memory: the process stays below 1.5 GB at Mixtral's size, whatever
the count of layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mixchat.config import ModelConfig
from mixchat.files import read_bytes, write_file
from mixchat.progress import NoProgress, Progress
from mixchat.weights import nf4
from mixchat.weights.blueprint import (
    EMBEDDING,
    HEAD,
    SHARED_FILE,
    Blueprint,
    Quantization,
    experts_file,
    layer_prefix,
)
from mixchat.weights.checkpoint_files import COMPANION_FILES
from mixchat.weights.linear import Layout, LinearSpec, QuantType
from mixchat.weights.manifest import FileRecord, Manifest, Source, write_manifest
from mixchat.weights.safetensors import SafetensorsWriter, TensorSpec
from mixchat.weights.source import SourceCheckpoint, expert_tensor

NO_PROGRESS = NoProgress()


@dataclass(frozen=True)
class QuantizeOptions:
    """What becomes 4 bits. `quant_type` is the experts': "nf4", or "none" to keep them as they are.

    `layout` None takes what this machine runs best.
    """

    quant_type: QuantType = "nf4"
    attention: bool = False
    head: bool = False
    layout: Layout | None = None

    def quantization(self, source_dtype: torch.dtype) -> Quantization:
        """The full description, for weights that come as `source_dtype`."""
        exact = self.quant_type == "none" and source_dtype == torch.float32
        return Quantization(
            quant_type=self.quant_type,
            layout=self.layout or best_layout(),
            attention=self.attention,
            head=self.head,
            dtype=torch.float32 if exact else torch.bfloat16,
        )


def best_layout() -> Layout:
    """The layout this machine computes with: a GPU reads bitsandbytes' own."""
    if torch.cuda.is_available() or not nf4.has_packed_kernel():
        return "bitsandbytes"
    return "cpu-packed"


def kept_size(config: ModelConfig, options: QuantizeOptions) -> int:
    """Bytes that the kept model of this shape takes on disk, for a bf16 checkpoint."""
    blueprint = Blueprint(config, options.quantization(torch.bfloat16))
    return blueprint.shared_size + blueprint.expert_count * blueprint.expert.stride


def quantize_checkpoint(
    checkpoint: Path,
    target: Path,
    options: QuantizeOptions,
    *,
    source: Source,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Write the kept model of the Hugging Face checkpoint in `checkpoint` into `target`.

    The manifest comes last: until then `target` is an unfinished model that nothing trusts. Raises
    `CheckpointError` where the checkpoint is not a whole, finite Mixtral.
    """
    weights = SourceCheckpoint(checkpoint)
    try:
        blueprint = Blueprint(weights.config, options.quantization(weights.dtype))
        target.mkdir(parents=True, exist_ok=True)
        _Quantizer(weights, target, blueprint, progress).run(source)
    finally:
        weights.close()


class _Quantizer:
    """Walks through one checkpoint, file by file of the kept model."""

    def __init__(
        self, weights: SourceCheckpoint, target: Path, blueprint: Blueprint, progress: Progress
    ) -> None:
        self._weights, self._target = weights, target
        self._blueprint, self._progress = blueprint, progress
        self._files: dict[str, FileRecord] = {}

    def run(self, source: Source) -> None:
        self._progress.begin("quantizing", self._weights.nbytes)
        self._copy_companions()
        config = self._blueprint.config
        with self._writer(SHARED_FILE, self._blueprint.shared_tensors()) as writer:
            self._write_shared(writer)
        for layer in range(config.num_hidden_layers):
            with self._writer(experts_file(layer), self._blueprint.expert_tensors()) as writer:
                for expert in range(config.num_local_experts):
                    self._write_expert(writer, layer, expert)
        description = self._blueprint.quantization.description()
        write_manifest(self._target, Manifest(source, description, self._files))
        self._progress.end()

    def _copy_companions(self) -> None:
        for name in COMPANION_FILES:
            path = self._weights.directory / name
            if path.exists():
                data = read_bytes(path)
                write_file(self._target / name, data)
                self._files[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())

    @contextmanager
    def _writer(self, name: str, specs: Iterator[TensorSpec]) -> Iterator[SafetensorsWriter]:
        writer = SafetensorsWriter(self._target / name, specs)
        try:
            yield writer
            self._files[name] = FileRecord(*writer.finish())
        except BaseException:
            writer.abort()
            raise

    def _write_shared(self, writer: SafetensorsWriter) -> None:
        self._write_plain(writer, EMBEDDING)
        for layer in range(self._blueprint.config.num_hidden_layers):
            prefix = layer_prefix(layer)
            self._write_plain(writer, f"{prefix}input_layernorm.weight")
            self._write_plain(writer, f"{prefix}post_attention_layernorm.weight")
            qkv = self._blueprint.qkv(layer)
            names = [f"{prefix}self_attn.{name}_proj.weight" for name in "qkv"]
            self._write_linear(writer, qkv, self._fused(names, qkv))
            o = self._read(f"{prefix}self_attn.o_proj.weight")
            self._write_linear(writer, self._blueprint.o(layer), o)
            self._write_plain(writer, f"{prefix}block_sparse_moe.gate.weight")
        self._write_plain(writer, self._blueprint.norm.name)
        if self._blueprint.head is not None:
            tied = self._blueprint.config.tie_word_embeddings
            head = self._weights.read(EMBEDDING) if tied else self._read(f"{HEAD}.weight")
            self._write_linear(writer, self._blueprint.head, head)

    def _write_expert(self, writer: SafetensorsWriter, layer: int, expert: int) -> None:
        layout = self._blueprint.expert
        w1, w3 = (expert_tensor(layer, expert, name) for name in ("w1", "w3"))
        tensors = layout.w13.encode(self._fused([w1, w3], layout.w13))
        tensors += layout.w2.encode(self._read(expert_tensor(layer, expert, "w2")))
        if padding := layout.stride - layout.nbytes:
            tensors.append(torch.zeros(padding, dtype=torch.uint8))
        for spec, tensor in zip(layout.tensors(expert), tensors, strict=True):
            writer.write(spec.name, tensor)

    def _fused(self, names: list[str], spec: LinearSpec) -> torch.Tensor:
        """Matrices one above the other; no more than one of them is in memory besides."""
        whole = torch.empty((spec.rows, spec.columns), dtype=spec.dtype)
        start = 0
        for name in names:
            part = self._read(name)
            whole[start : start + len(part)] = part
            start += len(part)
        return whole

    def _write_linear(
        self, writer: SafetensorsWriter, spec: LinearSpec, weight: torch.Tensor
    ) -> None:
        for tensor_spec, tensor in zip(spec.tensors, spec.encode(weight), strict=True):
            writer.write(tensor_spec.name, tensor)

    def _write_plain(self, writer: SafetensorsWriter, name: str) -> None:
        writer.write(name, self._read(name).to(self._blueprint.quantization.dtype))

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._weights.read(name)
        self._progress.advance(tensor.nbytes)
        return tensor
