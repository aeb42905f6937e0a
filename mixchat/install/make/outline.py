"""Outlines a model, with its tensors and the needs of its download, before it is fetched."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mixchat.base.errors import ModelNotFoundError
from mixchat.base.model_config import ModelConfig
from mixchat.base.progress import Progress
from mixchat.base.settings import models_dir
from mixchat.install import models
from mixchat.install.known_models import KNOWN, known_model
from mixchat.install.make.download_plan import DownloadPlan, ShardBytes, find_disk_needs, make_plan
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.install.make.needs import Need
from mixchat.install.make.quantize_options import (
    QuantizeOptions,
    default_blueprint,
    experts_type,
    make_blueprint,
)
from mixchat.install.source.open_checkpoint import open_checkpoint
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.journal import Journal
from mixchat.weights.format.manifest import check_files, read_manifest
from mixchat.weights.format.workspace import workspace
from mixchat.weights.matrix.linear import TYPES, type_of_bits
from mixchat.weights.matrix.quant_type import QuantType


@dataclass(frozen=True)
class Outline:
    """A model's tensors, and the directory in which it is installed or will be."""

    name: str
    blueprint: Blueprint
    directory: Path
    installed: bool
    disk: tuple[Need, ...] = ()
    download: DownloadPlan | None = None  # None for an installed model and for a known one
    arguments: tuple[str, ...] = ()  # for 'mixchat download', which makes this model

    @property
    def lacking(self) -> list[Need]:
        return [need for need in self.disk if not need.suffices]


def outline(
    ref: models.ModelRef, progress: Progress, bits: int | None = None, free_disk: int | None = None
) -> Outline:
    """Return the outline of a model, with the default options if it is not installed.

    bits: of its experts. If it is installed with others, the outline is of a second download.
    free_disk: the free bytes of another machine's disk. Asks the hub only about a model that is
    neither installed nor known.
    """
    source = None
    target = ref.directory
    flags = [] if bits is None else ["--expert-bits", str(bits)]
    with suppress(ModelNotFoundError):
        directory = models.installed_directory(ref.name)
        manifest = read_manifest(directory)
        check_files(directory, manifest)
        source = manifest.source
        installed = installed_blueprint(directory, manifest)
        if bits not in (None, TYPES[installed.quantization.quant_type].bits):
            target = models_dir() / f"{directory.name.rpartition('--')[2]}-{bits}bit"
            flags += ["--name", target.name]
        elif free_disk is None:
            return Outline(ref.name, installed, directory, installed=True)
    source = source or ref.find_source(Journal(workspace(target)).source)
    wanted = type_of_bits(bits or 4)
    plan = None
    if (known := known_model(source.repo)) is not None:
        experts = experts_type(source.repo, known.experts_quant_type, wanted)
        blueprint = default_blueprint(read_config(known.config), experts)
        shards = ShardBytes.foreseen(known.fetched_bytes, blueprint.weights_size)
        disk, _ = find_disk_needs(target, shards, free_disk=free_disk)
    else:
        with open_checkpoint(source, target, progress) as checkpoint:
            blueprint = make_blueprint(checkpoint.index, QuantizeOptions(wanted))
            plan = make_plan(CheckpointBuild(checkpoint, target, blueprint), free_disk)
        disk = plan.disk
    return Outline(
        ref.name,
        blueprint,
        target,
        installed=False,
        disk=disk,
        download=plan,
        arguments=(ref.name if ref.source_repo else source.repo, *flags),
    )


def known_blueprints() -> dict[tuple[str, ...], Blueprint]:
    """Return the known models as a download makes them by default, by the names of a shape."""
    names: dict[tuple[ModelConfig, QuantType], list[str]] = {}
    for name, known in KNOWN.items():
        quant_type: QuantType = known.experts_quant_type or "nf4"
        names.setdefault((read_config(known.config), quant_type), []).append(name)
    return {tuple(same): default_blueprint(*shape) for shape, same in names.items()}
