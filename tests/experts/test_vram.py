"""Experts in the memory of a GPU on paper: their order on streams, failures, and memory."""

import gc
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress

import paper_gpu
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paper_runtime import Event, PaperRuntime
from vram_doubles import (
    GPU,
    KEYS,
    SIZE,
    STAGE,
    Memories,
    bytes_of,
    content,
    filled,
    quiet,
    settle,
    table_of,
    use,
)

from mixchat.base import interrupts
from mixchat.base.errors import ResourceError
from mixchat.experts import arena
from mixchat.experts import vram as vram_module
from mixchat.experts.cache import ExpertKey
from mixchat.experts.vram import VramTier

A, B, C, D = KEYS[:4]
E, F = KEYS[4:6]


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[PaperRuntime]:
    monkeypatch.setattr(vram_module, "_STAGE_BYTES", STAGE)
    with paper_gpu.in_place_of_cuda() as runtime:
        yield runtime


@pytest.fixture
def memories() -> Iterator[Memories]:
    memories = Memories()
    yield memories
    memories.go.set()


def exchange(vram: VramTier, key: ExpertKey) -> None:
    """Begin to bring an expert in the place of another one."""
    use(vram, key)
    vram.publish()
    assert set(vram._loads) == {key}


@pytest.mark.parametrize("in_ram", [False, True])
def test_experts_come_through_the_stages_from_ram_or_from_the_disk(paper, memories, in_ram):
    if in_ram:
        memories.in_ram = {key: bytes_of(key) for key in KEYS}
    vram = filled(memories)
    assert vram.keys == {A, B, E, F}
    assert all(torch.equal(content(vram, key), bytes_of(key)) for key in (A, B, E, F))
    assert memories.read_bytes == ({} if in_ram else dict.fromkeys((A, B, E, F), SIZE))
    assert memories.lent == []
    assert vram.stats.bytes_read == 4 * SIZE
    assert (vram.slots, vram.nbytes, vram.holds_all) == (4, 4 * SIZE, False)


def test_the_table_has_the_addresses_of_experts_that_have_arrived(paper, memories):
    vram = filled(memories)
    addresses = table_of(vram)
    for key in KEYS:
        there = vram.expert(key).data_ptr() if vram.holds(key) else 0
        assert addresses[key] == there
    assert len(set(addresses.flatten())) == 5


def test_the_table_changes_only_when_experts_are_published(paper, memories):
    vram = filled(memories)
    exchange(vram, C)
    without = table_of(vram)
    assert not vram.holds(C)
    assert sorted(vram.keys) in ([A, C, E, F], [A, B, C, E], [A, B, C, F])
    assert (without != 0).sum() == 3  # one has left already
    settle(vram)
    assert (table_of(vram) == without).all()
    assert not vram.holds(C)
    vram.publish()
    assert vram.holds(C)
    assert table_of(vram)[C] == vram.expert(C).data_ptr()
    assert torch.equal(content(vram, C), bytes_of(C))


def test_an_expert_that_left_and_came_back_elsewhere_is_found_where_it_is(paper, memories):
    vram = filled(memories, 2)
    assert vram.keys == {A, E}
    for key in (C, E, A, D, B, A):
        for count in range(200):
            if key in vram.keys:
                break
            use(vram, key, 50 + count)
            vram.publish()
            settle(vram)
        vram.publish()
        held = [each for each in KEYS if vram.holds(each)]
        assert key in held
        for each in held:
            assert torch.equal(content(vram, each), bytes_of(each))


def test_one_exchange_is_on_its_way_at_a_time(paper, memories):
    memories.held = {C}
    vram = filled(memories)
    exchange(vram, C)
    use(vram, D, 50)
    vram.publish()
    assert set(vram._loads) == {C}
    assert vram.is_filling
    memories.go.set()
    settle(vram)
    assert not vram.is_filling
    vram.publish()
    assert set(vram._loads) == {D}


