"""Draws what a command prints as an SVG, for README.

    mixchat plan --ram 16GB | python tests/tools/picture.py "mixchat plan" > .github/plan.svg

Colours stay if the command is made to print them (`FORCE_COLOR=1`).
"""

import re
import sys

from rich.console import Console
from rich.text import Text


def main(title: str) -> None:
    lines = Text.from_ansi(sys.stdin.read().rstrip())
    width = max(len(line) for line in lines.split()) + 2
    with open("/dev/null", "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=width, file=nowhere, force_terminal=True)
        console.print(lines)
    svg = console.export_svg(title=title, unique_id=title.split()[-1])
    # GitHub shows no fonts of other hosts.
    print(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))


if __name__ == "__main__":
    main(*sys.argv[1:])
