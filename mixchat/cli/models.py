"""`mixchat list`, `show`, `verify`, `repair`, `rm`, `gc` and `stats`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mixchat.base.errors import CheckpointError, ModelNotFoundError, UsageError
from mixchat.base.quantities import format_count, format_size
from mixchat.base.settings import models_dir
from mixchat.chat.printing import one_line, say, show, show_lines
from mixchat.cli.flags.arguments import checked, stdin_is_terminal
from mixchat.cli.flags.load_flags import INSTALLED, JSON, model_argument
from mixchat.cli.flags.settings import option, value_source
from mixchat.cli.flags.shell_completion import models_here
from mixchat.cli.output.progress import resumable, show_progress
from mixchat.engine.environment import prepare_environment
from mixchat.face.kept_caches import remove_server_caches

if TYPE_CHECKING:
    from mixchat.install.care.repair import Damage

_YES = option("--yes -y", "Do not ask for confirmation.")
_UNFINISHED = option("--unfinished", "Also delete unfinished downloads, calibrations and the like.")
_LAST_MODEL = model_argument(INSTALLED.help, show_default="the model of the last run")
_USUAL_MODEL = model_argument(INSTALLED.help, autocompletion=models_here)
_SHOWN_DAMAGES = 20


def list_models(as_json: bool = JSON) -> None:
    """List the models on this machine."""
    from mixchat.cli.output.reports import ModelList
    from mixchat.install import models

    installed = models.list_models()
    if installed or as_json:
        ModelList(installed).show(as_json)
    else:
        say(
            f"There are no models in {models_dir()} yet.",
            "'mixchat download demo' builds a small one, to try the tool.",
        )


def show_model(model: str | None = _USUAL_MODEL, as_json: bool = JSON) -> None:
    """Show a model in detail, and whether it can be run."""
    from mixchat.install import models

    name = model or models.default_model("")
    is_demo = models.resolve(name).demo
    directory: Path | None = None
    try:
        directory = models.installed_directory(name)
    except ModelNotFoundError:
        if as_json or not is_demo:
            raise
    if is_demo and not as_json:
        show_lines(models.DEMO_ABOUT.strip() + "\n\n")
    if directory is None:
        build = "It is not built yet: 'mixchat download demo' or 'mixchat run -m demo' builds it."
        say(build, stream=sys.stdout)
        return
    from mixchat.cli.output.reports import ModelDetails
    from mixchat.weights.families.read_config import read_config_file
    from mixchat.weights.format.manifest import check_files, read_manifest

    manifest = read_manifest(directory)
    config = read_config_file(directory / "config.json")
    ModelDetails(directory, manifest, config).show(as_json)
    check_files(directory, manifest)  # last, for it may fail


def rm(model: str = INSTALLED, yes: bool = _YES) -> None:
    """Remove a model from this machine."""
    from mixchat.base.settings import report_path_by_key
    from mixchat.install import models

    target = models.existing_directory(checked(model, "the model's name"))
    size = 0 if target.is_symlink() else models.describe(target).size
    if not yes:
        if not stdin_is_terminal():
            raise UsageError(
                "cannot ask for confirmation: standard input is not a terminal",
                hint="Use --yes to do it without asking.",
            )
        question = f"Remove {target.name} ({format_size(size)}) from {target}?"
        typer.confirm(one_line(question), abort=True, err=True)
    prepare_environment()
    from mixchat.install.care import housekeeping
    from mixchat.install.make.download import local_errors

    with local_errors():
        foreign = housekeeping.remove(target)
        report_path_by_key(target.name).unlink(missing_ok=True)
        remove_server_caches(target.name)
    say(f"removed {target.name}: {format_size(size)}")
    _show_foreign(foreign)


def verify(model: str | None = _USUAL_MODEL) -> None:
    """Check every byte of a model against its SHA-256 checksums."""
    from mixchat.install import models

    model = model or models.default_model("")
    directory = models.installed_directory(model)
    prepare_environment()
    from mixchat.install.care.repair import verify as verify_model
    from mixchat.weights.format.manifest import repair_hint

    with show_progress() as progress, resumable(progress, "the same command starts again"):
        damages = verify_model(directory, progress)
    _show(damages)
    if damages:
        raise CheckpointError(
            f"{model} is damaged ({format_count(len(damages), 'place')})",
            hint=repair_hint(directory),
        )
    say(f"{model} is intact")


def repair(model: str = INSTALLED) -> None:
    """Fetch and rewrite only the damaged parts of a model."""
    from mixchat.install import models

    directory = models.installed_directory(checked(model, "the model's name"), anywhere=False)
    prepare_environment()
    from mixchat.install.care.housekeeping import not_in_use
    from mixchat.install.care.repair import repair as repair_model
    from mixchat.install.care.repair import verify
    from mixchat.install.make.download import local_errors
    from mixchat.install.source.open_checkpoint import open_checkpoint
    from mixchat.weights.format.manifest import MANIFESTS, read_either_manifest, restore_manifests

    with local_errors(), not_in_use(directory), show_progress() as progress, resumable(progress):
        source = read_either_manifest(directory).source
        damages = verify(directory, progress)
        _show(damages)
        restore_manifests(directory)
        if not {damage.file for damage in damages} <= set(MANIFESTS):
            with open_checkpoint(source, directory, progress) as checkpoint:
                repair_model(directory, damages, checkpoint, progress)
    again = " again" if damages else ""
    say(f"{model} is intact{again}")


def gc(unfinished: bool = _UNFINISHED) -> None:
    """Remove the leftovers of interrupted commands."""
    prepare_environment()
    from mixchat.chat.saved.chat_store import ChatStore
    from mixchat.install.care import housekeeping
    from mixchat.install.make.download import local_errors

    freed = 0
    with local_errors():
        for leftover in housekeeping.sweep(unfinished=unfinished):
            name = f"{leftover.path} ({format_size(leftover.bytes)})"
            if leftover.state == "removed":
                freed += leftover.bytes
                say(f"removed: {name}")
            elif leftover.state == "resumable":
                say(f"left: {name}, which the same command can resume")
            else:
                _show_foreign([leftover.path])
        for path, size in ChatStore().sweep():
            freed += size
            say(f"removed: {path} ({format_size(size)})")
    say(f"freed {format_size(freed)}")


def stats(context: typer.Context, model: str | None = _LAST_MODEL, as_json: bool = JSON) -> None:
    """Show each expert's use and place in the last run."""
    from mixchat.engine.report import load_report, newest_report_path
    from mixchat.face.local_models import report_path
    from mixchat.install.models import default_model

    is_named = value_source(context, "model") != "default"
    path = None if is_named else newest_report_path()
    if path is None:
        model = model or default_model("")
        path = report_path(model)
    if not path.exists():
        raise ModelNotFoundError(
            f"there is no report of a run of {model!r} yet",
            hint=f"mixchat run -m {model} saves one.",
        )
    report = load_report(path)
    if as_json:
        show(json.dumps(report.to_dict()))
    else:
        from mixchat.chat.draw.expert_table import expert_table

        show(expert_table(report))


def _show_foreign(paths: list[Path]) -> None:
    for path in paths:
        say(f"left: {path}, which mixchat did not write")


def _show(damages: list[Damage]) -> None:
    for damage in damages[:_SHOWN_DAMAGES]:
        say(f"damaged: {damage}", stream=sys.stdout)
    if len(damages) > _SHOWN_DAMAGES:
        say(f"and {len(damages) - _SHOWN_DAMAGES} more", stream=sys.stdout)
