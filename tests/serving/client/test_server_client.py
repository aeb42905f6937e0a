"""The client asks one server, and says in one line what that does wrong."""

import httpcore2
import pytest
from scripted_server import Answer, ScriptedServer, as_json, refusal

from mixchat.base.errors import (
    MixchatError,
    ModelNotFoundError,
    PromptTooLongError,
    ServerError,
    UsageError,
)
from mixchat.base.http import LimitedStream
from mixchat.serving.client import server_models
from mixchat.serving.client.patience import Patience
from mixchat.serving.client.server_client import ServerClient
from mixchat.serving.client.server_json import BusyError, RefusedError
from mixchat.serving.client.server_models import is_served_here
from mixchat.serving.client.server_url import ServerURL


def client_of(server, key=None):
    return ServerClient(ServerURL.parse(server.address), key)


def refused(answer, key=None):
    """The error of a request that gets this answer."""
    with ScriptedServer(answer) as server, pytest.raises(MixchatError) as caught:
        client_of(server, key).chat({})
    assert "\n" not in f"{caught.value}{caught.value.hint}"
    return caught.value


class Silent(httpcore2.NetworkStream):
    """A connection that is silent for a hundred reads."""

    silences = 100

    def read(self, max_bytes, timeout=None):
        assert timeout < 1
        self.silences -= 1
        if self.silences >= 0:
            raise httpcore2.ReadTimeout
        return b"a"


def test_silence_is_waited_out_in_short_reads():
    """A Ctrl-C that came just before a read blocked was not handled before the server spoke."""
    assert LimitedStream(Silent(), Patience).read(1) == b"a"


def test_a_server_without_a_list_of_models_has_none():
    with ScriptedServer(models=refusal("404 Not Found", "no")) as server:
        assert client_of(server).models() == []


@pytest.mark.parametrize(
    "answer",
    [
        Answer([b"<html>"], headers={"Content-Type": "text/html"}),
        as_json([1]),
        as_json({"data": {}}),
        as_json({"data": [1]}),
        refusal("500 Oops", "broken"),
    ],
)
def test_a_list_of_another_form_is_refused(answer):
    with ScriptedServer(models=answer) as server, pytest.raises(ServerError):
        client_of(server).models()


@pytest.mark.parametrize("key", ["a\r\nX: b", "schlüssel"])
def test_a_key_that_no_header_can_have_is_refused(key):
    with pytest.raises(UsageError, match="MIXCHAT_API_KEY"):
        ServerClient(ServerURL.parse("localhost"), key)


def test_a_redirect_is_not_followed_since_the_key_would_go_to_another_server():
    with ScriptedServer() as other:
        place = f"http://{other.address}/v1/chat/completions"
        answer = Answer(status="307 Temporary Redirect", headers={"Location": place})
        error = refused(answer, "secret")
    assert f"--server http://{other.address}/v1" in error.hint
    assert "chat/completions" not in error.hint
    assert other.requests == []


@pytest.mark.parametrize(
    ("answer", "kind", "said", "hint"),
    [
        (refusal("401 U", "no key"), ServerError, "no key", "may want a key: set MIXCHAT_API_KEY"),
        (refusal("403 F", "no"), ServerError, "no", "does not accept the key"),
        (refusal("404 N", "no model x", "model_not_found"), ModelNotFoundError, "no model x", None),
        (refusal("404 N", "Not Found"), ServerError, "Not Found", "below /v1"),
        (refusal("400 B", "m", "context_length_exceeded"), PromptTooLongError, "m", None),
        (refusal("400 B", "unknown: top_k"), RefusedError, "unknown: top_k", None),
        (refusal("429 T", "busy", Retry_After="7"), BusyError, "busy", "Try again in 7 s."),
        (refusal("429 T", "busy", Retry_After="-1"), BusyError, "busy", "Try again later."),
        (refusal("503 S", "loading"), BusyError, "loading", "Try again later."),
        (Answer([b"<p>bad"], "502 Bad"), ServerError, "502, without a reason", None),
        (as_json({"error": "odd"}), ServerError, "odd", None),
        (as_json({"choices": []}), ServerError, "answers with application/json, not", None),
        (Answer([b"<p>"], headers={"Content-Type": "text/html"}), ServerError, "text/html", None),
    ],
)
def test_a_refusal_says_what_the_server_says_and_what_to_do(answer, kind, said, hint):
    error = refused(answer, "secret" if "403" in answer.status else None)
    assert type(error) is kind
    assert said in str(error)
    assert (hint or "") in (error.hint or "")


@pytest.mark.parametrize(
    "answer",
    [
        Answer(head=False),
        Answer([b"SSH-2.0-OpenSSH_9\r\n"], head=False),
        Answer([b"HTTP/1.1 200 OK\r\n" + b"x" * 10**6], head=False),
        Answer([b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000], head=False),
        Answer([b"HTTP/1.1 999999 OK\r\n\r\n"], head=False),
        Answer(head=False, end="reset"),
    ],
)
def test_what_is_not_http_is_one_line(answer):
    assert type(refused(answer)) is ServerError


def test_a_server_that_is_not_there_is_one_line_with_what_to_do():
    with ScriptedServer() as server:
        client = client_of(server)
    with pytest.raises(ServerError, match="no server answers at") as error:
        client.models()
    assert "mixchat serve" in error.value.hint


@pytest.mark.parametrize("host", ["nosuch.invalid", "a" * 64 + ".invalid", "x..y"])
def test_a_name_that_has_no_address_is_one_line(host):
    with pytest.raises(ServerError, match="no server answers at"):
        ServerClient(ServerURL("http", host, 80, "/v1")).models()


def test_a_server_of_this_machine_is_found_by_its_model(monkeypatch):
    monkeypatch.setattr(server_models, "_GLANCE_S", 60)
    monkeypatch.setenv("MIXCHAT_API_KEY", "secret")
    with ScriptedServer() as server:
        port = int(server.address.rpartition(":")[2])
        monkeypatch.setattr(server_models, "SERVER_PORT", port)
        assert is_served_here("other")
        assert not is_served_here("instruct")
    assert not is_served_here("other")
    assert server.requests[0].path == "/v1/models"
    assert "authorization" not in server.requests[0].headers


def test_a_server_of_this_machine_that_is_silent_costs_next_to_nothing(monkeypatch):
    with ScriptedServer(models=Answer(head=False, end="hold")) as server:
        port = int(server.address.rpartition(":")[2])
        monkeypatch.setattr(server_models, "SERVER_PORT", port)
        assert not is_served_here("tiny")
        assert not server.gone.is_set()
        server.stop_holding()
