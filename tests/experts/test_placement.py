"""Slots from free bytes and budgets, and errors that name both numbers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.quantities import MemoryBudget
from mixchat.experts.placement import (
    Demand,
    DeviceRoom,
    Placement,
    SlotSizes,
    place_on_cpu,
    place_on_gpus,
)
from mixchat.experts.sharing import owner_counts

GB = 10**9
MIXTRAL = Demand(shared=3 * GB, context=GB, expert=GB // 10, experts=256, whole=256 * (GB // 10))


def budget(text: str | None) -> MemoryBudget | None:
    return None if text is None else MemoryBudget.parse(text)


def on_cpu(free: float, memory: str | None = None) -> Placement:
    return place_on_cpu(MIXTRAL, int(free * GB), budget(memory))


def on_gpu(
    free: float, free_host: float = 64, device: str | None = None, host: str | None = None
) -> Placement:
    room = DeviceRoom("the device", int(free * GB), budget(device))
    return place_on_gpus(MIXTRAL, [room], int(free_host * GB), budget(host))


@pytest.mark.parametrize(
    ("free", "slots"),
    [
        (64, 256),  # 58.4 GB for experts that take 25.6
        (29.8, 256),  # 29.8 - 3 shared - 1.192, four hundredths: just enough
        (29.7, 255),
        (16, 120),  # below 25 GB the reserve is 1 GB
        (4.35, 3),
        (4.2, 2),  # the least
    ],
)
def test_slots_on_a_cpu(free, slots):
    placement = on_cpu(free)
    assert (placement.slots, placement.host_slots, placement.experts) == (slots, 0, 256)


@pytest.mark.parametrize(
    ("free", "free_host", "slots", "host_slots"),
    [
        (40, 64, 256, 0),  # with all on the GPU, RAM has nothing to add
        (24, 64, 190, 256),  # 24 - 4 - 1
        (24, 16, 190, 150),  # 16 - 1
        (8, 1.4, 30, 4),
        (8, 1.399, 30, 0),  # three in RAM would help nothing
        (8, 0.5, 30, 0),  # less than the reserve
        (4.2, 16, 2, 150),
    ],
)
def test_slots_on_a_gpu(free, free_host, slots, host_slots):
    assert on_gpu(free, free_host) == Placement(slots, host_slots, 256)


def test_a_budget_on_a_cpu_is_bytes_of_experts_or_a_share_of_them():
    assert on_cpu(64, "1GB").slots == 10
    assert on_cpu(64, "1.09GB").slots == 10
    assert on_cpu(64, "50%").slots == 128
    assert on_cpu(64, "100%").slots == 256
    assert on_cpu(64, "1TB").slots == 256  # no more than there are
    assert on_cpu(64, "200MB").slots == 2


def test_a_budget_on_a_cpu_may_take_what_would_be_left_alone():
    assert on_cpu(29).slots == 248  # 29 - 3 - 1.16
    assert on_cpu(29, "25GB").slots == 250  # 29 - 3 - 1 of the context


def test_a_budget_on_a_gpu_is_for_all_that_is_there_and_leaves_nothing_beside_it():
    assert on_gpu(24, device="10GB").slots == 60  # 10 - 3 - 1
    assert on_gpu(24, device="50%").slots == 80  # of what is free: 12 - 4
    assert on_gpu(24, device="100%").slots == 200
    assert on_gpu(24, device="4.2GB").slots == 2
    assert on_gpu(64, device="60GB").slots == 256


def test_a_budget_for_ram_behind_a_gpu_is_bytes_of_experts_or_a_share_of_them():
    assert on_gpu(24, host="3GB").host_slots == 30
    assert on_gpu(24, host="50%").host_slots == 128
    assert on_gpu(24, host="1TB").host_slots == 256
    assert on_gpu(24, 2, host="2GB").host_slots == 20  # the whole of it
    assert on_gpu(24, 0, host="0").host_slots == 0


def test_too_small_a_budget_for_ram_behind_a_gpu_names_the_least():
    assert on_gpu(24, host="400MB").host_slots == 4
    said = r"--host-memory 399 MB is too small: four experts take 400\.0 MB$"
    with pytest.raises(UsageError, match=said):
        on_gpu(24, host="399MB")


@pytest.mark.parametrize(
    ("free", "memory", "reserve"),
    [
        (64, None, 2.56),  # four hundredths
        (16, None, 1),
        (64, "1GB", 2.56),
        (14, "10GB", 1),  # the room of the context, which is empty
        (29.0, "25GB", 1),
    ],
)
def test_the_reserve_is_what_is_left_beside_the_experts(free, memory, reserve):
    assert on_cpu(free, memory).reserve == int(reserve * GB)


def test_some_reserve_is_watched_where_a_budget_leaves_nothing():
    demand = replace(MIXTRAL, context=0)
    assert place_on_cpu(demand, 13 * GB, budget("9.4GB")).reserve == int(0.6 * GB)
    assert place_on_cpu(demand, 13 * GB, budget("10GB")).reserve == GB // 4


def test_too_small_a_budget_on_a_cpu_names_the_least():
    said = r"--host-memory 199 MB is too small: two experts take 200\.0 MB$"
    with pytest.raises(UsageError, match=said):
        on_cpu(64, "199MB")
    with pytest.raises(UsageError, match=said):
        on_cpu(64, "0.7774%")
    with pytest.raises(UsageError, match="--host-memory 0 bytes is too small"):
        on_cpu(64, "0")


def test_too_small_a_budget_on_a_gpu_names_the_least():
    said = r"4 GB is too small for the device: .* at least 4\.2 GB \(a full context of 1 GB in it\)"
    for device in ("4GB", "25%"):
        with pytest.raises(UsageError, match=said) as caught:
            on_gpu(16, device=device)
        assert caught.value.hint == "A smaller --ctx-size needs less."


def test_a_budget_beyond_what_is_free_is_refused_with_both_numbers():
    with pytest.raises(ResourceError, match=r"--host-memory asks for 8 GB, 6 GB are free"):
        on_cpu(10, "8GB")
    with pytest.raises(ResourceError, match=r"--device-memory asks for 8 GB, 6 GB are free"):
        on_gpu(6, device="8GB")
    with pytest.raises(ResourceError, match=r"--host-memory asks for 8 GB, 6 GB are free"):
        on_gpu(24, 6, host="8GB")
    with pytest.raises(ResourceError, match=r"--host-memory asks for 25\.6 GB, 6 GB are free"):
        on_gpu(24, 6, host="100%")


def test_a_model_beyond_the_machine_is_refused_with_both_numbers():
    said = r"at least 4\.2 GB \(a full context of 1 GB in it\), 4\.1 GB are free"
    for place in (on_cpu, on_gpu):
        with pytest.raises(ResourceError, match=said) as caught:
            place(4.1)
        assert "--ctx-size" in str(caught.value.hint)
    with pytest.raises(ResourceError, match=said):
        on_cpu(4.1, "1GB")
    with pytest.raises(ResourceError, match="0 bytes are free"):
        on_cpu(0)


def on_gpus(*free: float, free_host: float = 64, host: str | None = None) -> Placement:
    rooms = [DeviceRoom(f"cuda:{number}", int(gb * GB)) for number, gb in enumerate(free)]
    return place_on_gpus(MIXTRAL, rooms, int(free_host * GB), budget(host))


@pytest.mark.parametrize(
    ("free", "slots", "host_slots"),
    [
        ((24, 24), (128, 128), 0),  # 190 and 230 fit: all, half of them on each
        ((16, 16), (110, 146), 0),  # 16 - 4 - 1 and 16 - 1
        ((12, 12), (70, 110), 256),
        ((12, 12, 8), (70, 110, 70), 256),
        ((12, 1.1), (70, 0), 256),  # without room for two experts
        ((12, 1.2), (70, 2), 256),
        ((4.2, 12), (2, 110), 256),
    ],
)
def test_slots_on_several_gpus(free, slots, host_slots):
    first, *others = slots
    assert on_gpus(*free) == Placement(first, host_slots, 256, other_slots=tuple(others))


def test_a_budget_of_a_gpu_names_it_in_errors():
    room = DeviceRoom("cuda:0", 24 * GB)
    for text, error, said in [
        ("100MB", UsageError, "100 MB is too small for cuda:1: two experts take 200.0 MB"),
        ("0.1%", UsageError, "24 MB is too small for cuda:1"),
        ("30GB", ResourceError, "asks for 30 GB, 24 GB are free on cuda:1"),
    ]:
        with pytest.raises(error, match=said):
            place_on_gpus(MIXTRAL, [room, DeviceRoom("cuda:1", 24 * GB, budget(text))], GB, None)
    with pytest.raises(ResourceError, match="4 GB are free on cuda:0"):
        place_on_gpus(MIXTRAL, [DeviceRoom("cuda:0", 4 * GB), room], GB, None)


def test_a_gpu_s_part_of_ram_is_in_proportion_to_what_it_lacks():
    parts = Placement(60, 83, 256, other_slots=(30,)).parts([171, 85])
    assert [(part.slots, part.host_slots, part.experts) for part in parts] == [
        (60, 56, 171),
        (30, 27, 85),
    ]
    all_in_ram = Placement(60, 256, 256, other_slots=(30,)).parts([171, 85])
    assert [part.host_slots for part in all_in_ram] == [171, 85]
    assert Placement(60, 83, 256).parts([256]) == [Placement(60, 83, 256)]
    # Four slots are the least that help.
    few = Placement(60, 7, 256, other_slots=(30,)).parts([171, 85])
    assert [part.host_slots for part in few] == [7, 0]


@given(st.integers(2, 300), st.lists(st.integers(1, 90), min_size=1, max_size=4), st.data())
def test_parts_of_a_placement_are_the_whole_or_less(experts, slots, data):
    slots = list(map(min, slots, owner_counts(experts, slots)))
    host = data.draw(st.integers(0, experts)) if sum(slots) < experts else 0
    whole = Placement(slots[0], host, experts, other_slots=tuple(slots[1:]))
    parts = whole.parts(owner_counts(experts, slots))
    assert [part.slots for part in parts] == slots
    assert sum(part.experts for part in parts) == experts
    assert sum(part.host_slots for part in parts) <= host
    for part in parts:
        assert part.slots <= part.experts
        assert part.host_slots == 0 or 4 <= part.host_slots <= part.experts


budgets = (
    st.none()
    | st.builds(MemoryBudget, size=st.integers(0, 10**4))
    | st.builds(MemoryBudget, fraction=st.floats(0.001, 1))
)
mixed_demands = st.builds(
    lambda layers, each, **given: Demand(
        **given,
        expert=max(layers),
        experts=len(layers) * each,
        whole=sum(layers) * each,
        sizes=SlotSizes(tuple(layers)),
    ),
    layers=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    each=st.integers(2, 10),
    shared=st.integers(0, 500),
    context=st.integers(0, 500),
)
demands = st.builds(
    lambda part, expert, experts, **given: Demand(
        **given,
        expert=expert,
        experts=experts,
        whole=expert + round(part * (experts - 1) * expert),
    ),
    part=st.just(1.0) | st.floats(0.1, 1),  # of the largest, that the others have on average
    shared=st.integers(0, 500),
    context=st.integers(0, 500),
    expert=st.integers(1, 100),
    experts=st.integers(2, 64),
)


@given(demands | mixed_demands, st.integers(0, 10**4), st.integers(0, 10**4), budgets, budgets)
def test_what_is_placed_fits_and_what_is_refused_says_why(
    demand, free, free_host, memory, host_memory
):
    for on_device in (False, True):
        try:
            placement = (
                place_on_gpus(demand, [DeviceRoom("GPU", free, memory)], free_host, host_memory)
                if on_device
                else place_on_cpu(demand, free, memory)
            )
        except (ResourceError, UsageError):
            continue
        assert 2 <= placement.slots <= demand.experts
        slots = placement.slots
        taken = demand.taken(slots)
        if on_device and demand.sizes is None:
            taken = slots * demand.expert
        assert demand.shared + demand.context + taken <= free
        assert placement.host_slots == 0 or 4 <= placement.host_slots <= demand.experts
        assert placement.host_slots * demand.expert <= free_host
        assert placement.reserve > 0
        assert on_device or placement.host_slots == 0


def test_slots_of_several_sizes_hold_more_experts_than_slots_of_the_largest():
    """Of 32 layers of 8 experts, 8 have 70 MB an expert and 24 have 50."""
    mega, layers = 10**6, (70, 50, 50, 50) * 8
    sizes = SlotSizes(tuple(size * mega for size in layers))
    demand = Demand(0, 0, 70 * mega, 256, 8 * sum(layers) * mega, sizes)
    room = 10_000 * mega
    assert replace(demand, sizes=None).fitting(room) == 142
    assert demand.fitting(room) == 181
    assert demand.taken(181) <= room < demand.taken(182)
    assert demand.fitting(demand.whole) == 256
    # Three for each layer are the fewest.
    assert demand.fitting(demand.taken(96)) == 96
    assert demand.fitting(sizes.total(95)) == sizes.total(95) // (70 * mega) == 74


def test_a_layer_s_experts_have_slots_in_turn():
    sizes = SlotSizes((3, 3, 4))
    assert [sizes.of(slot) for slot in range(6)] == [3, 3, 4, 3, 3, 4]
    assert sizes.total(7) == 23
    assert sizes.for_slots(9, 20) == sizes.for_slots(6, 6) == sizes
    assert sizes.for_slots(8, 20) == SlotSizes((4,))


def test_ram_for_a_gpu_has_room_for_the_largest_expert_in_each_slot():
    """A budget was compared with the sum of all experts, and 5 bytes were to lock 8 of slots."""
    demand = Demand(shared=0, context=0, expert=2, experts=4, whole=5)
    with pytest.raises(ResourceError, match="asks for 8 bytes, 5 bytes are free"):
        place_on_gpus(demand, [DeviceRoom("GPU", 4)], 5, MemoryBudget(size=8))
