"""The headings under which --help shows many flags."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

MODEL, PROMPT, SAMPLING, OUTPUT = "Model", "Prompt and input", "Sampling", "Output"
MEMORY, CHAT = "Memory and speed", "Chat"
SERVER, MACHINE, MEASURING = "Server", "Another machine", "Measuring"
_ORDER = (
    "Arguments",
    *(MODEL, PROMPT, SERVER, MACHINE, MEASURING, SAMPLING, OUTPUT, MEMORY, CHAT),
    "Options",
)


class HeadedCommand(TyperCommand):
    """Shows flags under the headings of their panels, without Rich, whose import takes long."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (row := parameter.get_help_record(ctx)) is not None:
                rows.setdefault(_heading(parameter), []).append(row)
        for heading in sorted(rows, key=_ORDER.index):
            with formatter.section(heading):
                formatter.write_dl(rows[heading])


def _heading(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or "Options"
