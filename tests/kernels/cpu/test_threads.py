import ctypes
import threading

import pytest
import sentencepiece  # noqa: F401  # brings an OpenMP of its own into the process
from patience import PATIENCE_S

from mixchat.kernels.cpu import threads
from mixchat.kernels.cpu.threads import NativeFunction

torch = pytest.importorskip("torch")  # so does torch

CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Recorder:
    """A function with an address that notes which threads call it."""

    def __init__(self, count: int) -> None:
        self._all_there = threading.Barrier(count, timeout=PATIENCE_S)
        self.callers: list[int] = []
        self._callback = CALLBACK(self._called)
        address = ctypes.cast(self._callback, ctypes.c_void_p).value or 0
        self.function = NativeFunction(address, owner=self._callback)

    def _called(self, _: int) -> None:
        self._all_there.wait()  # so that no thread is called twice
        self.callers.append(threading.get_native_id())


@pytest.fixture(params=["OpenMP", "a pool"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "a pool":
        monkeypatch.setattr(threads, "_library", lambda: None)
    elif threads._library() is None:
        pytest.skip("no OpenMP library is loaded")


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_as_many_threads_as_asked_for_call_it_and_this_is_one(count) -> None:
    recorder = Recorder(count)
    recorder.function.run((ctypes.c_int64 * 1)(0), count)
    assert len(set(recorder.callers)) == len(recorder.callers) == count
    assert threading.get_native_id() in recorder.callers


def test_the_threads_are_those_of_torch():
    """A second OpenMP library in the process would have its own, and both would spin."""
    import torch

    if threads._library() is None:
        pytest.skip("no OpenMP library is loaded")
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(10**7).sum()
    before = _native_threads()
    recorder = Recorder(2)
    recorder.function.run((ctypes.c_int64 * 1)(0), 2)
    torch.set_num_threads(usual)
    assert set(recorder.callers) <= before


def _native_threads() -> set[int]:
    import os

    return {int(name) for name in os.listdir("/proc/self/task")}


def test_torch_has_one_thread_only_within_the_block() -> None:
    """Drawing a token took 2 ms longer, because each operation on logits woke another thread."""
    if threads._library() is None:
        pytest.skip("no OpenMP library is loaded")
    inside = []

    @threads.one_thread()
    def fails() -> None:
        inside.append(torch.get_num_threads())
        raise ZeroDivisionError

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ZeroDivisionError):
            fails()
        assert (inside, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)
