"""Turns the hub's failures into errors of one line, and silences huggingface_hub."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from mixchat.base.errors import HubError, MixchatError, ModelNotFoundError, UsageError
from mixchat.base.files import local_error

_LOGIN = "set HF_TOKEN to a token of yours, or run: hf auth login"


def endpoint() -> str:
    """Return the hub's address, `HF_ENDPOINT` or its usual one. Raises `UsageError`.

    huggingface_hub would read it only once, at import.
    """
    from huggingface_hub import constants

    url = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable()
        _ = parts.port
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(
            f"HF_ENDPOINT is {url!r:.80}, which is not an address",
            hint="Write it like https://hub.example.org, or unset it.",
        )
    return url


@contextmanager
def plain_errors(repo_id: str, home: str = "MIXCHAT_HOME") -> Iterator[None]:
    """Turn what huggingface_hub raises inside into one of our errors, and silence it.

    `home` is the variable that names the directory written to.
    """
    # By stacklevel, some of its warnings name our modules as their source.
    for module in ("huggingface_hub", r"mixchat\.weights"):
        warnings.filterwarnings("ignore", module=module)
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    # The base of refusals and of failed connections is httpx's in 1.x and httpx2's in 2.x.
    http_error: type[Exception] = vars(errors)["HTTPError"]
    try:
        yield
    except (http_error, errors.OfflineModeIsEnabled, OSError) as error:
        raise _translate(error, repo_id, home) from error


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed later."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return _status(error) in (408, 429) or _status(error) >= 500
    return True


def _translate(error: BaseException, repo_id: str, home: str) -> MixchatError:
    """Return our error. The narrow classes come first."""
    from huggingface_hub import errors

    host = urlsplit(endpoint()).netloc.rpartition("@")[2]
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(
            "the hub is switched off by HF_HUB_OFFLINE",
            hint="Unset it, or name a directory that holds the checkpoint.",
        )
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{repo_id} is open only to people who accepted its conditions",
            hint=f"Accept them on {endpoint()}/{repo_id}, then {_LOGIN}",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"there is no model {repo_id} on {host}",
            hint=f"Check the spelling. If it is private, {_LOGIN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(f"{repo_id} has no such revision on {host}")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return HubError(f"{host} lists a file of {repo_id} that it does not have")
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(_status(error), repo_id, host)
    if isinstance(error, OSError):
        if (known := local_error(error, f"fetching {repo_id}", home)) is not None:
            return known
        reason = error.strerror or "the data is incomplete"
        return HubError(f"fetching {repo_id} failed: {reason}", hint="Run the same command again.")
    # By name, because the client library differs between releases.
    if type(error).__name__ in ("ReadError", "ReadTimeout", "RemoteProtocolError", "WriteError"):
        return HubError(
            f"the connection to the hub at {host} broke",
            hint="Run the same command again; it continues where it stopped.",
        )
    return HubError(
        f"cannot reach the hub at {host}",
        hint="Check the network (and proxies), or name a directory that holds the checkpoint.",
    )


def _refused(status: int, repo_id: str, host: str) -> MixchatError:
    if status == 401:
        return HubError(
            f"{host} refuses {repo_id} without a valid token (401)", hint=f"To log in, {_LOGIN}"
        )
    if status == 403:
        return HubError(f"{host} refuses access to {repo_id} (403)", hint=f"To log in, {_LOGIN}")
    if status == 404:
        return ModelNotFoundError(f"there is no model {repo_id} on {host}")
    if status == 429:
        return HubError(
            f"{host} refuses further requests for now: too many requests (429)",
            hint="Wait some minutes and run the same command again; it continues where it stopped.",
        )
    if status >= 500:
        return HubError(
            f"{host} reports an error of its own ({status})",
            hint="Run the same command again later; it continues where it stopped.",
        )
    return HubError(f"{host} refuses the request for {repo_id} ({status})")


def _status(error: Any) -> int:
    return int(error.response.status_code)
