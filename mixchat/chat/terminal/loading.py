"""Loads a model behind the prompt."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from mixchat.base.progress import in_background


class Loading:
    """A call of `load` in a thread, which is started once."""

    def __init__(self, load: Callable[[], object]) -> None:
        self._load = load
        self._loaded: Future[object] | None = None

    def start(
        self,
        failed: Callable[[BaseException], object] = lambda error: None,
        done: Callable[[], object] = lambda: None,
    ) -> None:
        """Start to load, unless that was done. `failed` or `done` is called at the end."""
        if self._loaded is None:
            self._loaded = in_background(self._load)
            self._loaded.add_done_callback(
                lambda loaded: done() if (error := loaded.exception()) is None else failed(error)
            )

    @property
    def is_done(self) -> bool:
        """Return whether the model is loaded."""
        loaded = self._loaded
        return loaded is not None and loaded.done() and loaded.exception() is None

    def wait(self) -> None:
        """Wait until the model is loaded. Raises the error of loading it."""
        self.start()
        assert self._loaded is not None
        self._loaded.result()
