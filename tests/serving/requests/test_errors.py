"""The status and the code of OpenAI's that an error has."""

from __future__ import annotations

import pytest

from mixchat.base.errors import (
    CheckpointError,
    PromptError,
    PromptTooLongError,
    ResourceError,
    UsageError,
)
from mixchat.serving.requests.errors import RequestError, as_request_error, to_json
from mixchat.serving.service import QueueFullError, ShuttingDownError


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFullError("x"), 429, "queue_full"),
        (ShuttingDownError("x"), 503, "shutting_down"),
        (ResourceError("x"), 503, "no_room"),
        (PromptTooLongError("x"), 400, "context_length_exceeded"),
        (PromptError("x"), 400, None),
        (UsageError("the answer cannot be continued in its form"), 400, None),
        (CheckpointError("x"), 500, None),
        (ValueError("x"), 500, None),
    ],
)
def test_an_error_has_the_status_that_clients_know_it_by(error, status, code):
    explained = as_request_error(error)
    assert explained.status == status
    about = explained.body["error"]
    assert set(about) == {"message", "type", "param", "code"}
    assert about["code"] == code


def test_the_hint_comes_behind_the_message():
    error = as_request_error(PromptError("it is empty", hint="Write something."))
    assert str(error) == "it is empty. Write something."


def test_an_error_for_the_client_stays_as_it_is():
    error = RequestError("x", status=418)
    assert as_request_error(error) is error


def test_json_is_ascii_on_one_line_and_never_nan():
    assert to_json({"a": "\u20ac\n\ud800"}) == rb'{"a":"\u20ac\n\ud800"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json([float("nan")])
