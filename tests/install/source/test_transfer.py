"""Bytes from a hub that drops, stalls, lies, or knows no ranges."""

import threading
import time
from concurrent.futures import Future
from pathlib import Path
from threading import Event

import pytest
from fake_hub import FakeHub, Fault
from large_file import DATA, NAME, fetch, ranges, url
from patience import PATIENCE_S
from weight_tools import Bar

from mixchat.base.errors import HubError
from mixchat.install.source import transfer
from mixchat.install.source.checkpoint import Stopped
from mixchat.install.source.hub_errors import plain_errors
from mixchat.install.source.transfer import fetch_and_discard, part_path, read_range


class TestFile:
    def test_comes_whole_in_one_request(self, hub, tmp_path):
        bar = Bar()
        assert fetch(hub, tmp_path / "source" / NAME, bar).read_bytes() == DATA
        assert bar.done == len(DATA)
        assert ranges(hub) == [None]
        assert [path.name for path in (tmp_path / "source").iterdir()] == [NAME]

    def test_resumes_where_the_connection_broke(self, hub, tmp_path):
        hub.fail(f"^/{NAME}", times=2, cut_after=40_000)
        bar = Bar()
        assert fetch(hub, tmp_path / NAME, bar).read_bytes() == DATA
        assert ranges(hub) == [None, "bytes=40000-", "bytes=80000-"]
        assert bar.done == len(DATA)

    def test_is_not_asked_for_where_it_only_lacks_its_name(self, hub, tmp_path):
        part_path(tmp_path / NAME).write_bytes(DATA)
        assert fetch(hub, tmp_path / NAME).read_bytes() == DATA
        assert not hub.requests

    def test_comes_again_from_a_hub_that_knows_no_ranges(self, hub, tmp_path):
        hub.ranges = False
        hub.fail(f"^/{NAME}", times=1, cut_after=40_000)
        bar = Bar()
        assert fetch(hub, tmp_path / NAME, bar).read_bytes() == DATA
        assert bar.done == len(DATA)

    @pytest.mark.parametrize("left", [b"x" * len(DATA), DATA + b"!", b"", b"x" + DATA[1:50_000]])
    def test_what_was_left_and_turns_out_wrong_is_fetched_again_once(self, hub, tmp_path, left):
        part_path(tmp_path / NAME).write_bytes(left)
        assert fetch(hub, tmp_path / NAME).read_bytes() == DATA
        assert not part_path(tmp_path / NAME).exists()

    def test_with_another_hash_is_refused_and_leaves_nothing(self, hub, tmp_path):
        hub.serve[NAME] = DATA[:-1] + bytes([DATA[-1] ^ 1])
        bar = Bar()
        with pytest.raises(HubError, match="SHA-256"):
            fetch(hub, tmp_path / "source" / NAME, bar)
        assert list((tmp_path / "source").iterdir()) == []
        assert ranges(hub) == [None]
        assert bar.done == 0

    def test_with_another_hash_is_refused_after_the_second_try_too(self, hub, tmp_path):
        hub.serve[NAME] = bytes(len(DATA))
        part_path(tmp_path / NAME).write_bytes(bytes(10_000))
        with pytest.raises(HubError, match="SHA-256"):
            fetch(hub, tmp_path / NAME)
        assert ranges(hub) == ["bytes=10000-", None]

    def test_that_is_longer_than_listed_is_refused(self, hub, tmp_path):
        hub.serve[NAME] = DATA + b"!"
        hub.omit_headers |= {"Content-Length", "Content-Range"}  # which would betray it
        with pytest.raises(HubError, match="SHA-256"):
            fetch(hub, tmp_path / NAME)
        assert not (tmp_path / NAME).exists()
        part = part_path(tmp_path / NAME)
        assert not part.exists() or part.stat().st_size == 0

    def test_that_is_shorter_than_listed_is_given_up(self, hub, tmp_path):
        hub.serve[NAME] = DATA[:-1]
        hub.omit_headers |= {"Content-Length", "Content-Range"}  # which would betray it
        with plain_errors("x"), pytest.raises(Exception, match="sends no more bytes"):
            fetch(hub, tmp_path / NAME)
        assert part_path(tmp_path / NAME).read_bytes() == DATA[:-1]

    def test_patience_has_an_end(self, hub, tmp_path):
        hub.fail(f"^/{NAME}", cut_after=0)
        with pytest.raises(Exception, match=r"peer closed|disconnected|complete"):
            fetch(hub, tmp_path / NAME)
        assert len(ranges(hub)) == 1 + len(transfer._WAITS_S)

    @pytest.mark.parametrize("status", [408, 500])
    def test_a_busy_store_is_asked_again(self, hub, tmp_path, status):
        hub.fail(f"^/{NAME}", times=2, status=status)
        assert fetch(hub, tmp_path / NAME).read_bytes() == DATA

    def test_a_refusal_is_not_repeated(self, hub, tmp_path):
        hub.fail(f"^/{NAME}", status=403)
        with pytest.raises(Exception, match="403"):
            fetch(hub, tmp_path / NAME)
        assert len(ranges(hub)) == 1


