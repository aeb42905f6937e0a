"""A server whose answer has no end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def endless_server(head: bytes, piece: bytes, pause: float = 0.0) -> Iterator[str]:
    """The address of a server that answers with `head`, and then `piece` again and again."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65536)
            connection.sendall(head)
            while True:
                connection.sendall(piece if pause else piece * (65536 // len(piece)))
                time.sleep(pause)

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield "127.0.0.1:{}".format(*listener.getsockname()[1:])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
