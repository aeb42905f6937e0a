"""Addresses of workers are read as people write them; anything else is refused with one line."""

import pytest

from mixchat.base.errors import UsageError
from mixchat.base.options import WORKER_PORT, NetworkAddress

# fmt: off
NOT_ADDRESSES = (
    "", ":", ":80", "a b", "host:", "host:http", "a:1:2", "[host]:80", "[::1", "::1]:80", "[]:80",
    "h:999999", "http://host", "host/x", "h\u00f6st", "host\n", "user@host", "\udce9", "..", "a..b",
    "a" * 64,
)
# fmt: on


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("192.168.1.5", "192.168.1.5", WORKER_PORT),
        ("192.168.1.5:80", "192.168.1.5", 80),
        ("helper.local", "helper.local", WORKER_PORT),
        ("my_pc-2:65535", "my_pc-2", 65535),
        ("::1", "::1", WORKER_PORT),
        ("[::1]", "::1", WORKER_PORT),
        ("[fe80::1%eth0]:9", "fe80::1%eth0", 9),
    ],
)
def test_an_address_is_a_host_and_perhaps_a_port(text, host, port):
    assert NetworkAddress.parse(text) == NetworkAddress(host, port)


@pytest.mark.parametrize("address", ["192.168.1.5:80", "[::1]:7917", "helper:1"])
def test_its_text_is_read_as_the_same_address(address):
    assert str(NetworkAddress.parse(address)) == address


@pytest.mark.parametrize("text", NOT_ADDRESSES)
def test_anything_else_is_refused(text):
    with pytest.raises(UsageError, match=r"cannot read .* as HOST\[:PORT\]"):
        NetworkAddress.parse(text)


@pytest.mark.parametrize("text", ["host:0", "host:65536", "[::1]:99999"])
def test_a_port_has_its_limits(text):
    with pytest.raises(UsageError, match="a port is between 1 and 65535"):
        NetworkAddress.parse(text)


def test_any_port_is_0_for_those_who_listen():
    assert NetworkAddress.parse("127.0.0.1:0", any_port=True).port == 0
    with pytest.raises(UsageError, match="port"):
        NetworkAddress.parse("127.0.0.1:65536", any_port=True)
