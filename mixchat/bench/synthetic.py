"""Writes an installed model with a known model's layer shapes and random weights, to measure speed.

    python -m mixchat.bench.synthetic DIRECTORY LAYERS [EXPERT_BITS [NAME [DENSE_BITS]]]

No checkpoint in bf16 is needed. A layer takes 0.79 GB in Mixtral's shapes ("instruct") in 4 bits.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixchat.base.errors import UsageError
from mixchat.base.files import write_file
from mixchat.base.options import ExpertSize
from mixchat.base.safetensors import SafetensorsWriter, TensorSpec, tensor_sha256
from mixchat.base.settings import models_dir
from mixchat.install.known_models import KNOWN
from mixchat.install.make.quantize_options import default_blueprint
from mixchat.planning.fitting import expected_mix
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import EMBEDDING, Blueprint
from mixchat.weights.format.manifest import (
    FileRecord,
    Manifest,
    Source,
    WeightsRecord,
    write_manifest,
)
from mixchat.weights.matrix.linear import TYPES, type_of_bits

FOUR_BITS = ExpertSize(4.0)


@contextmanager
def synthetic_model(
    layers: int,
    expert_bits: ExpertSize = FOUR_BITS,
    shape: str = "instruct",
    dense_bits: int | None = None,
) -> Iterator[Path]:
    """Yield the directory of such a model, then delete it."""
    models = models_dir()
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models, prefix=".bench-") as temporary:
        directory = Path(temporary) / "synthetic"
        write_synthetic(directory, layers, expert_bits, shape, dense_bits)
        yield directory


def write_synthetic(
    directory: Path,
    layers: int,
    expert_bits: ExpertSize = FOUR_BITS,
    shape: str = "instruct",
    dense_bits: int | None = None,
) -> None:
    """Write a model, by default with attention and head in the bits of a download in 4 bits.

    4 of Mixtral's 32 layers take 3.6 GB with experts in 4 bits. In a mix all layers count as
    equally sensitive. Raises `UsageError` if the model has no experts in these bits.
    """
    known = KNOWN[shape]
    quant_type = known.experts_quant_type or type_of_bits(expert_bits.whole or 4)
    if expert_bits.whole not in (None, TYPES[quant_type].bits):
        raise UsageError(f"{shape} has experts in {TYPES[quant_type].bits} bits, not {expert_bits}")
    config = known.with_layers(layers)
    # The bits depend on all layers, but only the first ones are written.
    whole_model = default_blueprint(read_config(known.config), quant_type, dense_bits)
    blueprint = replace(whole_model, config=read_config(config))
    if expert_bits.whole is None:
        blueprint = expected_mix(blueprint, expert_bits)
    write_random(directory, config, blueprint)


def write_random(directory: Path, config: dict[str, Any], blueprint: Blueprint) -> None:
    """Write an installed model of this blueprint with random weights. config: of a checkpoint."""
    directory.mkdir(parents=True)
    text = json.dumps(config).encode()
    write_file(directory / "config.json", text)
    files = {"config.json": FileRecord.of(text)}
    weights = {}
    own = blueprint.descriptions()
    for seed, (name, specs) in enumerate(blueprint.files().items()):
        weights[name] = replace(_write(directory / name, specs, seed), quantization=own[name])
    manifest = Manifest(Source("synthetic"), blueprint.description(), files, weights)
    write_manifest(directory, manifest)


def _write(path: Path, specs: Iterable[TensorSpec], seed: int) -> WeightsRecord:
    generator = torch.Generator().manual_seed(seed)
    specs = list(specs)
    digests = {}
    with SafetensorsWriter(path, specs) as writer:
        for spec in specs:
            tensor = _random(spec, generator)
            writer.write(spec.name, tensor)
            digests[spec.name] = tensor_sha256(tensor)
    return WeightsRecord(path.stat().st_size, digests)


def _random(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    if spec.name.endswith(".codes"):
        least, most = (-127, 127) if spec.dtype == torch.int8 else (0, 255)
        return torch.randint(least, most + 1, spec.shape, dtype=spec.dtype, generator=generator)
    if spec.name.endswith(".absmax") and spec.dtype == torch.uint8:  # powers of two, 2^-11 to 2^-9
        return torch.randint(116, 119, spec.shape, dtype=spec.dtype, generator=generator)
    if spec.name.endswith(".absmax"):
        return (0.002 * torch.rand(spec.shape, generator=generator)).to(spec.dtype)
    # With smaller embeddings all tokens would look alike to the routers.
    if spec.name == EMBEDDING:
        return torch.randn(spec.shape, generator=generator).to(spec.dtype)
    if spec.name.endswith(("norm.weight", "layer_scalar", "per_expert_scale")):
        return torch.ones(spec.shape, dtype=spec.dtype)
    return (0.02 * torch.randn(spec.shape, generator=generator)).to(spec.dtype)


if __name__ == "__main__":
    _directory, _layers, *_options = sys.argv[1:]
    _bits, _shape = [*_options[:2], *("4", "instruct")[len(_options) :]]
    _size = ExpertSize.parse(_bits)
    write_synthetic(Path(_directory), int(_layers), _size, _shape, *map(int, _options[2:]))
