"""The chat side and a worker: rows there and back, and every way in which a worker is lost."""

import signal
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from patience import PATIENCE_S, wait_until
from worker_double import (
    HELLO,
    SILENCE,
    STUCK_LAYER,
    TOKEN,
    NeverEnding,
    ThreadedWorker,
    ask,
    assert_right,
    interrupt,
    outputs,
    row,
)

from mixchat.base import interrupts
from mixchat.experts.cache import ExpertKey
from mixchat.experts.workers import link as link_module
from mixchat.experts.workers import messages
from mixchat.experts.workers.sockets import ConnectionLostError


def test_one_row_for_all_experts_and_rows_for_each_take_turns(link):
    for layer, rows in ((1, 1), (2, 44), (3, 1), (1, 300), (2, 1)):
        x = torch.randn(rows, HELLO.hidden_size).bfloat16()
        if rows == 1:
            for experts in (TOKEN, [(7, 1)]):
                assert torch.equal(ask(link, layer, experts, x), outputs(layer, experts, x, True))
        else:
            experts = [(7, 3), (0, 1), (4, rows - 4)]
            assert torch.equal(ask(link, layer, experts, x), outputs(layer, experts, x))


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
    wait_until(lambda: worker.model.loaded == keys)


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


@pytest.mark.parametrize(
    ("number", "silence", "said"),
    [
        (signal.SIGKILL, 10 * PATIENCE_S, "has ended"),  # it is not silence that tells
        (signal.SIGSTOP, SILENCE, "does not answer"),
    ],
    ids=["killed", "stopped"],
)
def test_a_worker_that_is_killed_or_stopped_in_the_midst_of_a_request_is_lost(
    process, number, silence, said
):
    link = process.open(silence)
    assert "begins" in process.next_line()
    link.start(STUCK_LAYER, TOKEN, row())
    assert process.next_line() == "computing"
    process.signal(number)
    with pytest.raises(ConnectionLostError, match=said):
        link.finish()
    assert link.is_lost


def test_a_worker_that_computes_for_longer_than_the_silence_is_not_lost(worker):
    """Its beats tell that it lives."""
    worker.model.on_compute = lambda check: time.sleep(6)
    link = worker.open(silence=5)  # this machine may stand still for 3 s
    assert_right(link)
    assert link.seconds_computing >= 6
    link.close()


def test_a_worker_that_lives_and_never_answers_is_lost_when_its_time_is_over(worker, monkeypatch):
    """It could say for ever that it still computes: the chat waited as long."""
    monkeypatch.setattr(link_module, "_REQUEST_S", 0.5)
    ended = threading.Event()
    worker.model.on_compute = lambda check: ended.wait(PATIENCE_S)
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
    wait_until(lambda: link.is_lost)  # libzmq's thread has to notice it
    with pytest.raises(ConnectionLostError):
        ask(link, 1, TOKEN, row())
    link.close()


@pytest.mark.parametrize("is_deferred", [False, True])
def test_ctrl_c_ends_the_wait_for_a_worker(worker, is_deferred):
    """Between layers signals are deferred: the wait looks for them by itself."""
    waits = threading.Event()

    def send_ctrl_c(check):
        waits.wait(PATIENCE_S)  # or the signal would come before the wait for the result
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        NeverEnding()(check)

    worker.model.on_compute = send_ctrl_c
    link = worker.open(silence=10 * PATIENCE_S)
    reached: list[str] = []

    def wait_in_a_layer():
        with interrupts.deferred() if is_deferred else nullcontext():
            link.start(1, TOKEN, row())
            waits.set()  # the signal comes a tenth of a second later
            link.finish()
            reached.append("the end of the wait")

    with pytest.raises(KeyboardInterrupt):
        wait_in_a_layer()
    assert reached == []
    assert link.is_lost  # the result must not meet the next request
