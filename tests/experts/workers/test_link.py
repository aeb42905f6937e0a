"""The chat side and a worker: rows there and back, and every way in which a worker is lost."""

from __future__ import annotations

import dataclasses
import errno
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from worker_double import (
    HELLO,
    KEY,
    PATIENCE,
    STUCK_LAYER,
    Doubles,
    ThreadedWorker,
    WorkerProcess,
    interrupt,
    outputs,
)

from mixchat import interrupts
from mixchat.errors import (
    CheckpointError,
    MixchatError,
    ResourceError,
    UsageError,
)
from mixchat.experts.keys import ExpertKey
from mixchat.experts.workers import link as link_module
from mixchat.experts.workers import messages
from mixchat.experts.workers.address import Address, resolve
from mixchat.experts.workers.connection import (
    SEND_DEADLINE,
    Connection,
    ConnectionLostError,
    Frame,
    NoAnswerError,
)
from mixchat.experts.workers.door import address_of
from mixchat.experts.workers.group import Transfer
from mixchat.experts.workers.handshake import MAGIC, greet_chat
from mixchat.experts.workers.link import Link, WorkerLostError
from mixchat.experts.workers.messages import Kind, Welcome

TOKEN = [(2, 1), (5, 1)]  # what a token needs of a layer: two experts, one row each


def ask(
    link: Link, layer: int, experts: Sequence[tuple[int, int]], x: torch.Tensor
) -> torch.Tensor:
    link.start(layer, experts, x)
    return link.finish()


def row() -> torch.Tensor:
    return torch.randn(1, HELLO.hidden_size).bfloat16()


@pytest.fixture
def link(worker: ThreadedWorker) -> Iterator[Link]:
    opened = worker.open()
    yield opened
    opened.close()


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
        yield resolve(address_of(listener))
        thread.join(PATIENCE)


def test_a_worker_says_what_it_has(link: Link) -> None:
    assert link.slots == 6


def test_one_row_goes_to_two_experts_and_two_results_come_back(link: Link) -> None:
    for layer in (1, 2, 3):
        x = row()
        assert torch.equal(ask(link, layer, TOKEN, x), outputs(layer, TOKEN, x, True))


def test_one_row_goes_to_one_expert(link: Link) -> None:
    x = row()
    assert torch.equal(ask(link, 3, [(7, 1)], x), outputs(3, [(7, 1)], x))


def test_each_expert_gets_its_own_rows_of_many(link: Link) -> None:
    experts = [(7, 3), (0, 1), (4, 40)]
    x = torch.randn(44, HELLO.hidden_size).bfloat16()
    assert torch.equal(ask(link, 1, experts, x), outputs(1, experts, x))


def test_single_rows_and_many_rows_may_take_turns(link: Link) -> None:
    for rows in (1, 7, 1, 1, 2, 300, 1):
        x = torch.randn(rows, HELLO.hidden_size).bfloat16()
        assert torch.equal(ask(link, 2, [(3, rows)], x), outputs(2, [(3, rows)], x))


@pytest.mark.parametrize("dtype", messages.DTYPES)
def test_more_rows_than_one_piece_of_the_group_holds_arrive_whole(
    worker: ThreadedWorker, dtype: str
) -> None:
    link = worker.open(dataclasses.replace(HELLO, dtype=dtype))
    x = torch.randn(40_000, HELLO.hidden_size).to(getattr(torch, dtype))  # 5 or 10 MB
    experts = [(1, 39_999), (6, 1)]
    assert torch.equal(ask(link, 1, experts, x), outputs(1, experts, x))
    link.close()


def test_a_worker_loads_the_experts_to_hold_in_their_order(
    worker: ThreadedWorker, link: Link
) -> None:
    keys = [ExpertKey(2, 1), ExpertKey(0, 7), ExpertKey(3, 3)]
    link.hold(keys)
    ask(link, 1, TOKEN, row())  # a request comes in between, or before
    while worker.model.loaded != keys:
        assert worker.model.has_loaded.wait(PATIENCE)
        time.sleep(0.01)


