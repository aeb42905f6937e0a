"""`mixchat list` and `mixchat show`: the models on this machine, and one of them in detail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from mixchat.base.settings import models_dir
from mixchat.chat import printing
from mixchat.chat.printing import say
from mixchat.cli.flags.arguments import checked
from mixchat.cli.flags.shell_completion import runnable_models


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List the models on this machine."""
    from mixchat.cli.output.model_text import entry_as_dict, list_as_text
    from mixchat.weights import models

    installed = models.list_models()
    if as_json:
        printing.show(json.dumps([entry_as_dict(model) for model in installed], indent=2))
    elif installed:
        printing.show_lines(list_as_text(installed))
    else:
        say(
            f"There are no models in {models_dir()} yet.",
            "'mixchat download demo' builds a small one, to try the tool.",
        )


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
    """Show a model in detail, and whether it can be run."""
    from mixchat.base.errors import ModelNotFoundError
    from mixchat.weights import models

    name = checked(model, "the model's name")
    if models.resolve(name).demo and not as_json:
        printing.show_lines(models.DEMO_ABOUT.strip() + "\n\n")
    try:
        directory = models.installed_directory(name)
    except ModelNotFoundError:
        if as_json or not models.resolve(name).demo:
            raise
        build = "It is not built yet: 'mixchat download demo' or 'mixchat run -m demo' builds it."
        say(build, stream=sys.stdout)
        return
    _show(directory, as_json)


def _show(directory: Path, as_json: bool) -> None:
    """Print an installed model; then raise `CheckpointError` if it is damaged."""
    from mixchat.base.model_config import ModelConfig
    from mixchat.cli.output.model_text import model_as_dict, model_as_text
    from mixchat.weights.format.manifest import read_manifest
    from mixchat.weights.format.model_files import check_files

    manifest = read_manifest(directory)
    config = ModelConfig.from_file(directory / "config.json")
    if as_json:
        printing.show(json.dumps(model_as_dict(directory, manifest, config), indent=2))
    else:
        printing.show_lines(model_as_text(directory, manifest, config))
    check_files(directory, manifest)
