"""The models on this machine, as text for a person and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixchat.base.model_config import checkpoint_dtype
from mixchat.base.quantities import format_size
from mixchat.cli.output.table import aligned
from mixchat.weights.models import describe

if TYPE_CHECKING:
    from mixchat.base.model_config import ModelConfig
    from mixchat.weights.format.manifest import Manifest
    from mixchat.weights.models import ModelEntry


def list_as_text(models: Sequence[ModelEntry]) -> str:
    """Return a table of the models."""
    table = [("NAME", "SIZE", "QUANTIZATION", "CONTEXT", "COMMIT", "SOURCE")]
    for model in models:
        quantization, context = model.problem or model.quantization, str(model.context or "-")
        quantization += f", partly {model.partly}" if model.partly else ""
        size, commit = format_size(model.size), (model.commit or "-")[:12]
        table.append((model.key, size, quantization, context, commit, model.source or "-"))
    return aligned(table)


def entry_as_dict(model: ModelEntry) -> dict[str, Any]:
    """Return a model of the list as JSON has it."""
    keys = ("bytes", "quantization", "partly", "context", "source", "commit", "problem")
    return {"name": model.key, "path": str(model.path)} | {key: vars(model)[key] for key in keys}


def model_as_text(directory: Path, manifest: Manifest, config: ModelConfig) -> str:
    """Return what the manifest and the config of an installed model say, a line for each value."""
    how, before = manifest.quantization, checkpoint_dtype(directory)
    rounded = f", rounded from {before}" if before not in (None, how["dtype"], "bfloat16") else ""
    rows = [
        ("path", str(directory)),
        ("source", manifest.source.repo),
        ("commit", manifest.source.commit or "none"),
        ("revision", manifest.source.revision or "none given"),
        ("size", format_size(manifest.size)),
        ("experts", str(how["quant_type"])),
        ("scales", str(how["scales"])),
        ("layout", str(how["layout"])),
        ("attention", form(how["attention"], how["dtype"])),
        ("head", form(how["head"], how["dtype"])),
        ("dtype", f"{how['dtype']}{rounded}"),
        ("layers", str(config.num_hidden_layers)),
        (
            "experts per layer",
            f"{config.num_local_experts}, {config.num_experts_per_tok} per token",
        ),
        ("hidden size", str(config.hidden_size)),
        ("context", f"{config.max_position_embeddings} tokens"),
    ]
    if manifest.partly:
        command = {"calibrated": "calibrate", "converted": "convert"}[manifest.partly]
        rest = f"mixchat {command} {directory.name}"
        rows.append(("unfinished", f"only some layers are {manifest.partly}; the rest: {rest}"))
    return aligned(rows)


def model_as_dict(directory: Path, manifest: Manifest, config: ModelConfig) -> dict[str, Any]:
    """Return an installed model as JSON has it: the keys of `mixchat list --json`, and

    revision: the branch, tag or commit that was requested, or null; weight_bytes: bytes of the
    files of weights; scales, layout: how the experts' codes were chosen, and their order;
    attention, head: the format of their weights; layers, experts_per_layer, experts_per_token,
    hidden_size.
    """
    # The manifest's values, even of a damaged model: `problem` names the damage.
    entry, how = describe(directory), manifest.quantization
    known = {
        "quantization": how["quant_type"],
        "context": config.max_position_embeddings,
        "source": manifest.source.repo,
        "commit": manifest.source.commit,
        "problem": entry.problem,
    }
    return {
        **entry_as_dict(entry),
        **known,
        "revision": manifest.source.revision,
        "weight_bytes": manifest.size,
        "scales": how["scales"],
        "layout": how["layout"],
        "attention": form(how["attention"], how["dtype"]),
        "head": form(how["head"], how["dtype"]),
        "layers": config.num_hidden_layers,
        "experts_per_layer": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "hidden_size": config.hidden_size,
    }


def form(quant_type: str, dtype: str) -> str:
    """Return the type of weights as a word; `dtype` is that of dense ones."""
    return dtype if quant_type == "none" else quant_type
