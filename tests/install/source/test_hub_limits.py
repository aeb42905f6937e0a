"""A hub that sends without an end what is no file, or next to nothing; and slow lines."""

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
from endless_server import endless_server
from large_file import DATA, NAME, fetch, ranges, url
from weight_tools import Bar

from mixchat.base.errors import HubError
from mixchat.install.source import hub_request
from mixchat.install.source.transfer import fetch_and_discard, fetch_file, part_path, read_range

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n%s\r\n"
GZIP = HEAD % b"Content-Encoding: gzip\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\n\r\n"
EMPTY_BLOCK = b"\x00\x00\x00\xff\xff"  # of deflate
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def patient_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_request, "_PACE_S", 0.3)


@contextmanager
def endless(head: bytes, piece: bytes, pause: float = 0.0) -> Iterator[str]:
    """The URL of a hub that answers with `head`, and then `piece` again and again."""
    with endless_server(head, piece, pause) as address:
        yield f"http://{address}"


ASKS: dict[str, Callable[[str, Path], object]] = {
    "listing": lambda url, place: hub_request.read_json(url),
    "file": lambda url, place: fetch_file(
        f"{url}/{NAME}", place / NAME, 50_000, "0" * 64, Bar(), Event()
    ),
    "range": lambda url, place: read_range(f"{url}/{NAME}", 100, 50_000, Event()),
    "probe": lambda url, place: fetch_and_discard(f"{url}/{NAME}", Bar(), Event()),
}


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"", CONTINUE),
        (REDIRECT, b"x"),
        (GZIP + gzip.compress(b"")[:10], EMPTY_BLOCK),
        (HEAD % b"Transfer-Encoding: chunked\r\n", b"1;" + b"x" * 60_000 + b"\r\n:\r\n"),
    ],
    ids=["informational", "redirect", "gzip of nothing", "chunk extensions"],
)
@pytest.mark.parametrize("what", ["listing", "file"])
def test_what_is_no_file_is_not_read_for_ever(cache, monkeypatch, tmp_path, head, piece, what):
    """`mixchat download` hung, and the body of a redirect filled the memory."""
    monkeypatch.setattr(hub_request, "_JSON_BYTES_MAX", 2**20)
    with endless(head, piece) as url, pytest.raises(HubError, match="without an end"):
        ASKS[what](url, tmp_path)


@pytest.mark.parametrize(
    ("head", "piece"),
    [(b"", CONTINUE), (b"HTTP/1.1 200 OK\r\nA: ", b"x"), (HEAD % b"", b" "), (REDIRECT, b"x")],
    ids=["informational", "head", "body", "redirect"],
)
@pytest.mark.parametrize("what", ["listing", "file"])
def test_a_byte_now_and_then_is_not_waited_for(cache, tmp_path, head, piece, what):
    with endless(head, piece, 0.05) as url, pytest.raises(HubError, match="too slowly"):
        ASKS[what](url, tmp_path)


def test_a_listing_has_minutes_at_most(cache, monkeypatch):
    monkeypatch.setattr(hub_request, "_PACE_BYTES", 10)
    monkeypatch.setattr(hub_request, "_JSON_S", 1.0)
    slow = endless(HEAD % b"", b" " * 100, 0.05)
    with slow as url, pytest.raises(HubError, match="too slowly"):
        hub_request.read_json(url)


def test_a_slow_but_steady_line_brings_a_file_in_one_request(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_request, "_PACE_BYTES", 1000)
    hub.delay, hub.step = 0.03, 2000  # for many times the pace's period
    assert fetch(hub, tmp_path / NAME).read_bytes() == DATA
    assert ranges(hub) == [None]


def test_a_line_that_is_slower_than_the_pace_brings_a_file_in_several_requests(hub, tmp_path):
    hub.delay, hub.step = 0.03, 2000
    assert fetch(hub, tmp_path / NAME).read_bytes() == DATA
    assert len(ranges(hub)) > 1


def test_time_in_which_this_process_does_something_else_is_not_the_hubs(hub, tmp_path, monkeypatch):
    """A disk that is slow, or a process that was suspended, is no slow hub."""

    class Slow(Bar):
        def advance(self, amount: int) -> None:
            super().advance(amount)
            time.sleep(0.15)

    monkeypatch.setattr(hub_request, "_PACE_S", 2.0)
    hub.step = 5000
    fetch(hub, tmp_path / NAME, Slow())
    assert ranges(hub) == [None]


def test_a_few_bytes_of_each_attempt_do_not_count_as_progress(hub, tmp_path):
    """Attempts were counted anew for each byte that came."""
    hub.fail(f"^/{NAME}", cut_after=10)
    with pytest.raises(Exception, match=r"peer closed|disconnected|complete"):
        fetch(hub, tmp_path / NAME)
    assert part_path(tmp_path / NAME).stat().st_size < 100


def test_each_thread_has_limits_of_its_own(hub, monkeypatch):
    """One connection's reads counted for all."""
    monkeypatch.setattr(hub_request, "_SPARE_BYTES", 0)
    results = []

    def read() -> None:
        results.append(read_range(url(hub), 0, 50_000, Event()))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [DATA[:50_000]] * 8
