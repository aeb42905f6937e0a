"""A reader waits for as long as it takes, in short waits, unless it is told to hurry."""

import pytest

from mixchat.serving.client.patient_reader import PatientReader


class Source:
    """A socket that is silent so many times before each piece."""

    def __init__(self, *pieces: bytes, silences: int = 0) -> None:
        self.pieces, self.silences, self.left = list(pieces), silences, silences
        self.timeout, self.closed = None, False

    def settimeout(self, seconds):
        self.timeout = seconds

    def recv_into(self, buffer):
        if self.left:
            self.left -= 1
            raise TimeoutError
        self.left = self.silences
        piece = self.pieces.pop(0) if self.pieces else b""
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self):
        self.closed = True


def test_silence_is_waited_out_in_waits_that_let_a_signal_in():
    source = Source(b"a", b"b", silences=100)
    assert PatientReader(source).makefile("rb").read() == b"ab"
    assert source.timeout < 1


def test_a_response_is_read_through_it():
    source = Source(b"HTTP/1.1 200 OK\r\nContent-Type: text/pl", b"ain\r\n\r\nHi", silences=2)
    with PatientReader(source).response("GET") as response:
        assert (response.status, response.getheader("Content-Type")) == (200, "text/plain")
        assert response.read() == b"Hi"


def test_whoever_hurries_does_not_wait_for_ever():
    reader = PatientReader(Source(silences=10**9))
    reader.hurry(-1)
    with pytest.raises(TimeoutError):
        reader.makefile("rb").read()


def test_the_socket_is_closed_with_it():
    source = Source()
    with PatientReader(source).makefile("rb"):
        pass
    assert source.closed


def test_whoever_hurries_does_not_wait_for_the_end_of_what_keeps_coming():
    reader = PatientReader(Source(*[b": ping"] * 10**6))
    reader.hurry(-1)
    with pytest.raises(TimeoutError):
        reader.makefile("rb").read()
