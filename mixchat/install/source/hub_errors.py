"""Turns the hub's failures into errors of one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass
class HubRefusal(Exception):
    """A failure status of the hub, with the headers that explain it."""

    status: int
    code: str
    reason: str
    retry_after: str


@contextmanager
def plain_errors(repo_id: str, home: str = "MIXCHAT_HOME") -> Iterator[None]:
    """Turn failures of requests and files into one of our errors.

    `home` is the variable that names the directory written to.
    """
    from mixchat.base.http import FAULTS

    try:
        yield
    except (HubRefusal, *FAULTS, OSError) as error:
        raise _translate(error, repo_id, home) from error


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed later."""
    if isinstance(error, HubRefusal):
        return error.status in (408, 429) or error.status >= 500
    return True


def _translate(error: BaseException, repo_id: str, home: str) -> MixchatError:
    from mixchat.base.http import BROKEN

    host = urlsplit(endpoint()).netloc.rpartition("@")[2]
    if isinstance(error, HubRefusal):
        return _refused(error, repo_id, host)
    if isinstance(error, OSError):
        if (known := local_error(error, f"fetching {repo_id}", home)) is not None:
            return known
        reason = error.strerror or "the data is incomplete"
        return HubError(f"fetching {repo_id} failed: {reason}", hint="Run the same command again.")
    if isinstance(error, BROKEN):
        return HubError(
            f"the connection to the hub at {host} broke",
            hint="Run the same command again; it continues where it stopped.",
        )
    return HubError(
        f"cannot reach the hub at {host}",
        hint="Check the network (and proxies), or name a directory that holds the checkpoint.",
    )


def _refused(refusal: HubRefusal, repo_id: str, host: str) -> MixchatError:
    status = refusal.status
    if refusal.code == "GatedRepo":
        return HubError(
            f"{repo_id} is open only to people who accepted its conditions",
            hint=f"Accept them on {endpoint()}/{repo_id}, then {_LOGIN}",
        )
    if refusal.code == "RevisionNotFound":
        return ModelNotFoundError(f"{repo_id} has no such revision on {host}")
    if refusal.code == "EntryNotFound":
        return HubError(f"{host} lists a file of {repo_id} that it does not have")
    # The hub answers 401, too, if a repo does not exist and no token was sent.
    is_unknown = status == 401 and "Invalid credentials" not in refusal.reason
    if refusal.code == "RepoNotFound" or is_unknown:
        return ModelNotFoundError(
            f"there is no model {repo_id} on {host}",
            hint=f"Check the spelling. If it is private, {_LOGIN}",
        )
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
