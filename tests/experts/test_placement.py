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

GB = 10**9
MIXTRAL = Demand(
    shared=3 * GB,
    context=GB,
    expert=GB // 10,
    experts=256,
    whole=256 * (GB // 10),
    layers=(GB // 10,) * 32,
)


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
    ("free", "memory", "slots"),
    [
        (64, None, 256),  # 58.4 GB for experts that take 25.6
        (29.8, None, 256),  # 29.8 - 3 shared - 1.192, four hundredths: just enough
        (29.7, None, 255),
        (16, None, 120),  # below 25 GB the reserve is 1 GB
        (4.35, None, 3),
        (4.2, None, 2),  # the least
        # A budget is bytes of experts, or a share of them.
        (64, "1GB", 10),
        (64, "1.09GB", 10),
        (64, "50%", 128),
        (64, "100%", 256),
        (64, "1TB", 256),  # no more than there are
        (64, "200MB", 2),
        # It may take what would be left alone.
        (29, None, 248),  # 29 - 3 - 1.16
        (29, "25GB", 250),  # 29 - 3 - 1 of the context
    ],
)
def test_slots_on_a_cpu(free, memory, slots):
    placement = on_cpu(free, memory)
    assert (placement.slots, placement.host_slots, placement.experts) == (slots, 0, 256)


@pytest.mark.parametrize(
    ("free", "options", "slots", "host_slots"),
    [
        (40, {}, 256, 2),  # with all on the GPU, RAM has nothing to add
        (30.84, {}, 256, 2),  # 30.84 - 4 - 1.2336: just enough without slots for guests
        (30.7, {}, 252, 256),
        (24, {}, 188, 256),  # 24 - 4 - 1, and two for guests
        (24, {"free_host": 16}, 188, 150),  # 16 - 1
        (8, {"free_host": 1.4}, 28, 4),
        (8, {"free_host": 0.5}, 28, 2),  # less than the reserve
        (5.3, {"free_host": 16}, 1, 150),
        (4.2, {"free_host": 16}, 0, 150),  # the least
        # A budget of a GPU is for all that is there, and leaves nothing beside it.
        (24, {"device": "10GB"}, 58, 256),  # 10 - 3 - 1, and two for guests
        (24, {"device": "50%"}, 78, 256),  # of what is free: 12 - 4
        (24, {"device": "100%"}, 198, 256),
        (24, {"device": "4.2GB"}, 0, 256),
        (64, {"device": "60GB"}, 256, 2),
        # A budget of RAM is bytes of experts, or a share of them.
        (24, {"host": "3GB"}, 188, 30),
        (24, {"host": "50%"}, 188, 128),
        (24, {"host": "1TB"}, 188, 256),
        (24, {"free_host": 2, "host": "2GB"}, 188, 20),  # the whole of it
        (24, {"host": "200MB"}, 188, 2),
        (40, {"host": "0"}, 256, 2),  # all are on the GPU
    ],
)
def test_slots_on_a_gpu_and_in_ram_behind_it(free, options, slots, host_slots):
    placement = on_gpu(free, **options)
    assert (placement.slots, placement.host_slots) == (slots, host_slots)
    assert (placement.experts, placement.layers) == (256, (32,))
    assert placement.held == min(slots + host_slots, 256)


def test_ram_without_room_for_two_experts_is_refused():
    with pytest.raises(ResourceError, match=r"at least 200\.0 MB, 199 MB are free$"):
        on_gpu(24, 0.199)


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


def test_too_small_a_budget_for_ram_names_the_least():
    said = r"--host-memory 199 MB is too small: two experts take 200\.0 MB$"
    with pytest.raises(UsageError, match=said):
        on_cpu(64, "199MB")
    with pytest.raises(UsageError, match=said):
        on_gpu(24, host="199MB")
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
    ("free", "layers", "slots", "host_slots"),
    [
        ((24, 24), (16, 16), (128, 128), 2),  # 16 - 2 - 1 each has room for all of its layers
        ((16, 16), (16, 16), (128, 128), 2),  # 16 - 2 - 1, for 12.8
        ((12, 12), (16, 16), (88, 88), 256),
        ((12, 12, 8), (12, 12, 8), (93, 93, 58), 256),
        ((24, 8), (25, 7), (196, 56), 256),  # 24 - 3.125 - 1, and two for guests; 7 - 0.875
        ((12, 1.1), (32, 0), (68, 0), 256),  # in proportion to 11 and 0.1
        ((12, 1.2), (31, 1), (69, 0), 256),  # 0.2 - 0.125 - 0.2: no room beside two guests
        ((12, 0.2), (32, 0), (68, 0), 256),
        ((0.2, 0.3, 12), (0, 0, 32), (0, 0, 68), 256),
        ((4.2, 12), (7, 25), (21, 76), 256),
    ],
)
def test_layers_and_slots_of_several_gpus(free, layers, slots, host_slots):
    placement = on_gpus(*free)
    assert placement.layers == layers
    assert placement.by_device == slots
    assert placement.host_slots == host_slots


