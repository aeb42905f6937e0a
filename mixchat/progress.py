"""How long work reports how far it is, without knowing who shows it."""

from typing import Protocol


class Progress(Protocol):
    """One bar at a time: `begin` starts it, `end` or the next `begin` closes it."""

    def begin(self, what: str, total: int) -> None:
        """Start a bar named `what` that is full at `total` bytes."""

    def advance(self, amount: int) -> None:
        """Move the bar by `amount` bytes."""

    def end(self) -> None:
        """Close the bar."""


class NoProgress:
    """Shows nothing."""

    def begin(self, what: str, total: int) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def end(self) -> None:
        pass
