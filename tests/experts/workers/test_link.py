"""The chat side and a worker: rows there and back, and every way in which a worker is lost."""

from __future__ import annotations

import signal
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
from worker_double import (
    HELLO,
    KEY,
    PATIENCE,
    STUCK_LAYER,
    TOKEN,
    Doubles,
    NeverEnding,
    ThreadedWorker,
    ask,
    assert_right,
    interrupt,
    outputs,
    row,
)

from mixchat.base import interrupts
from mixchat.base.errors import (
    CheckpointError,
    MixchatError,
    ResourceError,
    ServerError,
    UsageError,
)
from mixchat.base.options import NetworkAddress
from mixchat.experts.cache import ExpertKey
from mixchat.experts.workers import link as link_module
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
        thread.join(PATIENCE)


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
    thread.join(PATIENCE)


@pytest.mark.parametrize("experts", [TOKEN, [(7, 1)]], ids=["two", "one"])
def test_one_row_goes_to_all_experts(link, experts):
    for layer in (1, 2, 3):
        x = row()
        assert torch.equal(ask(link, layer, experts, x), outputs(layer, experts, x, True))


def test_each_expert_gets_its_own_rows_of_many(link):
    experts = [(7, 3), (0, 1), (4, 40)]
    x = torch.randn(44, HELLO.hidden_size).bfloat16()
    assert torch.equal(ask(link, 1, experts, x), outputs(1, experts, x))


def test_single_rows_and_many_rows_may_take_turns(link):
    for rows in (1, 7, 1, 1, 2, 300, 1):
        x = torch.randn(rows, HELLO.hidden_size).bfloat16()
        assert torch.equal(ask(link, 2, [(3, rows)], x), outputs(2, [(3, rows)], x))


@pytest.mark.parametrize("dtype", messages.DTYPES)
def test_more_rows_than_one_message_holds_arrive_whole(worker, dtype):
    link = worker.open(HELLO.model_copy(update={"dtype": dtype}))
    x = torch.randn(40_000, HELLO.hidden_size).to(getattr(torch, dtype))  # 5 or 10 MB
    experts = [(1, 39_999), (6, 1)]
    assert torch.equal(ask(link, 1, experts, x), outputs(1, experts, x))
    link.close()


def test_a_worker_loads_the_experts_to_hold_in_their_order(worker, link):
    keys = [ExpertKey(2, 1), ExpertKey(0, 7), ExpertKey(3, 3)]
    link.hold(keys)
    ask(link, 1, TOKEN, row())  # a request comes in between, or before
    while worker.model.loaded != keys:
        assert worker.model.has_loaded.wait(PATIENCE)
        time.sleep(0.01)


def test_a_chat_s_end_frees_the_worker_for_the_next_one(worker):
    for _ in range(3):
        link = worker.open()
        assert link.slots == 6
        assert_right(link)
        link.close()
    assert "after 1 requests: it closed the connection" in worker.wait_for_note("ends", 3)


def test_one_chat_has_several_workers_and_each_is_lost_alone(worker):
    other = ThreadedWorker()
    first, second, x = worker.open(), other.open(), row()
    other.model.on_compute = interrupt
    first.start(1, TOKEN, x)
    second.start(2, TOKEN, x)
    with pytest.raises(ConnectionLostError):
        second.finish()
    assert torch.equal(first.finish(), outputs(1, TOKEN, x, True))
    assert torch.equal(ask(first, 3, TOKEN, x), outputs(3, TOKEN, x, True))
    first.close()
    other.stop()


def test_a_worker_that_is_killed_in_the_midst_of_a_request_is_lost_at_once(process):
    link = process.open(silence=10 * PATIENCE)  # it is not silence that tells
    assert "begins" in process.next_line()
    link.start(STUCK_LAYER, TOKEN, row())
    assert process.next_line() == "computing"
    process.signal(signal.SIGKILL)
    with pytest.raises(ConnectionLostError, match="has ended"):
        link.finish()
    assert link.is_lost


def test_a_worker_that_is_stopped_is_lost_after_the_silence(process):
    link = process.open()
    assert "begins" in process.next_line()
    process.signal(signal.SIGSTOP)
    link.start(1, TOKEN, row())
    with pytest.raises(ConnectionLostError, match="does not answer"):
        link.finish()
    assert link.is_lost


def test_a_worker_that_computes_for_longer_than_the_silence_is_not_lost(worker):
    """Its beats tell that it lives."""
    worker.model.on_compute = lambda check: time.sleep(3)
    link = worker.open(silence=2)
    assert_right(link)
    assert link.seconds_computing >= 3
    link.close()


def test_a_worker_that_lives_and_never_answers_is_lost_when_its_time_is_over(worker, monkeypatch):
    """It could say for ever that it still computes: the chat waited as long."""
    monkeypatch.setattr(link_module, "_REQUEST_S", 0.5)
    ended = threading.Event()
    worker.model.on_compute = lambda check: ended.wait(PATIENCE)
    link = worker.open()
    link.start(1, TOKEN, row())
    with pytest.raises(ConnectionLostError, match="does not answer"):
        link.finish()
    ended.set()
    worker.wait_for_note("ends")


