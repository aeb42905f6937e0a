"""Pages at an address: what is read, and servers that do not keep to the rules."""

from __future__ import annotations

import gzip
import time

import pytest
from document_tools import moved, pages, pdf, sent
from endless_server import endless_server

from mixchat.base.context import UNKNOWN_CONTEXT, Context
from mixchat.base.errors import PromptError, PromptTooLongError, ServerError, UsageError
from mixchat.chat.documents import web_file
from mixchat.chat.plain_text import read_source

PAGE = b"<html><body><nav>Menu</nav><main><p>The text of the page.</p></main></body></html>"
BOMB = gzip.compress(bytes(10**8))


def read(url, context=UNKNOWN_CONTEXT):
    notes = []
    return read_source(url, context, notes.append).strip(), notes


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (sent(PAGE), "The text of the page."),
        (sent(gzip.compress(PAGE), Content_Encoding="gzip"), "The text of the page."),
        (sent(b"# Title\n\nWords", "text/markdown; charset=utf-8"), "# Title\n\nWords"),
        (sent("caf\u00e9".encode("latin-1"), "text/plain; charset=latin1"), "caf\u00e9"),
        (sent("caf\u00e9".encode("latin-1"), "text/plain; charset=utf-8"), "caf\ufffd"),
        (sent(b'{"a": 1}', "application/ld+json"), '{"a": 1}'),
        (sent(pdf(["A page"]), "application/pdf"), "A page"),
        (sent(pdf(["A page"]), "application/octet-stream"), "A page"),
    ],
)
def test_the_text_at_an_address_is_read(answer, text):
    with pages({"/x": answer}) as host:
        assert read(f"{host}/x#part")[0] == text


def test_a_redirect_is_followed_and_told():
    with pages({"/a": moved("/b?c=d e"), "/b?c=d%20e": sent(PAGE)}) as host:
        text, notes = read(f"{host}/a")
    assert text == "The text of the page."
    assert notes[0] == f"{host}/a leads to {host}/b?c=d%20e"


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (sent(b"no", status=404), ServerError, "the server answers 404"),
        (moved("/x"), ServerError, "leads on more than 5 times"),
        (moved("file:///etc/passwd"), UsageError, "cannot read 'file:///etc/passwd'"),
        (sent(b"\x89PNG", "image/png"), PromptError, "/x is image/png"),
        (sent(b"\x7fELF\0\0", "text/plain"), PromptError, "neither text nor a PDF"),
        (sent(b"", "text/plain"), PromptError, "is empty"),
        (sent(b"", "text/html"), PromptError, "has no text"),
        (sent(b"half", "text/plain", Content_Length="9"), ServerError, "cannot be had"),
        (sent(b"x", Content_Encoding="br"), ServerError, "unknown encoding"),
        (sent(b"x" * 20, Content_Encoding="gzip"), ServerError, "cannot be decompressed"),
        (sent(BOMB, Content_Encoding="gzip"), PromptError, "is larger than 64"),
        (sent(b"\xff" * 20, "text/plain", status=99), ServerError, ""),
    ],
)
def test_an_answer_without_text_is_one_line(answer, error, message):
    with pages({"/x": answer}) as host, pytest.raises(error) as fault:
        read(f"{host}/x")
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_text_that_the_context_does_not_hold_is_refused():
    answer = sent(b"word " * 1000, "text/plain")
    with pages({"/x": answer}) as host, pytest.raises(PromptTooLongError):
        read(f"{host}/x", Context(16, 16))


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n", b"words "),
        (b"HTTP/1.1 200 OK\r\n", b"X-Header: 1\r\n"),
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    ],
)
def test_an_endless_answer_is_given_up(head, piece):
    with endless_server(head, piece) as host, pytest.raises((PromptError, ServerError)):
        read(f"http://{host}/")


def test_a_slow_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(web_file, "FETCH_S", 0.3)

    def answer(request):
        request.send_response(200)
        request.end_headers()
        time.sleep(1)

    with pages({"/x": answer}) as host, pytest.raises(ServerError, match="does not come within"):
        read(f"{host}/x")


def test_a_public_server_does_not_lead_into_a_private_network(monkeypatch):
    """A page could let mixchat ask the router at home, or a program on this machine."""
    calls = iter([False, True])
    monkeypatch.setattr(web_file, "is_private", lambda address: next(calls))
    with pages({"/a": moved("/b"), "/b": sent(PAGE)}) as host:
        with pytest.raises(ServerError, match="leads into a private network") as fault:
            read(f"{host}/a")
        assert fault.value.hint
        monkeypatch.undo()
        assert read(f"{host}/b")[0] == "The text of the page."


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("127.0.0.1", True),
        ("192.168.1.1", True),
        ("169.254.169.254", True),
        ("::1", True),
        ("fe80::1%eth0", True),
        ("::ffff:10.0.0.1", True),
        ("9.9.9.9", False),
        ("2620:fe::fe", False),
    ],
)
def test_addresses_are_private_or_not(address, private):
    assert web_file.is_private(address) is private


@pytest.mark.parametrize(
    "url", ["http://", "https:///x", "http://a:b:c/", "http://[::1/", "http://me:key@localhost/"]
)
def test_an_address_that_cannot_be_one_is_wrong_use(url):
    with pytest.raises(UsageError, match="address of a page"):
        read(url)


def test_a_host_that_does_not_answer_is_one_line():
    with pytest.raises(ServerError, match="cannot be had"):
        read("http://127.0.0.1:1/x")