@pytest.mark.parametrize("waits", [True, False])
def test_a_slot_is_written_once_the_kernels_that_read_it_have_ended(
    paper, memories, monkeypatch, waits
):
    """The paper GPU fails if a copy does not wait for the kernels of the expert that leaves."""
    vram = filled(memories)
    kept = [(vram.expert(key), key) for key in (A, B, E, F)]
    if not waits:
        monkeypatch.setattr(Event, "wait", lambda event, stream=None: None)
    outputs = [(expert ^ 0, key) for expert, key in kept]  # kernels that nobody waits for
    exchange(vram, C)
    settle(vram)
    load = vram._loads[C]
    assert load.failed != waits
    if not waits:
        with pytest.raises(RuntimeError, match="may still read"):
            vram.ready(C)
        return
    vram.publish()
    assert torch.equal(content(vram, C), bytes_of(C))
    for output, key in outputs:
        assert torch.equal(output.cpu(), bytes_of(key))


def test_a_read_that_fails_leaves_a_free_slot_and_is_not_tried_again(paper, memories):
    memories.bad = {B, C}
    vram = filled(memories, 7)
    settle(vram)
    vram.publish()
    settle(vram)
    vram.publish()
    # Of eight, two cannot be read.
    assert set(vram.keys) == set(KEYS) - {B, C}
    assert (table_of(vram) != 0).sum() == 6
    reads = dict(memories.read_bytes)
    for _ in range(5):
        use(vram, B)
        vram.publish()
        settle(vram)
    assert memories.read_bytes == reads
    assert all(torch.equal(content(vram, key), bytes_of(key)) for key in vram.keys)


def test_the_error_of_a_read_is_raised_where_the_expert_is_needed(paper, memories):
    memories.bad, memories.held = {E}, {A}
    vram = memories.slots(SIZE, SIZE)
    vram.fill_slots()
    assert vram.hurry(E)
    memories.go.set()
    with pytest.raises(OSError, match="says no"):
        vram.ready(E)
    assert not vram.hurry(E)
    assert vram.keys == {A}


def test_an_expert_that_is_needed_comes_before_the_others(paper, memories):
    memories.held = {A}
    vram = memories.slots(*[SIZE] * 8)
    vram.fill_slots()
    memories.reached.wait()
    assert vram.hurry(KEYS[7])
    assert not vram.holds(KEYS[7])
    memories.go.set()
    vram.ready(KEYS[7])
    assert torch.equal(content(vram, KEYS[7]), bytes_of(KEYS[7]))
    # A was on its way in all threads.
    assert list(memories.read_bytes)[:2] == [A, KEYS[7]]
    settle(vram)
    vram.publish()
    assert vram.holds_all
    assert not vram.hurry(KEYS[7])


