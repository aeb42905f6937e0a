"""`mixchat list` and `mixchat show`: the models on this machine, and what each of them is."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixchat.chat import printing
from mixchat.chat.printing import one_line, say
from mixchat.cli.flags.arguments import checked
from mixchat.cli.flags.shell_completion import runnable_models
from mixchat.quantities import format_size

if TYPE_CHECKING:
    from mixchat.model_config import ModelConfig
    from mixchat.weights.format.manifest import Manifest
    from mixchat.weights.models import ModelEntry


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List the models on this machine."""
    from mixchat.weights import models

    kept = models.list_models()
    if as_json:
        printing.show(json.dumps([_row(model) for model in kept], indent=2))
    elif kept:
        table = [("NAME", "SIZE", "QUANTIZATION", "CONTEXT", "COMMIT", "SOURCE")]
        for model in kept:
            quantization, context = model.problem or model.quantization, str(model.context or "-")
            size, commit = format_size(model.size), (model.commit or "-")[:12]
            table.append((model.key, size, quantization, context, commit, model.source or "-"))
        printing.show_lines(aligned(table))
    else:
        say(
            f"There are no models in {models.models_dir()} yet.",
            "'mixchat download demo' builds a small one, to try the tool.",
        )


def _row(model: ModelEntry) -> dict[str, Any]:
    keys = ("bytes", "quantization", "context", "source", "commit", "problem")
    return {"name": model.key, "path": str(model.path)} | {key: vars(model)[key] for key in keys}


def show_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=runnable_models,
            help="A name, as for 'mixchat run -m'.",
        ),
    ],
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print JSON, for programs: the keys of 'mixchat list --json', and more.",
        ),
    ] = False,
) -> None:
    """Show what a model is, and whether it can be run."""
    from mixchat.errors import ModelNotFoundError
    from mixchat.weights import models

    name = checked(model, "the model's name")
    if models.resolve(name).demo and not as_json:
        from mixchat.weights.source.demo import ABOUT

        printing.show_lines(ABOUT.strip() + "\n\n")
    try:
        directory = models.installed_directory(name)
    except ModelNotFoundError:
        if as_json or not models.resolve(name).demo:
            raise
        build = "It is not built yet: 'mixchat download demo' or 'mixchat run -m demo' does it."
        say(build, stream=sys.stdout)
        return
    _show(directory, as_json)


def _show(directory: Path, as_json: bool) -> None:
    """Print what is known of an installed model; then raise `CheckpointError` if it is damaged."""
    from mixchat.model_config import ModelConfig
    from mixchat.weights.format.manifest import check_files, read_manifest

    manifest = read_manifest(directory)
    config = ModelConfig.from_file(directory / "config.json")
    if as_json:
        printing.show(json.dumps(as_dict(directory, manifest, config), indent=2))
    else:
        printing.show_lines(aligned(describe(directory, manifest, config)))
    check_files(directory, manifest)


def as_dict(directory: Path, manifest: Manifest, config: ModelConfig) -> dict[str, Any]:
    """An installed model for programs: the keys of `mixchat list --json`, and

    revision: the branch, tag or commit that was asked for, or null; weight_bytes: bytes of the
    files of weights; scales, layout: how the experts' codes were made, and lie; attention, head:
    what their weights are in; layers, experts_per_layer, experts_per_token, hidden_size.
    """
    from mixchat.weights.models import describe

    # Of a damaged model, too, what its manifest says: `problem` says the rest.
    entry, how = describe(directory), manifest.quantization
    known = {
        "quantization": how["quant_type"],
        "context": config.max_position_embeddings,
        "source": manifest.source.repo,
        "commit": manifest.source.commit,
        "problem": entry.problem,
    }
    return {
        **_row(entry),
        **known,
        "revision": manifest.source.revision,
        "weight_bytes": manifest.size,
        "scales": how["scales"],
        "layout": how["layout"],
        "attention": how["quant_type"] if how["attention"] else how["dtype"],
        "head": how["quant_type"] if how["head"] else how["dtype"],
        "layers": config.num_hidden_layers,
        "experts_per_layer": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "hidden_size": config.hidden_size,
    }


def describe(directory: Path, manifest: Manifest, config: ModelConfig) -> list[tuple[str, str]]:
    """Return what the manifest and the config of an installed model say, as names and values."""
    from mixchat.model_config import checkpoint_dtype

    how, before = manifest.quantization, checkpoint_dtype(directory)
    rounded = f", rounded from {before}" if before not in (None, how["dtype"], "bfloat16") else ""
    return [
        ("path", str(directory)),
        ("source", manifest.source.repo),
        ("commit", manifest.source.commit or "none"),
        ("revision", manifest.source.revision or "none asked for"),
        ("size", format_size(manifest.size)),
        ("experts", str(how["quant_type"])),
        ("scales", str(how["scales"])),
        ("layout", str(how["layout"])),
        ("attention", str(how["quant_type"] if how["attention"] else how["dtype"])),
        ("head", str(how["quant_type"] if how["head"] else how["dtype"])),
        ("dtype", f"{how['dtype']}{rounded}"),
        ("layers", str(config.num_hidden_layers)),
        ("experts a layer", f"{config.num_local_experts}, {config.num_experts_per_tok} a token"),
        ("hidden size", str(config.hidden_size)),
        ("context", f"{config.max_position_embeddings} tokens"),
    ]


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns of equal width, two spaces apart."""
    cells = [[one_line(" ".join(cell.split())) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = (map(str.ljust, row, widths) for row in cells)
    return "\n".join("  ".join(row).rstrip() for row in padded)
