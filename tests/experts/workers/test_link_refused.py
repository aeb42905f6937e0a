"""Workers and chats that refuse each other, and workers that answer oddly."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S
from worker_double import HELLO, KEY, TOKEN, Doubles, ThreadedWorker, ask, assert_right, row

from mixchat.base.errors import (
    CheckpointError,
    MixchatError,
    ResourceError,
    ServerError,
    UsageError,
)
from mixchat.base.options import NetworkAddress
from mixchat.experts.workers import messages
from mixchat.experts.workers.address import Address, resolve
from mixchat.experts.workers.link import Link
from mixchat.experts.workers.listener import Listener
from mixchat.experts.workers.messages import Computed, Hello, Welcome, pack
from mixchat.experts.workers.sockets import PIECE, BadMessageError, ConnectionLostError


@contextmanager
def impostor(behave: Callable[[socket.socket], None]) -> Iterator[Address]:
    """Somebody who listens, and behaves so to the one who connects; then hangs up."""

    def accept() -> None:
        accepted, _ = listener.accept()
        with accepted, suppress(ConnectionLostError, OSError):
            behave(accepted)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        yield address_of(listener)
        thread.join(PATIENCE_S)


def address_of(listener: socket.socket) -> Address:
    return resolve(str(NetworkAddress(*listener.getsockname())))


DONE = pack(Computed(seconds=1))
WELCOME = pack(Welcome(slots=6, arithmetic="words"))


@contextmanager
def liar(result: bytes, welcome: bytes = WELCOME) -> Iterator[Address]:
    """A worker with the right key, which sends these answers."""
    over = threading.Event()
    listener = Listener(resolve("127.0.0.1:0", any_port=True), KEY, print)

    def serve() -> None:
        while not over.is_set():
            if message := listener.receive(0.05):
                is_hello = isinstance(messages.unpack(message.data)[0], Hello)
                listener.send(message.peer, welcome if is_hello else result)
        listener.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield resolve(listener.address)
    over.set()
    thread.join(PATIENCE_S)


def pretend_to_know_the_key(accepted: socket.socket) -> None:
    """Speak the protocol. The proof is mutual, so the chat side finds out."""
    accepted.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE".ljust(22, b"\0"))
    accepted.sendall(b"\x01".ljust(32, b"\0"))
    accepted.recv(300)
    accepted.sendall(b"\x04\xa8\x07WELCOME" + bytes(160))
    accepted.recv(300)


def speak_ssh(accepted: socket.socket) -> None:
    accepted.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
    accepted.recv(64)


@pytest.mark.parametrize(
    ("behave", "said"),
    [(pretend_to_know_the_key, "another key"), (speak_ssh, "is no worker")],
)
def test_an_impostor_is_one_clear_line(behave, said):
    with impostor(behave) as address, pytest.raises(UsageError, match=said):
        Link(address, KEY, HELLO)


OTHER = {"model_identity": "cd" * 32, "model_name": "other"}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"version": "9.9.9"}, CheckpointError, r"runs mixchat \d\S+, and this is 9\.9\.9"),
        (OTHER, CheckpointError, r"tiny \(abab\w+\), and .* other \(cdcd\w+\)"),
        ({"exact_prompts": True}, MixchatError, "beyond these experts"),  # in the experts' words
    ],
    ids=["another version", "another model", "what experts cannot do"],
)
def test_a_chat_that_does_not_fit_a_worker_is_refused_with_what_both_have(
    worker, changes, error, said
):
    with pytest.raises(error, match=said):
        worker.open(HELLO.model_copy(update=changes))


def test_a_busy_worker_is_refused_and_goes_on_with_its_chat(worker, link):
    with pytest.raises(ResourceError, match="busy with another chat"):
        worker.open()
    assert_right(link)


def test_a_chat_that_follows_another_waits_for_its_end(worker):
    """The end is noticed between two experts: the next chat comes sooner, and is not refused."""
    computing = threading.Event()

    def compute(check):
        computing.set()
        time.sleep(0.5)

    worker.model.on_compute = compute
    link = worker.open()
    link.start(1, TOKEN, row())
    assert computing.wait(PATIENCE_S)
    link.close()
    worker.open().close()


def test_a_worker_with_room_for_one_expert_is_refused():
    worker = ThreadedWorker(Doubles(slots=1))
    with pytest.raises(ResourceError, match="room for 1 "):
        worker.open()
    worker.stop()


@pytest.mark.parametrize(
    ("listens", "said"),
    [(False, "no worker can be reached there"), (True, "does not answer")],
    ids=["nobody listens", "the listener never speaks, as a worker that was stopped"],
)
def test_a_port_where_nobody_answers_is_one_clear_line(listens, said):
    """Its exit code was 1, as for a fault of mixchat."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = address_of(listener)
        if not listens:
            listener.close()
        with pytest.raises(ServerError, match=said) as caught:
            Link(address, KEY, HELLO)
    assert caught.value.exit_code == 5


