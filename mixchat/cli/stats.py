"""`mixchat stats`: the use of a model's experts in its last run."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mixchat.base.errors import ModelNotFoundError
from mixchat.chat.printing import draw, say, show
from mixchat.cli.flags.load_flags import INSTALLED, JSON, PNG, model_argument
from mixchat.cli.flags.settings import settings_of, value_source
from mixchat.cli.output.png import checked_picture, new_figure, write_figure

if TYPE_CHECKING:
    from mixchat.engine.report import ExpertReport


_COLOURS = {
    "device": "#2a788e",
    "other-device": "#46c0a0",
    "host": "#a5db36",
    "worker": "#414487",
    "disk": "#e0e0e0",
}


_MODEL = model_argument(INSTALLED.help, show_default="the model of the last run")


def stats(
    context: typer.Context, model: str = _MODEL, as_json: bool = JSON, png: Path | None = PNG
) -> None:
    """Show each expert's use and place in the last run.

    --png replaces an existing FILE only if mixchat drew it.
    """
    picture = checked_picture(png)
    is_named = value_source(context, settings_of(context.command)["model"]) != "default"
    report = _last_report(model, is_named)
    if picture is not None:
        write_figure(picture, _picture(report))
        say(f"wrote {png}")
    if as_json:
        show(json.dumps(report.to_dict()))
    elif png is None:
        from mixchat.chat.draw.heatmap import drawn

        draw(drawn(report, sys.stdout))


def _last_report(name: str, is_named: bool) -> ExpertReport:
    from mixchat.engine.report import load_report, newest_report_path, report_path

    newest = None if is_named else newest_report_path()
    path = newest or report_path(name)
    if not path.exists():
        raise ModelNotFoundError(
            f"there is no report of a run of {name!r} yet", hint=f"mixchat run -m {name} saves one."
        )
    return load_report(path)


def _picture(report: ExpertReport) -> Any:
    layers, experts = len(report.tiers), len(report.tiers[0])
    title = f"{report.model}: {report.tokens:,} tokens"
    figure = new_figure(4 + 0.5 * experts, 2 + 0.25 * layers, title)
    use, place = figure.subplots(1, 2, sharey=True)
    _draw_use(figure, use, report)
    _draw_places(figure, place, report)
    for axis in (use.xaxis, use.yaxis, place.xaxis):
        axis.get_major_locator().set_params(integer=True)  # there is no expert 0.5
    return figure


def _draw_use(figure: Any, axes: Any, report: ExpertReport) -> None:
    from mixchat.chat.draw.heatmap import relative_uses

    image = axes.imshow(relative_uses(report), aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=axes)
    axes.set(title="Uses / layer's mean", xlabel="expert", ylabel="layer")


def _draw_places(figure: Any, axes: Any, report: ExpertReport) -> None:
    from mixchat.engine.report import PLACES

    tiers = report.tiers_used
    places = [[tiers.index(tier) for tier in layer] for layer in report.tiers]
    colours = import_module("matplotlib.colors").ListedColormap([_COLOURS[tier] for tier in tiers])
    image = axes.imshow(places, aspect="auto", cmap=colours, vmin=-0.5, vmax=len(tiers) - 0.5)
    bar = figure.colorbar(image, ax=axes, ticks=range(len(tiers)))
    bar.ax.set_yticklabels([PLACES[tier] for tier in tiers])
    axes.set(title="Place at the end of the run", xlabel="expert")
