"""Asks a person in the terminal if a tool may run."""

from __future__ import annotations

import sys
import termios
from typing import TYPE_CHECKING

from mixchat.base import system
from mixchat.chat.printing import one_line

if TYPE_CHECKING:
    from mixchat.chat.terminal.screen import Screen
    from mixchat.chat.tools.toolbox import Permission

_ANSWERS: dict[str, Permission] = {"y": "once", "yes": "once", "a": "always", "always": "always"}


def ask_permission(screen: Screen, name: str) -> Permission:
    """Return a person's answer. Whatever is not yes or always is no.

    Keys that were typed before the question do not answer it. Raises `KeyboardInterrupt`.
    """
    mode = system.terminal_mode(sys.stdin)
    if mode is None:
        return "no"
    # During an answer the terminal shows no keys.
    system.set_terminal_mode(sys.stdin, [*mode[:3], mode[3] | termios.ECHO, *mode[4:]])
    termios.tcflush(sys.stdin, termios.TCIFLUSH)
    screen.out.write(f"Run {one_line(name)}? [y]es, [a]lways, [N]o: ")
    screen.out.flush()
    try:
        answer = sys.stdin.readline().strip().lower()
    finally:
        system.set_terminal_mode(sys.stdin, mode)
    return _ANSWERS.get(answer, "no")