def test_a_gpu_without_room_for_its_layers_and_two_experts_is_left_out():
    """A screen's GPU may have nothing free. Whoever names no budget gets what the others hold."""
    heavy = replace(MIXTRAL, shared=64 * GB)  # 2 GB a layer
    rooms = [DeviceRoom("cuda:0", 80 * GB), DeviceRoom("cuda:1", 4 * GB)]
    assert place_on_gpus(heavy, rooms, 64 * GB, None).layers == (31, 1)
    rooms = [DeviceRoom("cuda:0", 80 * GB), DeviceRoom("cuda:1", int(3.2 * GB))]
    assert place_on_gpus(heavy, rooms, 64 * GB, None).layers == (31, 1)
    heavy = replace(MIXTRAL, shared=96 * GB)
    rooms = [DeviceRoom("cuda:0", 110 * GB), DeviceRoom("cuda:1", int(3.2 * GB))]
    assert place_on_gpus(heavy, rooms, 64 * GB, None).layers == (32, 0)


def test_where_no_gpu_has_room_the_error_names_the_largest():
    for free in ((0.1, 0.9, 0.2), (1.01, 2.0)):
        with pytest.raises(ResourceError, match=r"not enough memory: .* on cuda:1"):
            on_gpus(*free)


def test_gpus_that_are_too_small_alone_hold_a_model_together():
    assert on_gpus(1.5, 4.1, 2.0).layers == (3, 22, 7)


def test_a_budget_of_a_gpu_names_it_in_errors():
    room = DeviceRoom("cuda:0", 24 * GB)
    for text, error, said in [
        ("1GB", UsageError, "1 GB is too small for cuda:1: the model needs at least"),
        ("4%", UsageError, "960 MB is too small for cuda:1"),
        ("30GB", ResourceError, "asks for 30 GB, 24 GB are free on cuda:1"),
    ]:
        rooms = [room, DeviceRoom("cuda:1", 24 * GB, budget(text))]
        with pytest.raises(error, match=said):
            place_on_gpus(replace(MIXTRAL, shared=64 * GB), rooms, GB, None)


def test_layers_without_experts_take_no_slots():
    """Qwen's and DeepSeek's first layers may be dense. A GPU has them, too."""
    dense = replace(MIXTRAL, layers=(0,) * 4 + (GB // 10,) * 32)
    rooms = [DeviceRoom(f"cuda:{number}", 32 * GB) for number in range(2)]
    placement = place_on_gpus(dense, rooms, 64 * GB, None)
    assert placement.layers == (18, 18)
    assert placement.by_device == (14 * 8, 18 * 8)
    assert placement.host_slots == 2


def test_a_workers_part_of_what_fits_takes_no_more_ram_than_its_experts():
    placement = on_gpu(24).at_most(100)
    assert (placement.slots, placement.host_slots) == (188, 100)
    assert on_gpu(24).at_most(1).host_slots == 2
    assert on_cpu(64).at_most(100).slots == 100
    assert on_gpu(24).in_ram() == Placement(256, 0, 256, on_gpu(24).reserve)


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
        layers=tuple(layers),
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


@given(demands | mixed_demands, st.integers(0, 10**4), budgets)
def test_what_is_placed_in_ram_fits_and_what_is_refused_says_why(demand, free, memory):
    try:
        placement = place_on_cpu(demand, free, memory)
    except (ResourceError, UsageError):
        return
    assert 2 <= placement.slots <= demand.experts
    assert demand.shared + demand.context + demand.taken(placement.slots) <= free
    assert placement.reserve > 0
    assert placement.host_slots == 0


@given(
    mixed_demands,
    st.lists(st.tuples(st.integers(0, 10**4), budgets), min_size=1, max_size=4),
    st.integers(0, 10**4),
    budgets,
    st.integers(0, 3),
)
def test_what_is_placed_on_gpus_fits(demand, free, free_host, host_memory, dense):
    demand = replace(demand, layers=(0,) * dense + demand.layers)
    rooms = [DeviceRoom(f"GPU {n}", size, memory) for n, (size, memory) in enumerate(free)]
    try:
        placement = place_on_gpus(demand, rooms, free_host, host_memory)
    except (ResourceError, UsageError):
        return
    assert sum(placement.layers) == len(demand.layers)
    end = 0
    for room, count, slots in zip(rooms, placement.layers, placement.by_device, strict=True):
        end += count
        part = demand.of_layers(end - count, end)
        assert 0 <= slots <= part.experts
        assert count or not slots
        if part.experts:
            assert part.sizes is not None
            guests = 0 if slots == part.experts else 2 * part.expert
            assert part.shared + part.context + part.sizes.total(slots) + guests <= room.free
    assert 2 <= placement.host_slots <= demand.experts
    if sum(placement.by_device) < demand.experts:
        assert demand.taken(placement.host_slots) <= free_host
    assert placement.reserve > 0


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


def test_experts_of_several_sizes_take_slots_of_a_gpu_in_turn():
    """Of two GPUs, one has the layers with the larger experts."""
    mega, layers = 10**6, (70,) * 16 + (50,) * 16
    demand = Demand(
        shared=0,
        context=0,
        expert=70 * mega,
        experts=256,
        whole=8 * sum(layers) * mega,
        layers=tuple(size * mega for size in layers),
    )
    rooms = [DeviceRoom(f"cuda:{number}", 5_000 * mega) for number in range(2)]
    placement = place_on_gpus(demand, rooms, 64 * GB, None)
    assert placement.layers == (16, 16)
    assert placement.by_device == (3_860 // 70, 3_900 // 50)
    (one,) = place_on_gpus(demand, [DeviceRoom("cuda:0", 5_000 * mega)], 64 * GB, None).by_device
    assert one == 64  # two for each layer take 3,840 of 3,860 MB
