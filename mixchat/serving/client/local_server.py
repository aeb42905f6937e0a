"""Looks for a server on this machine."""

from __future__ import annotations

from concurrent.futures import wait
from socket import create_connection

from mixchat.base.progress import in_background
from mixchat.serving.client.server_url import SERVER_PORT, ServerURL

_GLANCE_S = 0.05


def is_served_here(model: str) -> bool:
    """Return whether a server at the usual port here has this model, within 50 ms.

    No key is sent, because any user's program may listen there.
    """
    try:  # before the library for HTTP is imported, which takes longer
        create_connection(("127.0.0.1", SERVER_PORT), _GLANCE_S).close()
    except OSError:
        return False
    from mixchat.serving.client.server_client import ServerClient

    models = in_background(ServerClient(ServerURL.parse(f"127.0.0.1:{SERVER_PORT}")).models)
    wait([models], _GLANCE_S)
    if not models.done() or models.exception() is not None:
        return False
    return any(listed.name == model for listed in models.result())
