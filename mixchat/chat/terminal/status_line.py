"""The status line below the prompt, with context, speed, hit rate and memory, in any width."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from prompt_toolkit.utils import get_cwidth

from mixchat.base.errors import MixchatError
from mixchat.base.quantities import format_least
from mixchat.base.sanitize import sanitize

if TYPE_CHECKING:
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.engine.stats import GenerationStats
    from mixchat.face.events import End

NEARLY_FULL = 0.8  # of the context, when it is time to /clear or to finish


# The text of each figure, the most important first.
_FIGURES: dict[str, Callable[[Any], str]] = {
    "speed": "{:.1f} tok/s".format,
    "hit_rate": "{:.0%} hits".format,
    "memory": lambda size: f"{format_least(size)} experts",
    "on_workers": "{} on workers".format,
}


def status_line(
    model: str, used: int | None, size: int | None, *, width: int = 80, **figures: float | None
) -> str:
    """Return `demo · 1,234 of 8,192 tokens (15%) · 31.2 tok/s · 94% hits · 24.0 GB experts`.

    `used` and `size` are tokens of the context. The `figures` speed, hit_rate, memory (bytes) and
    on_workers (experts) are left out if they are None. To fit into `width` cells, workers, memory,
    hits, speed and the model are left out, in this order. Then the tokens become
    `1,234/8,192 (15%)`, then `15%`. From 80% of the context on they start with `!`.
    """
    long = short = shortest = ""  # the use of the context in three lengths
    if used is not None and size is None:
        long = f"{used:,} tokens"
        short = f"{used:,}"
        shortest = short
    elif used is not None and size is not None:
        mark = "! " if used >= NEARLY_FULL * size else ""
        percent = f"{used * 100 // max(size, 1)}%"
        long = f"{mark}{used:,} of {size:,} tokens ({percent})"
        short = f"{mark}{used:,}/{size:,} ({percent})"
        shortest = mark + percent
    name = " ".join(sanitize(model).split())
    known = ((show, figures.get(key)) for key, show in _FIGURES.items())
    measured = [show(figure) for show, figure in known if figure is not None]
    full = [[name, long, *measured[:count]] for count in range(len(measured), -1, -1)]
    for fields in [*full, [long], [short]]:
        line = " · ".join(filter(None, fields))
        if get_cwidth(line) <= width:
            return line
    return cut(shortest, width)


def cut(text: str, width: int) -> str:
    """Return `text` in at most `width` cells of the terminal, with `…` if it is cut."""
    if get_cwidth(text) <= width:
        return text
    shown = ""
    cells = 1
    for character in text:
        cells += get_cwidth(character)
        if cells > width:
            break
        shown += character
    return shown + "…" if width > 0 else ""


class Figures:
    """The figures of the status line, counted once a turn because it is drawn at every key."""

    def __init__(self, saver: ChatSaver) -> None:
        self._saver = saver
        self._session = saver.session
        self.used: int | None = 0
        self._measured: dict[str, Any] = {}  # arguments of `status_line`
        self.count()

    @property
    def size(self) -> int | None:
        """Return the tokens of the context, None if that is not known."""
        context = self._session.context
        return None if context is None else context.tokens

    def line(self, *, is_answering: bool = False) -> str:
        """Return the status line, in the middle of an answer with the answer's own speed."""
        width = shutil.get_terminal_size().columns
        model = self._saver.model
        if not is_answering:
            return status_line(model, self.used, self.size, width=width, **self._measured)
        # `used_tokens` would make the whole prompt anew twice a second.
        stats = self._session.stats
        used = stats.prompt_tokens + stats.generated_tokens
        # A server tells the tokens of its prompt at the end.
        known = used if stats.prompt_tokens else None
        return status_line(model, known, self.size, speed=_speed(stats), width=width)

    def count(self) -> None:
        """Count again, after the conversation has changed."""
        with suppress(MixchatError):  # a template's error is reported at the next question
            self.used = self._session.used_tokens
        if (engine := self._session.model.engine) is not None:
            self._measured["memory"] = engine.expert_bytes or None  # 0 before the first answer
            self._measured["on_workers"] = engine.slots_by_tier.get("worker")

    def turn(self, end: End) -> None:
        """Take the figures of an answer that has ended."""
        stats = end.stats
        experts = end.stats.experts
        if speed := _speed(stats):
            self._measured["speed"] = speed
        if experts.hits.total() + experts.misses.total():
            self._measured["hit_rate"] = experts.hit_rate
        self.count()


def _speed(stats: GenerationStats) -> float | None:
    decoded = stats.generated_tokens - 1  # the first token comes from the prefill
    return decoded / stats.decode_seconds if decoded > 0 and stats.decode_seconds > 0 else None
