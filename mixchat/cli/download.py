"""`mixchat download`: fetches a model and keeps it in 4 bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from mixchat.cli.arguments import checked
from mixchat.engine.environment import prepare_environment
from mixchat.errors import UsageError


def download(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="base, instruct, demo, ORG/NAME on the hub, or a directory with a checkpoint.",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Keep it under this name.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="A commit, branch or tag on the hub.")
    ] = None,
    quant_type: Annotated[
        Literal["nf4", "none"],
        typer.Option(help="Experts in 4 bits (nf4), or as they are (none)."),
    ] = "nf4",
    quantize_attention: Annotated[
        bool, typer.Option("--quantize-attention", help="The attention in 4 bits, too.")
    ] = False,
    quantize_head: Annotated[
        bool, typer.Option("--quantize-head", help="The output head in 4 bits, too.")
    ] = False,
) -> None:
    """Fetch a model and keep it in 4 bits, ready to run."""
    from mixchat.weights import models

    ref = models.resolve(checked(model, "the model's name"), key=name)
    if quant_type == "none" and (quantize_attention or quantize_head):
        raise UsageError("--quant-type none keeps the attention and the head as they are, too")
    from mixchat.cli.progress import show_progress
    from mixchat.weights.download import download as download_model
    from mixchat.weights.quantize import QuantizeOptions

    prepare_environment()
    options = QuantizeOptions(quant_type, attention=quantize_attention, head=quantize_head)
    with show_progress() as progress:
        directory = download_model(
            ref, options, progress=progress, revision=revision, check=check_text
        )
    print(f"{ref.key} is ready in {directory}", file=sys.stderr)


def check_text(checkpoint: Path) -> None:
    """Refuse a checkpoint whose tokenizer or template cannot be used, before its weights come."""
    from mixchat.text.template import load_template
    from mixchat.text.tokenizer import load_tokenizer

    load_template(checkpoint, load_tokenizer(checkpoint))