def test_a_chat_s_end_frees_the_worker_for_the_next_one(worker: ThreadedWorker) -> None:
    for _ in range(3):
        link, x = worker.open(), row()
        assert torch.equal(ask(link, 1, TOKEN, x), outputs(1, TOKEN, x, True))
        link.close()
    assert "after 1 requests: it closed the connection" in worker.wait_for_note("ends", 3)


def test_one_chat_has_several_workers_and_each_is_lost_alone(worker: ThreadedWorker) -> None:
    other = ThreadedWorker()
    first, second, x = worker.open(), other.open(), row()
    other.model.on_compute = interrupt
    first.start(1, TOKEN, x)
    second.start(2, TOKEN, x)
    with pytest.raises(WorkerLostError):
        second.finish()
    assert torch.equal(first.finish(), outputs(1, TOKEN, x, True))
    assert torch.equal(ask(first, 3, TOKEN, x), outputs(3, TOKEN, x, True))
    first.close()
    other.stop()


def test_a_worker_that_is_killed_in_the_midst_of_a_request_is_lost_at_once(
    process: WorkerProcess,
) -> None:
    link = process.open(silence=10 * PATIENCE)  # it is not silence that tells
    assert "begins" in process.next_line()
    link.start(STUCK_LAYER, TOKEN, row())
    assert process.next_line() == "computing"
    process.signal(signal.SIGKILL)
    with pytest.raises(WorkerLostError, match=r"closed|reset|failed"):
        link.finish()
    assert link.is_lost


def test_a_worker_that_is_stopped_is_lost_after_the_silence(process: WorkerProcess) -> None:
    link = process.open()
    assert "begins" in process.next_line()
    process.signal(signal.SIGSTOP)
    link.start(1, TOKEN, row())
    with pytest.raises(WorkerLostError, match="does not answer"):
        link.finish()
    assert link.is_lost


def test_a_worker_that_computes_for_longer_than_the_silence_is_not_lost(
    worker: ThreadedWorker,
) -> None:
    """Its beats tell that it lives."""
    worker.model.on_compute = lambda check: time.sleep(3)
    link, x = worker.open(silence=2), row()
    assert torch.equal(ask(link, 1, TOKEN, x), outputs(1, TOKEN, x, True))
    assert link.seconds_computing >= 3
    link.close()


