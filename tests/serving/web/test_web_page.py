"""The page at `/`: what a browser may load, and what it may ask."""

import re

import pytest
from raw_http import exchange, request

from mixchat.serving.web.access import Access

QUESTION = {"messages": [{"role": "user", "content": "say:well"}]}


def loaded(page):
    """The paths that a page loads."""
    return [f"/{name}" for name in re.findall(r'(?:href|src)="([^"]+)"', page.body.decode())]


def test_a_browser_gets_the_page_and_what_it_loads_without_a_key(serve):
    served = serve(Access(key="secret"))
    page = exchange(served, request("/"))
    assert page.headers["content-type"].startswith("text/html")
    assert len(loaded(page)) == 3
    for path in ["/", *loaded(page)]:
        response = exchange(served, request(path))
        assert (response.status, len(response.body) > 0) == (200, True)
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in policy
    assert exchange(served, request("/v1/models")).status == 401


def test_the_page_may_ask_its_own_server_alone(served):
    own = f"127.0.0.1:{served.port}"
    for origin, host, status in [
        (f"http://{own}", own, 200),
        (f"https://{own}", own, 200),  # a proxy has TLS
        ("http://evil.example", own, 403),
        ("http://evil.example", "evil.example", 403),  # DNS rebinding
    ]:
        asked = request("/v1/chat/completions", QUESTION, origin=origin, host=host)
        assert exchange(served, asked).status == status


@pytest.mark.parametrize("path", ["/", "/page.js"])
def test_without_the_page_there_is_nothing(serve, path):
    assert exchange(serve(page=False), request(path)).status == 404


def test_other_files_of_its_folder_are_not_served(served):
    for path in ("/markdown-it.LICENSE", "/page_files/page.html", "/..%2fpage.py", "/page.html"):
        assert exchange(served, request(path)).status == 404
