"""Rank and rendezvous of `torchrun`'s processes. Rank 0 chats, others are workers."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from mixchat.base.errors import MixchatError, ServerError, UsageError, short_message
from mixchat.base.options import NetworkAddress

_START_TIMEOUT = timedelta(seconds=600)  # for a worker that first builds its model
_END_TIMEOUT = timedelta(seconds=5)  # for a torchrun that was killed
_KEY, _END = "mixchat/worker/{rank}", "mixchat/end"


def rank() -> int | None:
    """Return this process's rank, or None without torchrun. Raises `UsageError`."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        return int(os.environ["RANK"])
    except (KeyError, ValueError):
        raise UsageError("torchrun's variable RANK is missing, or no number") from None


def local_address() -> str:
    """Return this machine's address towards rank 0, with port 0. Raises `UsageError`."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        family, socket_type, protocol, _, target = infos[0]
        with socket.socket(family, socket_type, protocol) as probe:
            probe.connect(target)  # a datagram socket sends nothing
            return str(NetworkAddress(probe.getsockname()[0], 0))
    except OSError as error:
        raise UsageError(f"torchrun's MASTER_ADDR {host!r} cannot be reached ({error})") from None


def publish(address: str) -> Callable[[], bool]:
    """Tell rank 0 this worker's address. Return a function that tells whether rank 0 has ended.

    Raises `MixchatError`.
    """
    store = _rendezvous()
    store.set(_KEY.format(rank=rank()), address)

    def over() -> bool:
        try:
            return bool(store.check([_END]))
        except RuntimeError:  # torchrun itself has ended
            return True

    return over


def end() -> None:
    """Tell the workers that rank 0 has ended."""
    if rank() == 0:
        with suppress(MixchatError, RuntimeError):
            _rendezvous(_END_TIMEOUT).set(_END, "")


def published() -> tuple[str, ...]:
    """Return the addresses of all workers, once they listen, or none without torchrun.

    Raises `MixchatError`.
    """
    if rank() is None:
        return ()
    store, size = _rendezvous(), int(os.environ["WORLD_SIZE"])
    try:
        return tuple(store.get(_KEY.format(rank=n)).decode() for n in range(1, size))
    except RuntimeError as error:
        raise ServerError(f"a worker does not start: {short_message(error)}") from None


def _rendezvous(timeout: timedelta = _START_TIMEOUT) -> Any:
    from torch.distributed.rendezvous import rendezvous

    try:
        store, *_ = next(rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError) as error:
        raise MixchatError(f"torchrun's store cannot be reached: {short_message(error)}") from None
    return store
