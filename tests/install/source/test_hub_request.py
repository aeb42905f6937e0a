"""Requests take the proxy of the environment, and the token goes to the hub alone."""

import gzip
from collections.abc import Iterator
from threading import Event

import pytest
from fake_hub import COMMIT, REPO, FakeHub

from mixchat.base.errors import HubError
from mixchat.install.source.hub_errors import plain_errors
from mixchat.install.source.hub_request import read_json
from mixchat.install.source.transfer import read_range

NAME = "config.json"
DATA = b'{"answer": 42}' * 50
PATH = f"/{REPO}/resolve/{COMMIT}/{NAME}"


@pytest.fixture
def hub(cache, monkeypatch) -> Iterator[FakeHub]:
    for name in ("HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with FakeHub({NAME: DATA}) as hub:
        yield hub


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
@pytest.mark.parametrize("scheme", ["http://", "http://name:p%40ss@", ""])
def test_a_proxy_of_the_environment_is_asked(hub, monkeypatch, variable, scheme):
    monkeypatch.setenv(variable, hub.url.replace("http://", scheme))
    assert read_range(f"http://hub.invalid{PATH}", 0, len(DATA), Event()) == DATA


def test_a_proxy_that_is_not_there_is_one_line(hub, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with pytest.raises(HubError, match="cannot reach the hub"), plain_errors(REPO):
        read_json("http://hub.invalid/api/models/x")


def test_hosts_without_a_proxy_are_asked_directly(hub, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert read_range(hub.url + PATH, 0, len(DATA), Event()) == DATA


def test_a_file_that_a_proxy_compresses_is_read(hub):
    packed = gzip.compress(DATA)
    hub.fail(NAME, status=200, body=packed, headers={"Content-Encoding": "gzip"})
    assert read_range(hub.url + PATH, 0, len(DATA), Event()) == DATA


def test_the_token_goes_to_the_hub_and_to_no_store(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.lfs_limit = 100
    assert read_range(hub.url + PATH, 0, len(DATA), Event()) == DATA
    tokens = {request.where: request.token for request in hub.requests}
    assert tokens == {"hub": "Bearer hf_secret", "store": None}


def test_a_name_and_a_password_in_the_address_are_sent(hub):
    read_range(hub.url.replace("//", "//me:p%40ss@") + PATH, 0, len(DATA), Event())
    assert hub.requests[0].token == "Basic bWU6cEBzcw=="


def test_redirects_have_an_end(hub):
    hub.fail("/api/", status=302, headers={"Location": "/api/elsewhere"})
    with pytest.raises(HubError, match="elsewhere without an end"):
        read_json(hub.url + "/api/models/x")
    assert len(hub.requests) == 20
