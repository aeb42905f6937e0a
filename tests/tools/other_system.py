"""mixchat's commands on Linux as if it were macOS, for a process of its own.

    python tests/tools/other_system.py run -m tiny Hi

What macOS lacks is taken away from mixchat. Other packages are imported before and keep it, as
wheels for macOS would work there.
"""

from __future__ import annotations

import builtins
import fcntl
import importlib
import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

_PACKAGES = (
    *("torch", "bitsandbytes", "llvmlite.binding", "psutil", "platformdirs", "filelock", "numpy"),
    *("typer", "rich.console", "rich.live", "prompt_toolkit", "huggingface_hub", "uvicorn.config"),
    *("starlette.applications", "anyio", "httpcore2", "zmq", "zmq.auth.thread", "pydantic"),
    *("llguidance", "gguf", "tokenizers", "sentencepiece", "jinja2.sandbox", "subprocess"),
    *("anyio._backends._asyncio", "uvicorn.protocols.http.h11_impl", "concurrent.futures.thread"),
)
_LACKING = (
    *("posix_fadvise", "POSIX_FADV_WILLNEED", "POSIX_FADV_DONTNEED", "O_DIRECT"),
    *("sched_getaffinity", "posix_fallocate", "fdatasync", "copy_file_range", "memfd_create"),
)
F_NOCACHE = 48  # a command of macOS's fcntl, which Linux refuses


def become_macos(packages: tuple[str, ...] = _PACKAGES) -> None:
    """Make mixchat take Linux for macOS in this process."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for name in packages:
        importlib.import_module(name)
    double = ModuleType("os")
    vars(double).update({name: value for name, value in vars(os).items() if name not in _LACKING})
    sys.modules["os"] = double
    system: Any = importlib.import_module("mixchat.base.system")
    system.sys = SimpleNamespace(platform="darwin")
    system.fcntl = SimpleNamespace(**{**vars(fcntl), "F_NOCACHE": F_NOCACHE})


def _use_double_in_sandboxes() -> None:
    from mixchat.text import sandbox

    *flags, code = sandbox._COMMAND
    start = "import other_system; other_system.become_macos(()); importlib"
    sandbox._COMMAND = (*flags, code.replace("importlib.import_module", f"{start}.import_module"))


def main(*arguments: str) -> None:
    """Run a command line, or several with `and` between them, until one fails."""
    become_macos()
    _use_double_in_sandboxes()
    from mixchat.cli.app import run

    commands: list[list[str]] = [[]]
    for argument in arguments:
        commands.append([]) if argument == "and" else commands[-1].append(argument)
    for command in commands:
        try:
            run(command)
        except SystemExit as ending:
            if ending.code:
                builtins.print(f"{command}: exit code {ending.code}", file=sys.stderr)
                raise


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])