def test_a_worker_that_takes_as_long_as_it_may_to_send_each_sign_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was taken for lost: the chat side waited no longer than the worker could send."""
    now = 100.0
    clock = SimpleNamespace(monotonic=lambda: now)
    signs = iter([(Kind.BUSY, b""), (Kind.BUSY, b""), (Kind.DONE, messages.pack_seconds(9))])

    def receive(deadline: float) -> Frame:
        nonlocal now
        now += messages.BEAT + SEND_DEADLINE
        if now >= deadline:
            raise NoAnswerError("it does not answer")
        return Frame(*next(signs))

    connection: Any = SimpleNamespace(receive=receive, send=lambda *frame: None)
    group: Any = SimpleNamespace(
        send=lambda rows, tag: Transfer(rows, []), receive=lambda rows, tag: Transfer(rows, [])
    )
    monkeypatch.setattr(link_module, "time", clock)
    address, welcome = resolve("127.0.0.1"), Welcome(6, "words")
    link = Link(address, connection, group, HELLO, welcome, link_module.SILENCE)
    ask(link, 1, TOKEN, row())
    assert link.seconds_computing == 9


def test_a_worker_that_is_killed_between_requests_is_known_to_be_lost(
    process: WorkerProcess,
) -> None:
    link = process.open()
    ask(link, 1, TOKEN, row())
    assert not link.is_lost
    process.signal(signal.SIGKILL)
    process.wait()
    assert link.is_lost
    with pytest.raises(WorkerLostError):
        ask(link, 1, TOKEN, row())
    link.close()


def test_what_a_worker_cannot_compute_is_said_and_the_next_chat_is_served(
    worker: ThreadedWorker,
) -> None:
    def fail(check: object) -> None:
        raise MixchatError("experts-001.safetensors: cannot be read (Input/output error)")

    link = worker.open()
    worker.model.on_compute = fail
    with pytest.raises(WorkerLostError, match=r"cannot be read \(Input/output error\)"):
        ask(link, 1, TOKEN, row())
    worker.model.on_compute = lambda check: None
    link = worker.open()
    ask(link, 1, TOKEN, row())
    link.close()


def test_a_worker_stops_computing_when_the_chat_side_is_gone(worker: ThreadedWorker) -> None:
    computing = threading.Event()

    def never_end(check: object) -> None:
        computing.set()
        while True:
            check()  # type: ignore[operator]
            time.sleep(0.01)

    worker.model.on_compute = never_end
    link = worker.open()
    link.start(1, TOKEN, row())
    assert computing.wait(PATIENCE)
    link.close()
    assert "closed the connection" in worker.wait_for_note("ends")


def test_ctrl_c_ends_the_wait_for_a_worker(worker: ThreadedWorker) -> None:
    waits, computing = threading.Event(), threading.Event()

    def send_ctrl_c(check: object) -> None:
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


def test_a_deferred_ctrl_c_ends_the_wait_for_a_worker(worker: ThreadedWorker) -> None:
    """Between layers signals are deferred: the wait looks for them by itself."""

    def send_ctrl_c(check: object) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        while True:
            check()  # type: ignore[operator]
            time.sleep(0.01)

    worker.model.on_compute = send_ctrl_c
    link = worker.open(silence=10 * PATIENCE)
    reached: list[str] = []

    def ask_in_a_layer() -> None:
        with interrupts.deferred():
            ask(link, 1, TOKEN, row())
            reached.append("the end of the wait")

    with pytest.raises(KeyboardInterrupt):
        ask_in_a_layer()
    assert reached == []


def test_another_key_is_refused(worker: ThreadedWorker) -> None:
    with pytest.raises(UsageError, match="another key") as caught:
        worker.open(key=bytes(32))
    assert caught.value.hint
    assert "another key" in worker.wait_for_note("sent away")


def test_a_worker_with_another_key_that_lets_everybody_in_is_found_out() -> None:
    """The proof is mutual: a worker that does not know the key cannot answer."""

    def pretend(accepted: socket.socket) -> None:
        accepted.sendall(MAGIC + bytes(32))
        accepted.recv(64, socket.MSG_WAITALL)
        accepted.sendall(bytes(32))
        accepted.recv(1)

    with impostor(pretend) as address, pytest.raises(UsageError, match="another key"):
        Link.open(address, KEY, HELLO)


def test_another_version_is_refused_with_both_versions(worker: ThreadedWorker) -> None:
    with pytest.raises(CheckpointError, match=r"runs mixchat \d\S+, and this is 9\.9\.9"):
        worker.open(dataclasses.replace(HELLO, version="9.9.9"))


def test_another_model_is_refused_with_both_models(worker: ThreadedWorker) -> None:
    other = dataclasses.replace(HELLO, model_identity="cd" * 32, model_name="other")
    with pytest.raises(CheckpointError, match=r"tiny \(abab\w+\), and .* other \(cdcd\w+\)"):
        worker.open(other)


def test_a_busy_worker_is_refused_and_goes_on_with_its_chat(
    worker: ThreadedWorker, link: Link
) -> None:
    with pytest.raises(ResourceError, match="busy with another chat"):
        worker.open()
    x = row()
    assert torch.equal(ask(link, 1, TOKEN, x), outputs(1, TOKEN, x, True))


def test_a_chat_that_follows_another_waits_for_its_end(worker: ThreadedWorker) -> None:
    """The end is noticed between two experts: the next chat comes sooner, and is not refused."""
    computing = threading.Event()

    def compute(check: object) -> None:
        computing.set()
        time.sleep(0.5)

    worker.model.on_compute = compute
    link = worker.open()
    link.start(1, TOKEN, row())
    assert computing.wait(PATIENCE)
    link.close()
    worker.open().close()


def test_a_worker_with_room_for_one_expert_is_refused() -> None:
    worker = ThreadedWorker(Doubles(slots=1))
    with pytest.raises(ResourceError, match="room for 1 "):
        worker.open()
    worker.stop()


def test_what_the_worker_s_experts_cannot_do_is_refused_in_their_words(
    worker: ThreadedWorker,
) -> None:
    with pytest.raises(MixchatError, match="beyond these experts"):
        worker.open(dataclasses.replace(HELLO, exact_prompts=True))


def test_a_port_where_nobody_listens_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = resolve(address_of(listener))
    with pytest.raises(MixchatError, match="no worker listens there") as caught:
        Link.open(address, KEY, HELLO)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "error",
    [TimeoutError(), OSError(errno.EHOSTUNREACH, "No route to host")],
    ids=["silent", "no route"],
)
def test_a_machine_that_cannot_be_reached_is_one_clear_line(
    error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(address: object, deadline: float) -> None:
        raise error

    monkeypatch.setattr(link_module, "connect", fail)
    with pytest.raises(MixchatError, match=r"cannot be reached: (it does not answer|No route)"):
        Link.open(resolve("192.0.2.1"), KEY, HELLO)


def test_something_else_than_a_worker_is_one_clear_line() -> None:
    def answer(accepted: socket.socket) -> None:
        accepted.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        accepted.recv(1)

    with impostor(answer) as address, pytest.raises(UsageError, match="is no worker"):
        Link.open(address, KEY, HELLO)


def test_a_listener_that_hangs_up_is_one_clear_line() -> None:
    with impostor(lambda accepted: None) as address, pytest.raises(UsageError, match="no worker"):
        Link.open(address, KEY, HELLO)


def test_a_worker_that_stops_in_the_handshake_is_one_clear_line() -> None:
    def stop(accepted: socket.socket) -> None:
        accepted.sendall(MAGIC + bytes(32))
        while accepted.recv(64):
            pass

    with impostor(stop) as address, pytest.raises(MixchatError, match="does not answer"):
        Link.open(address, KEY, HELLO)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (Kind.WELCOME, b"{}"),
        (Kind.REFUSAL, b"[]"),
        (Kind.DONE, messages.pack_seconds(1)),
        (Kind.BUSY, b"x" * 70_000),
    ],
)
def test_an_odd_welcome_is_one_clear_line(kind: Kind, payload: bytes) -> None:
    def welcome(accepted: socket.socket) -> None:
        connection = Connection(accepted)
        greet_chat(connection, KEY, time.monotonic() + PATIENCE)
        connection.receive(time.monotonic() + PATIENCE)
        connection.send(kind, payload)

    with impostor(welcome) as address, pytest.raises(MixchatError, match="it sent a message"):
        Link.open(address, KEY, HELLO)


@pytest.mark.parametrize(
    ("kind", "payload"), [(Kind.DONE, b""), (Kind.DONE, b"\xff" * 8), (Kind.STORE, b"x"), (77, b"")]
)
def test_a_worker_that_answers_oddly_is_lost(
    worker: ThreadedWorker, link: Link, kind: int, payload: bytes
) -> None:
    def send_odd(check: Any) -> None:
        check.__self__._connection.send(kind, payload)

    worker.model.on_compute = send_odd
    link.start(1, TOKEN, row())
    with pytest.raises(WorkerLostError, match="it sent a message"):
        link.finish()
    assert link.is_lost


def test_a_listener_that_never_speaks_is_one_clear_line() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(MixchatError, match="does not answer"),
    ):
        Link.open(resolve(address_of(listener)), KEY, HELLO)


def test_a_worker_is_reached_over_ipv6() -> None:
    try:
        worker = ThreadedWorker(at="[::1]:0")
    except UsageError:
        pytest.skip("this machine has no IPv6")
    link, x = worker.open(), row()
    assert torch.equal(ask(link, 1, TOKEN, x), outputs(1, TOKEN, x, True))
    link.close()
    worker.stop()
