"""Addresses of workers: every form that is right, and one clear line for each that is not."""

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from mixchat.base.errors import MixchatError, UsageError
from mixchat.experts.workers import address
from mixchat.experts.workers.address import resolve, resolve_workers


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], None]:
    """Let a name have these addresses; all else is looked up by the system."""
    known: dict[str, list[str]] = {}
    look_up = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *arguments: Any) -> list[Any]:
        return [
            found
            for numeric in known.get(host, [host])
            for found in look_up(numeric, port, *arguments)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known.__setitem__


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("192.0.2.7", "192.0.2.7", 7917, "192.0.2.7:7917"),
        ("192.0.2.7:80", "192.0.2.7", 80, "192.0.2.7:80"),
        ("localhost", "127.0.0.1", 7917, "localhost:7917"),
        ("2001:db8::7", "2001:db8::7", 7917, "[2001:db8::7]:7917"),
        ("[2001:db8::7]:65535", "2001:db8::7", 65535, "[2001:db8::7]:65535"),
    ],
)
def test_an_address_has_a_host_and_perhaps_a_port(text, host, port, shown):
    resolved = resolve(text)
    assert (resolved.host, resolved.port, str(resolved)) == (host, port, shown)


def test_a_name_has_the_address_that_the_system_knows(names):
    names("desk", ["192.0.2.7", "192.0.2.7"])  # some systems say it twice
    assert resolve("desk:80").target == ("192.0.2.7", 80)


def test_a_name_with_several_addresses_is_refused_and_each_is_named(names):
    names("desk", ["192.0.2.7", "2001:db8::7"])
    with pytest.raises(UsageError, match=r"desk has several .*: 192\.0\.2\.7, 2001:db8::7") as e:
        resolve("desk:80")
    assert "192.0.2.7:80" in (e.value.hint or "")


def test_a_name_that_nobody_knows_is_wrong_use(monkeypatch):
    def fail(*arguments):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(UsageError, match=r"desk: no such host \(Name or service not known\)"):
        resolve("desk")


def test_a_name_server_that_hangs_ends_in_one_clear_line(monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: answer.wait())
    monkeypatch.setattr(address, "_LOOKUP_TIMEOUT_S", 0.1)
    with pytest.raises(MixchatError, match="takes too long"):
        resolve("desk")
    answer.set()


def test_a_worker_may_be_named_once_only(names):
    names("desk", ["192.0.2.7"])
    with pytest.raises(UsageError, match=r"twice: desk:7917 and 192\.0\.2\.7:7917"):
        resolve_workers(["desk", "192.0.2.7:7917"])


def test_two_workers_of_one_machine_have_ports_of_their_own():
    workers = resolve_workers(["192.0.2.7", "192.0.2.7:7918", "192.0.2.8"])
    assert [str(worker) for worker in workers] == [
        "192.0.2.7:7917",
        "192.0.2.7:7918",
        "192.0.2.8:7917",
    ]