class TestWrongAnswers:
    """A proxy or a network to log in to may answer in place of the hub."""

    @pytest.mark.parametrize("left", [0, 70_000])
    def test_a_page_of_html_is_not_the_file_and_costs_nothing_of_it(self, hub, tmp_path, left):
        """It was taken for the whole file of a hub without ranges: what had come was dropped."""
        part_path(tmp_path / NAME).write_bytes(DATA[:left])
        hub.fail(f"^/{NAME}", page=True)
        with pytest.raises(HubError, match="something else in place of model"):
            fetch(hub, tmp_path / NAME)
        assert part_path(tmp_path / NAME).read_bytes() == DATA[:left]
        hub.faults.clear()
        assert fetch(hub, tmp_path / NAME).read_bytes() == DATA

    def test_a_whole_file_in_place_of_a_part_costs_nothing_of_what_came(self, hub, tmp_path):
        """The part was cut to nothing before the first byte of the whole file arrived."""
        part_path(tmp_path / NAME).write_bytes(DATA[:70_000])
        hub.ranges = False
        hub.fail(f"^/{NAME}", cut_after=40_000)
        with pytest.raises(Exception, match=r"peer closed|disconnected|complete"):
            fetch(hub, tmp_path / NAME)
        assert part_path(tmp_path / NAME).read_bytes() == DATA[:70_000]
        hub.faults.clear()
        bar = Bar()
        assert fetch(hub, tmp_path / NAME, bar).read_bytes() == DATA
        assert bar.done == 30_000

    def test_a_mirror_may_call_a_file_html(self, hub, tmp_path):
        part_path(tmp_path / NAME).write_bytes(DATA[:70_000])
        hub.fail(f"^/{NAME}", headers={"Content-Type": "text/html"})
        assert fetch(hub, tmp_path / NAME).read_bytes() == DATA
        assert ranges(hub) == ["bytes=70000-"]

    @pytest.mark.parametrize("served", [DATA[:-1], DATA + b"!", b"{}"])
    def test_a_file_of_another_size_is_refused_before_its_bytes_come(self, hub, tmp_path, served):
        part_path(tmp_path / NAME).write_bytes(DATA[:1])
        hub.serve[NAME] = served
        with pytest.raises(HubError, match=f"{len(served)} bytes instead of the 100000"):
            fetch(hub, tmp_path / NAME)
        assert part_path(tmp_path / NAME).read_bytes() == DATA[:1]

    @pytest.mark.parametrize("fault", [{"earlier": 500}, {"status": 416}])
    def test_a_part_that_begins_too_early_leads_to_the_whole_file_once(self, hub, tmp_path, fault):
        part_path(tmp_path / NAME).write_bytes(DATA[:70_000])
        hub.fail(f"^/{NAME}", ranged=True, **fault)
        bar = Bar()
        assert fetch(hub, tmp_path / NAME, bar).read_bytes() == DATA
        assert ranges(hub) == ["bytes=70000-", None]
        assert bar.done == 30_000

    def test_a_proxy_that_begins_too_early_and_breaks_off_is_given_up(self, hub, tmp_path):
        """Each attempt started again, brought bytes, and so gave patience for further ones."""
        cuts = iter([40_000, 50_000, 30_000, 60_000, 20_000] * 20)
        take = hub.take_fault

        def cut(path: str, ranged: bool) -> Fault | None:
            fault = take(path, ranged)
            return Fault("", cut_after=next(cuts), earlier=500) if path == f"/{NAME}" else fault

        hub.take_fault = cut  # type: ignore[method-assign]
        with pytest.raises(Exception, match=r"peer closed|disconnected|complete"):
            fetch(hub, tmp_path / NAME)
        assert len(ranges(hub)) < 20

    def test_416_for_the_whole_file_is_given_up(self, hub, tmp_path):
        part_path(tmp_path / NAME).write_bytes(DATA[:70_000])
        hub.fail(f"^/{NAME}", status=416)
        with pytest.raises(HubError, match="another part"):
            fetch(hub, tmp_path / NAME)
        assert len(ranges(hub)) == 1 + len(transfer._WAITS_S)
        assert part_path(tmp_path / NAME).read_bytes() == DATA[:70_000]


