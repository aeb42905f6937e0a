"""The URL of a server with OpenAI's API."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from mixchat.base.errors import UsageError

SERVER_PORT = 11435
SERVER_IDENTITY = "server"  # in place of the hash of a model's weights
_PORTS = {"http": 80, "https": 443}
_HINT = f"Write it like 127.0.0.1:{SERVER_PORT} or https://example.com/v1."


@dataclass(frozen=True)
class ServerURL:
    """A host, its port, and the path before `/chat/completions`."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, text: str) -> ServerURL:
        """Read `HOST[:PORT]`, or a URL of http or https. The default path is `/v1`.

        A host alone has port 11435. Raises `UsageError` on anything else.
        """
        bare = "://" not in text
        unreadable = UsageError(f"cannot read {text!r} as the URL of a server", hint=_HINT)
        try:
            parts = urlsplit(f"http://{text}" if bare else text)
            port = parts.port
        except ValueError:
            raise unreadable from None
        # urlsplit drops a newline without a word.
        is_plain = text.isascii() and text.isprintable() and not set(" \\<>\"'") & set(text)
        if not is_plain or parts.scheme not in _PORTS or not parts.hostname or port == 0:
            raise unreadable
        if parts.username is not None or parts.password is not None:
            hint = "Put the server's key into the variable MIXCHAT_API_KEY."
            raise UsageError("the URL of a server cannot have a name or a password", hint=hint)
        if parts.query or parts.fragment:
            raise UsageError("the URL of a server cannot have a ? or a #", hint=_HINT)
        if port is None:
            port = SERVER_PORT if bare else _PORTS[parts.scheme]
        return cls(parts.scheme, parts.hostname, port, parts.path.rstrip("/") or "/v1")

    @property
    def authority(self) -> str:
        """Return host and port as the header Host has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"
