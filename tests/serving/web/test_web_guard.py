"""The clients that may use the server: hosts, origins of web pages, keys."""

import openai
import pytest
from raw_http import exchange, request

from mixchat.serving.web.access import Access

PAGE = "http://localhost:3000"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:11435", 200),
        ("127.0.0.1:5", 200),
        ("127.9.9.9", 200),
        ("[::1]:80", 200),
        ("[::1]", 200),
        ("evil.example", 403),
        ("localhost.evil.example:11435", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.168.1.5", 403),
        ("localhost:evil.example", 403),
        ("127.0.0.1:80:evil.example", 403),
        ("[::1]:80@evil.example", 403),
        ("[::1]evil.example", 403),
        ("localhost:80 evil.example", 403),
        ("0.0.0.0", 403),
        ("[::2]:80", 403),
        ("", 403),
    ],
)
def test_without_a_key_only_this_machines_own_names_are_served(served, host, status):
    """DNS rebinding: a web page whose name resolves to 127.0.0.1 has its name as the host."""
    assert exchange(served, request("/health", host=host)).status == status


def test_with_a_key_or_beyond_the_loopback_every_host_is_served(serve):
    data = request("/v1/models", host="box.example", authorization="Bearer k")
    for access in (Access(key="k"), Access(key="k", local_only=False)):
        assert exchange(serve(access), data).status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", PAGE, "file://"])
def test_no_web_page_is_served_by_default(served, origin):
    response = exchange(served, request("/health", origin=origin))
    assert response.status == 403
    assert "access-control-allow-origin" not in response.headers
    assert "--cors" in response.error["message"]


@pytest.mark.parametrize("site", ["cross-site", "same-site", "SAME-ORIGIN?", ""])
@pytest.mark.parametrize(
    ("method", "mode", "dest", "status"),
    [
        ("POST", "no-cors", "empty", 403),
        ("POST", "navigate", "document", 403),
        ("GET", "no-cors", "image", 403),
        ("GET", "no-cors", "script", 403),
        ("GET", "navigate", "iframe", 403),
        ("GET", None, None, 403),
        ("GET", "navigate", "document", 200),
    ],
)
def test_a_page_whose_origin_is_not_named_is_known_by_its_site(
    serve, site, method, mode, dest, status
):
    """A browser names no origin for pictures. Following a link to the page still works."""
    given = {"sec_fetch_site": site, "sec_fetch_mode": mode, "sec_fetch_dest": dest}
    path, body = ("/", None) if method == "GET" else ("/tokenize", {"content": "x"})
    assert exchange(serve(), request(path, body, method=method, **given)).status == status
    everyone = exchange(serve(Access(origins=("*",))), request(path, body, method=method, **given))
    assert everyone.status == 200


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_the_servers_own_page_and_typed_addresses_are_served(served, site):
    for body in (None, {"content": "x"}):
        given = {"sec_fetch_site": site, "sec_fetch_mode": "cors", "sec_fetch_dest": "empty"}
        path = "/health" if body is None else "/tokenize"
        assert exchange(served, request(path, body, **given)).status == 200


def test_the_pages_that_cors_names_are_served_and_no_others(serve):
    served = serve(Access(origins=(PAGE, "http://b")))
    asked = {"access_control_request_method": "POST", "access_control_request_headers": "x-a"}
    before = exchange(served, request("/v1/models", method="OPTIONS", origin=PAGE, **asked))
    assert before.status == 200
    assert before.headers["access-control-allow-origin"] == PAGE
    assert before.headers["access-control-allow-headers"] == "x-a"
    response = exchange(served, request("/v1/models", origin=PAGE))
    assert response.status == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert exchange(served, request("/health", origin="http://c")).status == 403
    assert exchange(served, request("/health", origin=PAGE + "0")).status == 403


@pytest.mark.parametrize(
    ("access", "status", "allowed"),
    [
        (Access(origins=("*",)), 200, "*"),
        (Access(key="k", origins=(PAGE,)), 401, PAGE),  # a page can read that its key is wrong
    ],
)
def test_a_page_that_is_served_may_read_the_response(serve, access, status, allowed):
    response = exchange(serve(access), request("/v1/models", origin=PAGE))
    assert response.status == status
    assert response.headers["access-control-allow-origin"] == allowed


def test_the_openai_client_sends_the_key(serve):
    served = serve(Access(key="secret"))
    with served.openai(api_key="secret") as client:
        assert client.models.list().data[0].id == "scripted"
    with served.openai(api_key="Secret") as client, pytest.raises(openai.AuthenticationError) as e:
        client.models.list()
    assert e.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "secret"},
        {"authorization": "Basic secret"},
        {"authorization": "Bearer secret2"},
        {"authorization": "Bearer secre"},
        {"authorization": "Bearer secret secret"},
        {"authorization": "Bearer s\xe9cret"},
    ],
)
def test_a_wrong_key_is_refused_wherever_it_counts(serve, headers):
    served = serve(Access(key="secret"))
    for path in ("/v1/models", "/metrics", "/nowhere", "/health/../metrics"):
        response = exchange(served, request(path, **headers))
        assert response.status == 401
        assert response.headers["www-authenticate"] == "Bearer"
    assert exchange(served, request("/health", **headers)).status == 200
