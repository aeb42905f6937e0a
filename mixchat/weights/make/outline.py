"""Outlines a model: its tensors and what it takes to install it, before any weights are fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixchat.errors import ModelNotFoundError
from mixchat.model_config import ModelConfig
from mixchat.progress import Progress
from mixchat.weights import models
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.format.manifest import check_files, read_manifest
from mixchat.weights.make.download_plan import DownloadPlan, Need, find_disk_needs, make_plan
from mixchat.weights.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.weights.source.checkpoint_index import expected_index
from mixchat.weights.source.open_checkpoint import open_checkpoint

# The config.json of both of `models.ALIASES`, so that no hub has to be asked.
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_SHARD = 5e9  # bytes: the largest file of a checkpoint that transformers writes


@dataclass(frozen=True)
class Outline:
    """A model's tensors, and the directory in which it is installed or will be.

    disk: what the download needs, nothing for an installed model; download: the plan of the
    download, None for an installed model, or where only the hub knows it.
    """

    name: str
    blueprint: Blueprint
    directory: Path
    installed: bool
    disk: tuple[Need, ...] = ()
    download: DownloadPlan | None = None

    @property
    def lacking(self) -> list[Need]:
        """Return the disks that have less room than the download needs."""
        return [need for need in self.disk if not need.suffices]


def outline(ref: models.ModelRef, progress: Progress) -> Outline:
    """Return the outline of a model, with the default options where it is not installed.

    Asks the hub only for one of its models that is neither installed nor in `models.ALIASES`.
    Raises what `models.installed_directory` and opening a checkpoint raise.
    """
    try:
        directory = models.installed_directory(ref.name)
    except ModelNotFoundError:
        return _before_download(ref, progress)
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    config = ModelConfig.from_file(directory / "config.json")
    how = Quantization.from_description(manifest.quantization)
    return Outline(ref.name, Blueprint(config, how), directory, installed=True)


def _before_download(ref: models.ModelRef, progress: Progress) -> Outline:
    target = ref.directory
    if ref.repo in models.ALIASES.values():
        index = expected_index(ModelConfig.from_dict(MIXTRAL), ref.name, _SHARD)
        blueprint = make_blueprint(index, QuantizeOptions())
        disk, _ = find_disk_needs(target, index, blueprint, lambda shard: index.header(shard).size)
        return Outline(ref.name, blueprint, target, installed=False, disk=disk)
    with open_checkpoint(ref.find_source(), target, progress) as checkpoint:
        blueprint = make_blueprint(checkpoint.index, QuantizeOptions())
        plan = make_plan(target, checkpoint, blueprint)
    return Outline(ref.name, blueprint, target, installed=False, disk=plan.disk, download=plan)