class TestRetryAfter:
    @pytest.fixture
    def waits(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """The waits between attempts, which do not take place."""
        waited: list[float] = []

        class Impatient(Event):
            def wait(self, timeout: float | None = None) -> bool:
                waited.append(timeout or 0.0)
                return self.is_set()

        monkeypatch.setattr(transfer, "_WAITS_S", (1.0, 2.0, 4.0))
        self.stop = Impatient()
        return waited

    @pytest.mark.parametrize(
        ("status", "asked", "least", "most"),
        [
            (429, "7", 7, 7),
            (503, "100000", 300, 300),
            (429, "Fri, 01 Jan 2100 00:00:00 +0000", 300, 300),
            (429, "Wed, 21 Oct 2015 07:28:00 GMT", 1, 1),
            (429, "-5", 1, 1),
        ],
    )
    def test_is_heeded_for_five_minutes_at_most(
        self, hub, tmp_path, waits, status, asked, least, most
    ):
        hub.fail(f"^/{NAME}", times=1, status=status, headers={"Retry-After": asked})
        assert fetch(hub, tmp_path / NAME, stop=self.stop).read_bytes() == DATA
        (waited,) = waits
        assert least <= waited <= most


class TestStopping:
    """A hang is the subject: whoever presses Ctrl-C does not wait for the hub."""

    def stop_during(self, hub: FakeHub, path: Path, *, started: Event) -> None:
        stop, done = Event(), Future[None]()

        def run() -> None:
            try:
                fetch(hub, path, stop=stop)
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        assert started.wait(PATIENCE_S)
        stop.set()
        assert isinstance(done.exception(timeout=PATIENCE_S), Stopped)

    def test_ends_before_the_rest_has_come_where_bytes_only_trickle(self, hub, tmp_path):
        hub.delay, started = 0.3, Event()
        watch(part_path(tmp_path / NAME), started)
        self.stop_during(hub, tmp_path / NAME, started=started)
        left = part_path(tmp_path / NAME).read_bytes()
        assert left == DATA[: len(left)] != b""
        assert len(left) < len(DATA)

    def test_ends_at_once_between_two_attempts(self, hub, tmp_path, monkeypatch):
        monkeypatch.setattr(transfer, "_WAITS_S", (600.0,))
        hub.fail(f"^/{NAME}", cut_after=5_000)
        started = Event()
        watch(part_path(tmp_path / NAME), started)
        self.stop_during(hub, tmp_path / NAME, started=started)

    def test_what_was_set_before_ends_it_before_the_first_byte_is_written(self, hub, tmp_path):
        stop = Event()
        stop.set()
        with pytest.raises(Stopped):
            fetch(hub, tmp_path / NAME, stop=stop)
        assert part_path(tmp_path / NAME).read_bytes() == b""


def watch(path: Path, started: Event) -> None:
    """Set `started` once the file has bytes in it."""

    def look() -> None:
        while not path.exists() or not path.stat().st_size:
            time.sleep(0.01)
        started.set()

    threading.Thread(target=look, daemon=True).start()


class TestRange:
    @pytest.mark.parametrize(("start", "size"), [(0, 1), (41_234, 3_210)])
    def test_is_read_and_nothing_more(self, hub, start, size):
        assert read_range(url(hub), start, size, Event()) == DATA[start : start + size]
        assert ranges(hub) == [f"bytes={start}-{start + size - 1}"]

    @pytest.mark.parametrize(("start", "size"), [(99_999, 1), (999, 2_002)])
    def test_is_cut_out_where_the_hub_knows_no_ranges(self, hub, start, size):
        hub.ranges = False
        assert read_range(url(hub), start, size, Event()) == DATA[start : start + size]

    @pytest.mark.parametrize("known", [True, False])
    def test_resumes_after_a_drop(self, hub, known):
        hub.ranges = known
        hub.fail(f"^/{NAME}", times=2, cut_after=12_000)
        assert read_range(url(hub), 10_000, 30_000, Event()) == DATA[10_000:40_000]

    @pytest.mark.parametrize("fault", [{"earlier": 500}, {"status": 416}])
    def test_of_another_place_than_requested_is_cut_out_of_the_whole(self, hub, fault):
        hub.fail(f"^/{NAME}", ranged=True, **fault)
        assert read_range(url(hub), 10_000, 30_000, Event()) == DATA[10_000:40_000]
        assert ranges(hub) == ["bytes=10000-39999", None]

    def test_of_nothing_asks_for_nothing(self, hub):
        assert read_range(url(hub), 5, 0, Event()) == b""
        assert not hub.requests


def test_listening_counts_what_comes_until_stop_is_set(hub):
    bar = Bar()
    fetch_and_discard(url(hub), bar, Event())
    assert bar.done == len(DATA)
    stop = Event()
    stop.set()
    bar = Bar()
    fetch_and_discard(url(hub), bar, stop)
    assert 0 < bar.done <= len(DATA)
