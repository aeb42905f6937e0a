"""`mixchat list` and `mixchat show`: the models on this machine, and what each of them is."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mixchat.chat.sanitize import sanitize
from mixchat.cli.arguments import checked
from mixchat.cli.completion import runnable_models
from mixchat.settings import format_size


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List the models on this machine."""
    from mixchat.weights import models

    kept = models.list_models()
    if as_json:
        keys = ("bytes", "quantization", "context", "source", "commit", "problem")
        rows = [
            {"name": model.key, "path": str(model.path)} | {key: vars(model)[key] for key in keys}
            for model in kept
        ]
        print(json.dumps(rows, indent=2))
    elif kept:
        table = [("NAME", "SIZE", "QUANTIZATION", "CONTEXT", "COMMIT", "SOURCE")]
        for model in kept:
            quantization, context = model.problem or model.quantization, str(model.context or "-")
            size, commit = format_size(model.bytes), (model.commit or "-")[:12]
            table.append((model.key, size, quantization, context, commit, model.source or "-"))
        print(aligned(table))
    else:
        print(f"There are no models in {models.models_dir()} yet.", file=sys.stderr)
        print("'mixchat download demo' builds a small one, to try the tool.", file=sys.stderr)


def show(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=runnable_models,
            help="A name, as for 'mixchat run -m'.",
        ),
    ],
) -> None:
    """Show what a model is."""
    from mixchat.errors import ModelNotFoundError
    from mixchat.weights import models

    name = checked(model, "the model's name")
    is_demo = models.resolve(name).demo
    if is_demo:
        from mixchat.weights.demo import ABOUT

        print(ABOUT.strip() + "\n")
    try:
        directory = models.find(name)
    except ModelNotFoundError:
        if not is_demo:
            raise
        print("It is not built yet: 'mixchat download demo' or 'mixchat run -m demo' does it.")
    else:
        print(aligned(describe(directory)))


def describe(directory: Path) -> list[tuple[str, str]]:
    """What the manifest and the config of a kept model say, as names and values."""
    from mixchat.config import ModelConfig, checkpoint_dtype
    from mixchat.weights.manifest import read_manifest

    manifest = read_manifest(directory)
    config = ModelConfig.from_file(directory / "config.json")
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
    cells = [[sanitize(" ".join(cell.split())) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = (map(str.ljust, row, widths) for row in cells)
    return "\n".join("  ".join(row).rstrip() for row in padded)
