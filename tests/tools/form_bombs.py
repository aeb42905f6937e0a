"""Forms of 1 kB that take minutes and gigabytes without a limit."""

from typing import Any


def bomb(pattern: str = "a.{%d}b") -> dict[str, Any]:
    """Return a schema that llguidance compiles in 2^25 parts; its own limits do not bound that."""
    return {"allOf": [{"type": "string", "pattern": pattern % size} for size in range(1, 26)]}


def late_bomb() -> dict[str, Any]:
    """Return a schema that compiles at once, and has 2^25 parts behind `"x`."""
    return bomb("^(q|x.*a.{%d}b)$")


def grammar_bomb() -> str:
    """Return the same as a Lark grammar."""
    return "start: T\nT: " + " & ".join(f"/(.|\\n)*a.{{{size}}}b.*/" for size in range(1, 26))
