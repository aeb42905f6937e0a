"""Writes a kept model with Mixtral's real layer shapes and random weights: for speed, not sense.

    python -m mixchat.bench.synthetic DIRECTORY LAYERS        (0.83 GB a layer)

It goes directly into mixchat's format, so that no checkpoint in bf16 is needed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from mixchat.files import write_file
from mixchat.model_config import ModelConfig
from mixchat.safetensors import SafetensorsWriter, TensorSpec, tensor_sha256
from mixchat.weights.format.blueprint import (
    EMBEDDING,
    SHARED_FILE,
    Blueprint,
    Quantization,
    experts_file,
)
from mixchat.weights.format.manifest import (
    FileRecord,
    Manifest,
    Source,
    WeightsRecord,
    write_manifest,
)
from mixchat.weights.make.quantize import best_layout

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_synthetic(directory: Path, layers: int) -> None:
    """Experts, attention and head in NF4; 4 layers of 32 take 3.6 GB."""
    config = {**MIXTRAL, "num_hidden_layers": layers}
    quantization = Quantization(layout=best_layout(), attention=True, head=True)
    blueprint = Blueprint(ModelConfig.from_dict(config), quantization)
    directory.mkdir(parents=True)
    text = json.dumps(config).encode()
    write_file(directory / "config.json", text)
    files = {"config.json": FileRecord(len(text), hashlib.sha256(text).hexdigest())}
    weights = {SHARED_FILE: _write(directory / SHARED_FILE, blueprint.shared_tensors(), 0)}
    for layer in range(layers):
        name = experts_file(layer)
        weights[name] = _write(directory / name, blueprint.expert_tensors(), layer + 1)
    how = quantization.description()
    write_manifest(directory, Manifest(Source("synthetic"), how, files, weights))


def _write(path: Path, specs: Iterable[TensorSpec], seed: int) -> WeightsRecord:
    generator = torch.Generator().manual_seed(seed)
    specs, digests = list(specs), {}
    with SafetensorsWriter(path, specs) as writer:
        for spec in specs:
            tensor = _random(spec, generator)
            writer.write(spec.name, tensor)
            digests[spec.name] = tensor_sha256(tensor)
    return WeightsRecord(path.stat().st_size, digests)


def _random(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    if spec.name.endswith(".codes"):
        return torch.randint(0, 256, spec.shape, dtype=torch.uint8, generator=generator)
    if spec.name.endswith(".absmax"):
        return (0.002 * torch.rand(spec.shape, generator=generator)).to(spec.dtype)
    # Layers that add little to a large embedding: else all tokens look alike to the routers.
    if spec.name == EMBEDDING:
        return torch.randn(spec.shape, generator=generator).to(spec.dtype)
    if spec.name.endswith("norm.weight"):
        return torch.ones(spec.shape, dtype=spec.dtype)
    return (0.02 * torch.randn(spec.shape, generator=generator)).to(spec.dtype)


if __name__ == "__main__":
    write_synthetic(Path(sys.argv[1]), int(sys.argv[2]))