def test_ctrl_c_while_an_expert_is_awaited_leaves_it_on_its_way(paper, memories, monkeypatch):
    memories.held = {A}
    vram = memories.slots(SIZE)
    vram.fill_slots()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(interrupts, "check", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vram.ready(A)
        with pytest.raises(KeyboardInterrupt), vram.invite([A]) as guests:
            deque(guests)
    memories.go.set()
    vram.ready(A)
    assert torch.equal(content(vram, A), bytes_of(A))


@pytest.mark.parametrize("in_ram", [False, True])
def test_guests_pass_through_two_slots_beside_the_experts_that_stay(paper, memories, in_ram):
    if in_ram:
        memories.in_ram = {key: bytes_of(key) for key in KEYS}
    vram = filled(memories, 2)
    brought = []
    with vram.invite(KEYS) as guests:
        for key, expert in guests:
            brought.append((key, expert ^ 0))
            assert len(memories.lent) <= 2
    assert [key for key, _ in brought] == KEYS
    assert all(torch.equal(output.cpu(), bytes_of(key)) for key, output in brought)
    assert len({output.device for _, output in brought}) == 1
    assert memories.lent == []
    assert vram.keys == {A, E}
    assert all(torch.equal(content(vram, key), bytes_of(key)) for key in (A, E))
    assert vram.stats.bytes_read == 10 * SIZE


def test_a_guests_slot_is_written_once_the_kernels_of_the_one_before_have_ended(
    paper, memories, monkeypatch
):
    vram = filled(memories, 2)
    monkeypatch.setattr(Event, "wait", lambda event, stream=None: None)
    with vram.invite(KEYS) as guests, pytest.raises(RuntimeError, match="may still read"):
        deque(expert ^ 0 for _, expert in guests)


def test_the_first_guests_do_not_wait_for_what_the_gpu_is_given_meanwhile(paper, memories):
    """They waited for all experts that the GPU held, so the bus rested while it computed."""
    vram = filled(memories, 2)
    resident, main = vram.expert(A), paper.current_stream(GPU)
    before = main.done
    with vram.invite([B, C]):
        for _ in range(10):
            resident ^ 0
        for load in vram._guests._loads.values():
            load._ended.wait()
        seen = vram._uploader._side.seen[main]
    assert main.done >= before + 10
    assert seen <= before + 2


def test_guests_that_nobody_waits_for_any_more_are_cancelled_and_given_back(paper, memories):
    """After Ctrl-C their blocks were pinned in RAM for good."""
    memories.in_ram = {key: bytes_of(key) for key in KEYS}
    vram = filled(memories, 2)
    with suppress(KeyboardInterrupt), vram.invite(KEYS) as guests:
        for _ in guests:
            raise KeyboardInterrupt
    assert memories.lent == []
    with vram.invite(KEYS[5:]) as guests:
        for key, expert in guests:
            assert torch.equal((expert ^ 0).cpu(), bytes_of(key))


def test_guests_that_were_cancelled_are_not_read(paper, memories):
    memories.held = {A}
    vram = memories.slots()
    with vram.invite([A, B]):
        memories.reached.wait()
    memories.go.set()
    with vram.invite([C]) as guests:
        assert len(list(guests)) == 1
    assert list(memories.read_bytes) == [A, C]


def test_a_guest_that_cannot_be_read_ends_the_prompt_alone(paper, memories):
    memories.bad = {C}
    vram = filled(memories, 2)
    with vram.invite([B, C, D]) as guests, pytest.raises(OSError, match="says no"):
        deque(guests)
    with vram.invite([D, B]) as guests:
        for key, expert in guests:
            assert torch.equal((expert ^ 0).cpu(), bytes_of(key))


def test_a_gpu_that_holds_all_makes_room_for_guests_once_it_gave_way(paper, memories):
    vram = filled(memories, 8)
    assert (vram.holds_all, vram._guests) == (True, None)
    assert vram.give_way()
    assert not vram.holds_all
    missing = [key for key in KEYS if not vram.holds(key)]
    with vram.invite(missing) as guests:
        assert [key for key, _ in guests] == missing


def test_an_eighth_of_the_slots_give_way_those_of_the_least_used_first(paper, memories):
    vram = filled(memories, 8)
    for number, key in enumerate(KEYS):
        use(vram, key, 10 + number)
    before = quiet(paper)
    for left in (7, 6, 5, 4, 3, 2, 1, 0):
        assert vram.give_way()
        assert paper.memory(GPU).taken == before - (8 - left) * SIZE
        assert set(vram.keys) == set(KEYS[8 - left :])
        assert (table_of(vram) != 0).sum() == vram.slots == left
    assert not vram.give_way()


def test_the_most_used_experts_of_a_piece_that_gives_way_move_to_other_pieces(
    paper, memories, monkeypatch
):
    monkeypatch.setattr(arena, "_LEAST_PIECES", 2)
    vram = filled(memories, 8)
    in_last = [key for key in KEYS if vram._cache.slot_of(key) in range(4, 8)]
    others = [key for key in KEYS if key not in in_last]
    for number, key in enumerate((in_last[0], others[0], in_last[1], others[1], *KEYS)):
        use(vram, key, 30 - number)
    kernels = [(vram.expert(key) ^ 0, key) for key in KEYS]  # that nobody waits for
    before = quiet(paper)
    assert vram.give_way()
    assert paper.memory(GPU).taken == before - 4 * SIZE
    assert set(vram.keys) == {*in_last[:2], *others[:2]}
    addresses = table_of(vram)
    for key in KEYS:
        is_there = key in vram.keys
        assert addresses[key] == (vram.expert(key).data_ptr() if is_there else 0)
        assert not is_there or torch.equal(content(vram, key), bytes_of(key))
    assert all(torch.equal(output.cpu(), bytes_of(key)) for output, key in kernels)
    vram.grow()
    settle(vram)
    vram.publish()
    assert set(vram.keys) == set(KEYS)
    assert all(torch.equal(content(vram, key), bytes_of(key)) for key in KEYS)


def test_slots_whose_experts_are_still_to_come_give_way(paper, memories):
    """In the first seconds nothing has arrived, and a GPU is as full as later."""
    memories.held = {A}
    memories.in_ram = {F: bytes_of(F)}
    vram = memories.slots(*[SIZE] * 8)
    vram.fill_slots()
    memories.reached.wait()
    before = quiet(paper)
    for _ in range(8):
        assert vram.give_way()
    assert not vram.give_way()
    assert memories.lent == []
    assert before - paper.memory(GPU).taken >= 7 * SIZE  # one is being written
    memories.go.set()
    while paper.memory(GPU).taken > before - 8 * SIZE:
        time.sleep(0.01)
    assert list(memories.read_bytes) == [A]
    vram.publish()
    assert not vram.keys


def test_slots_that_gave_way_come_back_as_far_as_memory_has_room(paper, memories):
    vram = memories.slots(*[SIZE] * 6, reserve=5 * SIZE)
    vram.fill_slots()
    settle(vram)
    vram.publish()
    memory = paper.memory(GPU)
    for _ in range(3):
        vram.give_way()
    assert vram.slots == 3
    memory.total = memory.allocator.reserved + 7 * SIZE + SIZE // 2
    vram.grow()
    assert vram.slots == 5
    settle(vram)
    vram.publish()
    assert all(torch.equal(content(vram, key), bytes_of(key)) for key in vram.keys)
    assert len(vram.keys) == 5
    memory.total = memory.taken
    vram.grow()
    assert vram.slots == 5
    paper.allocations, paper.fail_at = 0, 1
    memory.total = 10**9
    vram.grow()  # another program was faster
    assert vram.slots == 5
    vram.grow()
    assert vram.slots == 6


def test_experts_of_several_sizes_take_slots_of_their_size(paper):
    memories = Memories((SIZE, SIZE // 2))
    vram = memories.slots(SIZE, SIZE // 2, SIZE, SIZE // 2, SIZE)
    vram.fill_slots()
    settle(vram)
    vram.publish()
    assert vram.keys == {A, B, C, E, F}
    for key in (A, B, C, E, F):
        assert torch.equal(content(vram, key), bytes_of(key, memories.sizes[key.layer]))
    with vram.invite([D, KEYS[6], KEYS[7]]) as guests:
        for key, expert in guests:
            assert torch.equal((expert ^ 0).cpu(), bytes_of(key, memories.sizes[key.layer]))


def test_page_locked_ram_is_four_stages_in_all_and_unlocked_in_the_end(paper, memories):
    """The lock hung on a tensor of which only views were kept, so it went at once."""
    quiet(paper)
    before = dict(paper.locked)
    vram = filled(memories)
    assert vram_module._STAGES * STAGE == 256
    assert sum(size for at, size in paper.locked.items() if at not in before) == 256
    with vram.invite(KEYS) as guests:
        for _ in guests:
            pass
    assert len(paper.locked) == len(before) + 1
    del guests
    vram.close()
    del vram
    quiet(paper)
    assert paper.locked == before


def test_stages_have_32_mb():
    assert vram_module._STAGES * vram_module._STAGE_BYTES == 32 << 20


def test_ram_that_cannot_be_page_locked_is_slower_and_no_fault(paper, memories):
    """CUDA reports the refusal again at the next kernel."""
    paper.refuses_locks = True
    vram = filled(memories)
    assert all(torch.equal(content(vram, key), bytes_of(key)) for key in vram.keys)


def test_closing_frees_the_memory_although_experts_are_on_their_way(paper, memories):
    """Loads that waited for their turn held their slots until the thread came to them."""
    memories.held = {A}
    before = quiet(paper)
    vram = memories.slots(*[SIZE] * 7)
    vram.fill_slots()
    memories.reached.wait()
    assert paper.memory(GPU).taken >= before + 9 * SIZE
    vram.close()
    gc.collect()
    table = vram.table.nbytes
    assert paper.memory(GPU).taken <= before + SIZE + table
    memories.go.set()
    while paper.memory(GPU).taken > before + table:
        time.sleep(0.01)
    assert list(memories.read_bytes) == [A]


def test_without_a_thread_nothing_comes_and_nobody_waits(paper, memories, monkeypatch):
    vram = memories.slots(SIZE, SIZE)

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        vram.fill_slots()
        vram.publish()
        with pytest.raises(ResourceError, match="thread"), vram.invite([C]):
            pass
    settle(vram)
    vram.publish()
    settle(vram)
    vram.publish()
    for key in vram.keys:
        if vram.holds(key):
            assert torch.equal(content(vram, key), bytes_of(key))


steps = st.one_of(
    st.tuples(st.just("tokens"), st.sampled_from(KEYS), st.integers(1, 30)),
    st.tuples(st.just("publish")),
    st.tuples(st.just("settle")),
    st.tuples(st.just("prompt"), st.lists(st.sampled_from(KEYS), unique=True)),
    st.tuples(st.just("interrupt"), st.lists(st.sampled_from(KEYS), unique=True)),
    st.tuples(st.just("give way")),
    st.tuples(st.just("grow")),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 8),
    st.sampled_from([1, 3, 8]),
    st.sets(st.sampled_from(KEYS)),
    st.lists(steps, max_size=25),
)
def test_kernels_read_whole_experts_whatever_comes_and_goes(
    paper, monkeypatch, slots, pieces, in_ram, events
):
    """The paper GPU checks the order of streams beside that."""
    monkeypatch.setattr(arena, "_LEAST_PIECES", pieces)
    memories = Memories()
    memories.in_ram = {key: bytes_of(key) for key in in_ram}
    vram, outputs = memories.slots(*[SIZE] * slots), list[tuple[ExpertKey, torch.Tensor]]()

    def compute(keys: Iterable[ExpertKey]) -> None:
        addresses = vram.table.inner.clone()  # type: ignore[attr-defined]
        for key in KEYS:
            assert bool(addresses[key]) == vram.holds(key)
        outputs.extend((key, vram.expert(key) ^ 0) for key in keys if vram.holds(key))

    vram.fill_slots()
    for what, *arguments in events:
        match what, *arguments:
            case "tokens", key, count:
                use(vram, key, count)
            case "publish", *_:
                vram.publish()
            case "settle", *_:
                settle(vram)
            case "prompt" | "interrupt", keys:
                arriving = [key for key in keys if vram.hurry(key)]
                missing = [key for key in keys if not vram.holds(key) and key not in arriving]
                with vram.invite(missing) as guests:
                    compute(keys)
                    for key in arriving:
                        vram.ready(key)
                    for key, expert in guests:
                        outputs.append((key, expert ^ 0))
                        if what == "interrupt":
                            break
            case "give way", *_:
                vram.give_way()
            case "grow", *_:
                vram.grow()
        compute(KEYS)
    settle(vram)
    assert not any(load.failed for load in vram._loads.values())
    vram.publish()
    settle(vram)
    vram.publish()
    compute(KEYS)
    assert all(torch.equal(output.cpu(), bytes_of(key)) for key, output in outputs)
    assert set(memories.lent) <= set(vram._loads)
    vram.close()


def test_what_has_slots_is_told_to_have_changed(paper, memories):
    vram = filled(memories)
    before = vram.changes
    vram.publish()
    assert vram.changes == before
    exchange(vram, C)
    assert vram.changes != before
    before = vram.changes
    settle(vram)
    vram.publish()  # it has arrived, and had its slot before
    assert vram.changes == before
    vram.give_way()
    assert vram.changes != before