NO_DESCRIPTOR = """
import os, resource, sys
from worker_double import HELLO, KEY
from mixchat.base.errors import ResourceError
from mixchat.experts.workers.address import resolve
from mixchat.experts.workers.link import Link
address = resolve(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
held = []
try:
    while True:
        held.append(os.dup(2))
except OSError:
    pass
for count in range(40):
    try:
        Link(address, KEY, HELLO).close()
        print("opened with", count)
        break
    except ResourceError as error:
        os.close(held.pop())
"""


def test_a_chat_side_without_free_descriptors_is_told_and_goes_on(worker):
    """With two of them libzmq aborts the process, and strangers may have taken the others."""
    command = [sys.executable, "-c", NO_DESCRIPTOR, str(worker.address)]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, check=False, capture_output=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"opened with 32\n", b"")


@pytest.mark.parametrize(
    "welcome",
    [b"", b"{}", b"[]", DONE, b"x" * 60_000],
    ids=["nothing", "empty", "list", "done", "long"],
)
def test_an_odd_welcome_is_one_clear_line(welcome):
    with (
        liar(b"", welcome) as address,
        pytest.raises(ServerError, match="it sent a message"),
    ):
        Link(address, KEY, HELLO)


ROW = HELLO.hidden_size * 2  # bytes
NAN = torch.full((2, HELLO.hidden_size), torch.nan).bfloat16().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (DONE + bytes(2 * 10 * ROW), "rows of another size"),
        (DONE + bytes(ROW), "rows of another size"),
        (DONE, "rows of another size"),
        (DONE + NAN, "numbers that are not finite"),
        (b'{"type":"computed","seconds":NaN}\n' + bytes(2 * ROW), "a message that makes no sense"),
        (DONE[:5], "a message that makes no sense"),
        (WELCOME, "a message out of turn"),
        (b"", "a message that makes no sense"),
    ],
    ids=["wide", "one row", "no row", "NaN", "no time", "half a head", "welcome", "empty"],
)
def test_a_worker_that_answers_oddly_is_blamed_and_lost(answer, reason):
    """Rows of 640 columns ended the chat; rows of NaN were blamed on this machine's model."""
    with liar(answer) as address:
        link = Link(address, KEY, HELLO)
        link.start(1, TOKEN, row())
        with pytest.raises(BadMessageError, match=reason):
            link.finish()
        assert link.is_lost


def test_a_worker_is_not_blamed_for_what_is_not_finite_before_it_computes(link):
    x = torch.full((1, HELLO.hidden_size), torch.inf).bfloat16()
    assert ask(link, 1, TOKEN, x).isinf().all()


def test_a_message_that_is_too_long_ends_the_connection():
    with liar(bytes(2 * PIECE)) as address:
        link = Link(address, KEY, HELLO)
        link.start(1, TOKEN, row())
        with pytest.raises(ConnectionLostError, match="has ended"):
            link.finish()


def test_a_worker_is_reached_over_ipv6():
    try:
        worker = ThreadedWorker(at="[::1]:0")
    except UsageError:
        pytest.skip("this machine has no IPv6")
    link = worker.open()
    assert_right(link)
    link.close()
    worker.stop()