def test_a_worker_that_is_killed_between_requests_is_known_to_be_lost(process):
    link = process.open()
    ask(link, 1, TOKEN, row())
    assert not link.is_lost
    process.signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + PATIENCE
    while not link.is_lost:  # libzmq's thread has to notice it
        assert time.monotonic() < end
    with pytest.raises(ConnectionLostError):
        ask(link, 1, TOKEN, row())
    link.close()


def test_what_a_worker_cannot_compute_is_said_and_the_next_chat_is_served(worker):
    def fail(check):
        raise MixchatError("experts-001.safetensors: cannot be read (Input/output error)")

    link = worker.open()
    worker.model.on_compute = fail
    with pytest.raises(ConnectionLostError, match=r"cannot be read \(Input/output error\)"):
        ask(link, 1, TOKEN, row())
    worker.model.on_compute = lambda check: None
    link = worker.open()
    ask(link, 1, TOKEN, row())
    link.close()


def test_a_worker_stops_computing_when_the_chat_side_is_gone(worker):
    worker.model.on_compute = never_end = NeverEnding()
    link = worker.open()
    link.start(1, TOKEN, row())
    assert never_end.started.wait(PATIENCE)
    link.close()
    assert "closed the connection" in worker.wait_for_note("ends")


def test_ctrl_c_ends_the_wait_for_a_worker(worker):
    waits, computing = threading.Event(), threading.Event()

    def send_ctrl_c(check):
        if not computing.is_set():
            computing.set()
            waits.wait(PATIENCE)  # or the signal would come before the wait for the result
            time.sleep(0.1)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.5)

    worker.model.on_compute = send_ctrl_c
    link = worker.open(silence=10 * PATIENCE)
    link.start(1, TOKEN, row())
    waits.set()  # the signal comes a tenth of a second later
    with pytest.raises(KeyboardInterrupt):
        link.finish()
    assert link.is_lost  # the result must not meet the next request


def test_a_deferred_ctrl_c_ends_the_wait_for_a_worker(worker):
    """Between layers signals are deferred: the wait looks for them by itself."""

    def send_ctrl_c(check):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        NeverEnding()(check)

    worker.model.on_compute = send_ctrl_c
    link = worker.open(silence=10 * PATIENCE)
    reached: list[str] = []

    def ask_in_a_layer():
        with interrupts.deferred():
            ask(link, 1, TOKEN, row())
            reached.append("the end of the wait")

    with pytest.raises(KeyboardInterrupt):
        ask_in_a_layer()
    assert reached == []


def test_another_key_is_refused(worker):
    with pytest.raises(UsageError, match="another key") as caught:
        worker.open(key=bytes(32))
    assert caught.value.hint
    assert "another key" in worker.wait_for_note("sent away")


def test_a_worker_with_another_key_is_found_out_by_the_chat_side():
    """The proof is mutual: this impostor speaks the protocol, and does not know the key."""

    def pretend(accepted):
        accepted.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE".ljust(22, b"\0"))
        accepted.sendall(b"\x01".ljust(32, b"\0"))
        accepted.recv(300)
        accepted.sendall(b"\x04\xa8\x07WELCOME" + bytes(160))
        accepted.recv(300)

    with impostor(pretend) as address, pytest.raises(UsageError, match="another key"):
        Link(address, KEY, HELLO)


def test_another_version_is_refused_with_both_versions(worker):
    with pytest.raises(CheckpointError, match=r"runs mixchat \d\S+, and this is 9\.9\.9"):
        worker.open(HELLO.model_copy(update={"version": "9.9.9"}))


def test_another_model_is_refused_with_both_models(worker):
    other = HELLO.model_copy(update={"model_identity": "cd" * 32, "model_name": "other"})
    with pytest.raises(CheckpointError, match=r"tiny \(abab\w+\), and .* other \(cdcd\w+\)"):
        worker.open(other)


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
    assert computing.wait(PATIENCE)
    link.close()
    worker.open().close()


def test_a_worker_with_room_for_one_expert_is_refused():
    worker = ThreadedWorker(Doubles(slots=1))
    with pytest.raises(ResourceError, match="room for 1 "):
        worker.open()
    worker.stop()


def test_what_the_worker_s_experts_cannot_do_is_refused_in_their_words(worker):
    with pytest.raises(MixchatError, match="beyond these experts"):
        worker.open(HELLO.model_copy(update={"exact_prompts": True}))


def test_a_port_where_nobody_listens_is_one_clear_line():
    """Its exit code was 1, as for a fault of mixchat."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = address_of(listener)
    with pytest.raises(ServerError, match="no worker can be reached there") as caught:
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
        command, cwd=Path(__file__).parent, check=False, capture_output=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"opened with 32\n", b"")


def test_something_else_than_a_worker_is_one_clear_line():
    def answer(accepted):
        accepted.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        accepted.recv(64)

    with impostor(answer) as address, pytest.raises(UsageError, match="is no worker"):
        Link(address, KEY, HELLO)


def test_a_listener_that_never_speaks_is_one_clear_line():
    """So is a worker that was stopped. The exit code of both was 1."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(ServerError, match="does not answer") as caught,
    ):
        Link(address_of(listener), KEY, HELLO)
    assert caught.value.exit_code == 5


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
        (b'{"kind":"computed","seconds":NaN}\n' + bytes(2 * ROW), "a message that makes no sense"),
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
