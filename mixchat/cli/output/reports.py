"""Reports as text and JSON, on installed models, one model, or a download."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixchat.base.model_config import checkpoint_dtype
from mixchat.base.quantities import format_least, format_size, format_time
from mixchat.chat.printing import one_line, show, show_lines
from mixchat.install.models import describe

if TYPE_CHECKING:
    from mixchat.base.model_config import ModelConfig
    from mixchat.install.make.download_plan import DownloadPlan
    from mixchat.install.make.needs import Need
    from mixchat.install.models import ModelEntry
    from mixchat.weights.format.manifest import Manifest


class Report(ABC):
    """The result of a command, for a person and for programs."""

    @abstractmethod
    def as_text(self) -> str:
        """Return the result as lines for a person."""

    @abstractmethod
    def as_json(self) -> Any:
        """Return the result for programs, with sizes in bytes and times in seconds."""

    def show(self, as_json: bool) -> None:
        if as_json:
            show(json.dumps(self.as_json(), indent=2))
        else:
            show_lines(self.as_text())


@dataclass(frozen=True)
class ModelList(Report):
    """The models on this machine."""

    models: Sequence[ModelEntry]

    def as_text(self) -> str:
        table = [("NAME", "SIZE", "QUANTIZATION", "CONTEXT", "COMMIT", "SOURCE")]
        for model in self.models:
            quantization = model.problem or model.quantization
            context = str(model.context or "-")
            size = format_size(model.size)
            commit = (model.commit or "-")[:12]
            table.append((model.key, size, quantization, context, commit, model.source or "-"))
        return aligned(table)

    def as_json(self) -> list[dict[str, Any]]:
        return [_entry_as_json(model) for model in self.models]


@dataclass(frozen=True)
class ModelDetails(Report):
    """An installed model in detail."""

    directory: Path
    manifest: Manifest
    config: ModelConfig

    def as_text(self) -> str:
        facts = self.as_json()
        manifest = self.manifest
        dtype = manifest.quantization["dtype"]
        original = checkpoint_dtype(self.directory)
        is_rounded = original not in (None, dtype, "bfloat16")
        facts |= {
            "commit": manifest.source.commit or "none",
            "revision": manifest.source.revision or "none given",
            "size": format_size(manifest.size),
            "experts": manifest.quant_type,
            "dtype": f"{dtype}, rounded from {original}" if is_rounded else dtype,
            "experts_per_layer": "{experts_per_layer}, {experts_per_token} per token".format(
                **facts
            ),
            "context": f"{facts['context']} tokens",
        }
        names = (
            *("path", "source", "commit", "revision", "size", "experts", "scales"),
            *("attention", "head", "dtype", "model_type", "layers", "experts_per_layer"),
            *("hidden_size", "context"),
        )
        return aligned([(name.replace("_", " "), str(facts[name])) for name in names])

    def as_json(self) -> dict[str, Any]:
        """Return the keys of `mixchat list --json` and more.

        `revision` is the requested branch, tag or commit, or null. `weight_bytes` counts the files
        of weights. `scales` is the method of the experts' scales.
        """
        manifest = self.manifest
        config = self.config
        quantization = self.manifest.quantization
        # The manifest's values, even of a damaged model.
        return {
            **_entry_as_json(describe(self.directory)),
            "quantization": manifest.quant_type,
            "context": config.largest_context,
            "source": manifest.source.repo,
            "commit": manifest.source.commit,
            "revision": manifest.source.revision,
            "weight_bytes": manifest.size,
            "scales": quantization["scales"],
            "attention": weight_type(quantization["attention"], quantization["dtype"]),
            "head": weight_type(quantization["head"], quantization["dtype"]),
            "model_type": config.model_type,
            "layers": config.num_hidden_layers,
            "experts_per_layer": config.num_local_experts,
            "experts_per_token": config.num_experts_per_tok,
            "hidden_size": config.hidden_size,
        }


@dataclass(frozen=True)
class DownloadReport(Report):
    """The plan of a download. `afterwards` describes the calibration that follows, if one does."""

    plan: DownloadPlan
    afterwards: str | None = None

    def as_text(self) -> str:
        plan = self.plan
        commit = f" at {plan.commit[:12]}" if plan.commit else ""
        fetch = format_size(plan.fetch)
        if plan.fetch < plan.checkpoint and plan.commit:
            fetch += f" of {format_size(plan.checkpoint)}; the rest is here already"
        rows = [
            ("from", plan.source + commit),
            ("fetch", fetch),
            ("install", f"{format_size(plan.installed)} in {plan.target}"),
            *(("disk", f"{_need_text(need)} in {need.place}") for need in plan.disk),
            ("memory", _need_text(plan.memory)),
        ]
        if plan.seconds is not None:
            rate = f", at {format_size(int(plan.rate))}/s as measured now" if plan.rate else ""
            rows.append(("time", f"about {format_time(plan.seconds)}{rate}"))
        if self.afterwards is not None:
            rows.append(("then", self.afterwards))
        # fp16 and fp32 have more bits of precision than bf16, whose 8 include the implicit one.
        if plan.rounded_from is not None:
            stored = "are stored as bf16, which rounds them to 8 bits of precision"
            rows.append(("note", f"{plan.rounded_from} weights {stored}"))
        return aligned(rows)

    def as_json(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "name": plan.name,
            "path": str(plan.target),
            "source": plan.source,
            "commit": plan.commit,
            "quantization": dict(plan.quantization),
            "checkpoint_bytes": plan.checkpoint,
            "fetch_bytes": plan.fetch,
            "kept_bytes": plan.installed,
            "disk": disk_as_json(plan.disk),
            "memory": {"needed_bytes": plan.memory.needed, "free_bytes": plan.memory.free},
            "bytes_per_second": plan.rate,
            "seconds": plan.seconds,
            "rounded_from": plan.rounded_from,
        }


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Return the rows as lines of aligned columns."""
    # Names come from files and the hub, so they can hold newlines and control characters.
    cells = [[one_line(" ".join(cell.split())) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = (map(str.ljust, row, widths) for row in cells)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def disk_as_json(disk: Sequence[Need]) -> list[dict[str, Any]]:
    """Return the bytes that a download needs of each disk."""
    return [
        {"path": str(need.place), "needed_bytes": need.needed, "free_bytes": need.free}
        for need in disk
    ]


def weight_type(quant_type: str, dtype: str) -> str:
    """Return the name of a type of weights, `dtype` if they are not quantized."""
    return dtype if quant_type == "none" else quant_type


def _entry_as_json(model: ModelEntry) -> dict[str, Any]:
    keys = ("bytes", "quantization", "context", "source", "commit", "problem")
    return {"name": model.key, "path": str(model.path)} | {key: vars(model)[key] for key in keys}


def _need_text(need: Need) -> str:
    return f"{format_least(need.needed)} at most, {format_size(need.free)} free"
