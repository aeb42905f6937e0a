"""Runs a test in an event loop."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any


def in_event_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*values: Any, **fixtures: Any) -> None:
        asyncio.run(test(*values, **fixtures))

    return run
