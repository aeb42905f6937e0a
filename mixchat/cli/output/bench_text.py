"""What `mixchat bench` has found, as a table, as JSON and as a picture."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from mixchat import machine
from mixchat.cli.models import aligned
from mixchat.cli.output.png import new_figure

if TYPE_CHECKING:
    from mixchat.bench.rounds import Bench, Row


def as_dict(bench: Bench) -> dict[str, Any]:
    """All that was measured, of each round; rates in tokens a second, the rest in SI units."""
    cold = bench.cold_start
    return {
        "machine": _machine(bench),
        "model": _model(bench),
        "limits": {
            "memory": [limits.memory for limits in bench.limits],
            "gemm": [limits.gemm for limits in bench.limits],
            "disk": cold.disk,
            "copy": cold.copy,
        },
        "cold": {
            "load_seconds": cold.load_seconds,
            "first_token_seconds": cold.first_token_seconds,
            "bytes": cold.bytes,
        },
        "tasks": [
            {
                "name": row.name,
                "limited_by": row.limited_by,
                "mixchat": row.ours,
                "limit": row.most,
                "llama.cpp": row.peer,
                "of_limit": row.of_limit,
                "to_peer": row.to_peer,
            }
            for row in bench.rows
        ],
    }


def as_text(bench: Bench) -> str:
    """A table, and what stands around it."""
    memory = median(limits.memory for limits in bench.limits) / 1e9
    gemm = median(limits.gemm for limits in bench.limits) / 1e12
    limits = f"Limits: memory {memory:.1f} GB/s, matrix products {gemm:.2f} TFLOP/s"
    cold = bench.cold_start
    if cold.disk is not None:
        limits += f", disk {cold.disk / 1e9:.1f} GB/s"
    if cold.copy is not None:
        limits += f", copies to the GPU {cold.copy / 1e9:.1f} GB/s"
    return "\n".join(
        (
            f"{_machine(bench)}\n{_model(bench)}\n{limits}",
            f"Cold: first token after {cold.first_token_seconds:.1f} s, "
            f"{cold.bytes / 1e9:.2f} GB from disk\n",
            aligned(_table(bench.rows)),
        )
    )


def _machine(bench: Bench) -> str:
    import torch

    from mixchat.kernels.compile import instruction_set

    count = torch.get_num_threads()
    threads = f"{count} {'thread' if count == 1 else 'threads'}"
    kernels = f"{instruction_set() or 'no'} kernels"
    return f"{machine.cpu_name()}: {threads}, {kernels}, computing on {bench.engine.device}"


def _model(bench: Bench) -> str:
    config, how = bench.blueprint.config, bench.blueprint.quantization
    parts = ["experts", *(["attention"] if how.attention else []), *(["head"] if how.head else [])]
    return (
        f"{config.num_hidden_layers} layers of {config.num_local_experts} experts, "
        f"{config.num_experts_per_tok} a token; {', '.join(parts)} in {how.quant_type}"
    )


def _table(rows: list[Row]) -> list[tuple[str, ...]]:
    has_peer = any(row.peer for row in rows)
    heads = ("", "TOKENS/S", "FROM - TO", "OF THE LIMIT", *(("LLAMA.CPP", "TIMES") * has_peer))
    return [heads, *(_cells(row, has_peer) for row in rows)]


def _cells(row: Row, has_peer: bool) -> tuple[str, ...]:
    spread = f"{min(row.ours):.1f} - {max(row.ours):.1f}"
    limit = f"{row.of_limit:.0%} of {row.limited_by}"
    cells = (row.name, f"{median(row.ours):.1f}", spread, limit)
    if not has_peer:
        return cells
    if row.to_peer is None:
        return (*cells, "-", "-")
    return (*cells, f"{median(row.peer):.1f}", f"{row.to_peer:.2f}")


def picture(bench: Bench) -> Any:
    """Bars for each task: mixchat, llama.cpp, and the most that the limits allow."""
    rows = bench.rows
    figure = new_figure(3 + 2.5 * len(rows), 5, f"{_model(bench)}, {machine.cpu_name()}")
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, row in zip(panels, rows, strict=True):
        bars = {"mixchat": row.ours, "llama.cpp": row.peer, "limit": row.most}
        bars = {name: rates for name, rates in bars.items() if rates}
        middle = [median(rates) for rates in bars.values()]
        spread = [
            [one - min(rates) for one, rates in zip(middle, bars.values(), strict=True)],
            [max(rates) - one for one, rates in zip(middle, bars.values(), strict=True)],
        ]
        colours = {"mixchat": "#2a788e", "llama.cpp": "#a5db36", "limit": "#e0e0e0"}
        axes.bar(list(bars), middle, yerr=spread, color=[colours[name] for name in bars])
        axes.set(title=row.name, ylabel="tokens/s" if row is rows[0] else "")
    return figure
