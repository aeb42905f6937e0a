"""A server's URL can be written in each of the forms that people use."""

import pytest

from mixchat.base.errors import UsageError
from mixchat.serving.client.server_url import ServerURL


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:8080", "http://127.0.0.1:8080/v1"),
        ("localhost", "http://localhost:11435/v1"),
        ("http://localhost", "http://localhost:80/v1"),
        ("http://127.0.0.1:11435", "http://127.0.0.1:11435/v1"),
        ("http://127.0.0.1:11435/", "http://127.0.0.1:11435/v1"),
        ("http://127.0.0.1:11435/v1", "http://127.0.0.1:11435/v1"),
        ("127.0.0.1:11435/v1/", "http://127.0.0.1:11435/v1"),
        ("https://example.com", "https://example.com:443/v1"),
        ("https://example.com/api/v2", "https://example.com:443/api/v2"),
        ("[::1]:8080", "http://[::1]:8080/v1"),
        ("HTTP://Example.com", "http://example.com:80/v1"),
    ],
)
def test_each_form_is_read(text, url):
    assert str(ServerURL.parse(text)) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ftp://example.com",
        "http://",
        "host:port",
        "host:0",
        "host:70000",
        "::1",
        "a b",
        "http://a\nHost: b",
        "http://exämple.com",
        "http://a/b?c",
        "http://a/#b",
        "http://[::1",
    ],
)
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(UsageError) as error:
        ServerURL.parse(text)
    assert "127.0.0.1:11435" in error.value.hint


def test_a_password_belongs_into_the_variable_and_is_not_shown():
    with pytest.raises(UsageError) as error:
        ServerURL.parse("http://me:secret@example.com")
    assert "MIXCHAT_API_KEY" in error.value.hint
    assert "secret" not in str(error.value)
