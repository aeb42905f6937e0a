"""Naive models of the queue of loads and of the tier of experts in RAM."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from mixchat.experts.cache import ExpertKey
from mixchat.experts.load_queue import FILL, PREDICTED, REQUESTED, ExpertLoad
from mixchat.experts.placement import MIN_SLOTS
from mixchat.experts.tier import LOADING, MISSING, RESIDENT

PIECES, SIZE = 2, 128  # of an expert, and its bytes


@dataclass(eq=False)
class NaiveLoad:
    key: ExpertKey
    priority: int = REQUESTED
    pieces: int = PIECES
    begun: int = 0  # pieces
    fault: str | None = None  # "begin" or "finish" fails
    cancelled: bool = False
    ended: bool = False
    failed: bool = False


class NaiveQueue:
    """Loads with one thread: a list of entries that is sorted each time, and the piece in flight.

    An entry counts while the load has the priority that it was made with. may_fill: whether fills
    may begin. moved: the experts that have arrived.
    """

    def __init__(self) -> None:
        self.in_flight: NaiveLoad | None = None
        self.may_fill = True
        self.moved = 0
        self._entries: list[tuple[int, int, int, NaiveLoad]] = []
        self._arrivals = count(1)

    def put(self, load: NaiveLoad, priority: int) -> None:
        load.priority = priority
        layer = load.key.layer if priority == PREDICTED else 0
        order = next(self._arrivals)
        is_in_hand = 0 < load.begun < load.pieces
        self._entries.append((priority, layer, -order if is_in_hand else order, load))

    def choose(self) -> None:
        """Begin the most urgent piece if none is in flight."""
        while self.in_flight is None and self._entries:
            self._entries.sort(key=lambda entry: entry[:3])
            priority, _, _, load = self._entries[0]
            is_over = load.ended or load.cancelled or load.begun == load.pieces
            if is_over or priority != load.priority:
                self._entries.pop(0)
            elif not load.begun and self._cannot_begin(load):
                load.ended = load.failed = True
            else:
                load.begun += 1
                self.in_flight = load

    def _cannot_begin(self, load: NaiveLoad) -> bool:
        return load.fault == "begin" or (load.priority == FILL and not self.may_fill)

    def step(self, *, fails: bool) -> None:
        """End the piece in flight, and begin the next one."""
        load, self.in_flight = self.in_flight, None
        assert load is not None
        if fails:
            load.ended = load.failed = True
        elif load.begun == load.pieces and not load.cancelled:
            load.ended = True
            load.failed = load.fault == "finish"
            self.moved += not load.failed
        self.choose()


class NaiveTier:
    """What the tier in RAM holds: a list, the most recently used expert last, and loads by key.

    experts: of the model. watched: the limit that memory sets. readers: loads of the tier in front.
    """

    def __init__(self, slots: int, experts: Sequence[ExpertKey]) -> None:
        self.slots = self.limit = self.watched = slots
        self.experts, self.queue = experts, NaiveQueue()
        self.recent: list[ExpertKey] = []
        self.loads: dict[ExpertKey, NaiveLoad] = {}
        self.fills: dict[ExpertKey, NaiveLoad] = {}
        self.elsewhere: frozenset[ExpertKey] = frozenset()
        self.readers: list[ExpertLoad] = []
        self.noted: list[ExpertKey] = []
        self.hits, self.misses = Counter[ExpertKey](), Counter[ExpertKey]()
        self.predictions = self.right_predictions = self.late_predictions = 0

    @property
    def borrowed(self) -> set[ExpertKey]:
        return {load.key for load in self.readers if not (load.ended or load.cancelled)}

    def state(self, key: ExpertKey) -> int:
        if key not in self.recent:
            return MISSING
        fill = self.fills.get(key)
        is_coming = key in self.loads or (fill is not None and (fill.failed or not fill.ended))
        return LOADING if is_coming else RESIDENT

    def is_filling(self) -> bool:
        """Return whether fills are on their way. The first ones that have ended are fills no more.

        If one has failed, its expert is missing from then on.
        """
        for key, load in list(self.fills.items()):
            if not load.ended:
                return True
            self.forget_failed(key)
            self.fills.pop(key, None)
        return False

    def holds_all(self) -> bool:
        is_busy = self.is_filling() or bool(self.loads)
        return not is_busy and {*self.experts} - self.elsewhere <= {*self.recent}

    def count_hits(self) -> None:
        for key in self.noted:
            self.hits[key] += 1
            if key in self.recent:
                self.use(key)
        self.noted = []

    def use(self, key: ExpertKey) -> None:
        self.recent.remove(key)
        self.recent.append(key)

    def fill(self, keys: Iterable[ExpertKey]) -> None:
        missing = [key for key in keys if key not in {*self.recent, *self.elsewhere}]
        if len(self.recent) + len(missing) <= self.limit:
            self.count_hits()
            for key in missing:
                self.recent.append(key)
                self.fills[key] = NaiveLoad(key)
                self.queue.put(self.fills[key], FILL)

    def request(self, keys: Sequence[ExpertKey], pinned: Collection[ExpertKey] = ()) -> int:
        for number, key in enumerate(keys):
            if not self.hurry(key, REQUESTED):
                self.forget_failed(key)
                if key in self.recent:
                    continue
                if not self.start(key, REQUESTED, {*keys, *pinned}):
                    return number
            self.misses[key] += 1
        return len(keys)

    def prefetch(
        self, keys: Iterable[ExpertKey], pinned: Collection[ExpertKey], *, certain: bool
    ) -> None:
        room = max(self.limit // 4 if certain else self.limit // 16, 1) - len(self.prefetches())
        for key in keys:
            is_new = key not in self.recent
            if key in self.elsewhere or not (is_new or key in self.fills):
                continue
            if room <= 0 or (is_new and not self.start(key, PREDICTED, pinned)):
                return
            if is_new or self.hurry(key, PREDICTED):
                self.predictions += 1
                room -= 1

    def settle(self, layer: int, chosen: Collection[ExpertKey]) -> None:
        self.count_hits()
        self.follow_memory()
        for key, load in list(self.loads.items()):
            if key.layer != layer:
                continue
            if load.priority == PREDICTED:
                if key in chosen:
                    self.queue.put(load, REQUESTED)
                    self.right_predictions += 1
                    self.late_predictions += not load.ended
                    self.misses[key] += not load.ended
                elif not load.ended and self.limit >= len(self.experts):
                    self.fills[key] = self.loads.pop(key)
                    self.queue.put(load, FILL)
                    continue
                elif not load.ended:
                    load.cancelled = True
            if load.cancelled or load.failed:
                self.recent.remove(key)
            if load.cancelled or load.ended:
                del self.loads[key]

    def ready(self, key: ExpertKey) -> bool:
        """Return whether an expert that has been requested has come without an error."""
        load = self.loads.pop(key, None)
        if load is not None and load.failed:
            self.recent.remove(key)
            return False
        self.hits[key] += load is None
        self.use(key)
        return True

    def follow_memory(self) -> None:
        limit = max(self.watched, len(self.borrowed) + MIN_SLOTS)
        self.is_filling()
        if limit == self.limit:
            return
        self.count_hits()
        while self.is_filling():
            key = next(iter(self.fills))
            self.fills.pop(key).cancelled = True
            self.recent.remove(key)
        self.limit = limit
        pinned = {*self.loads, *self.borrowed}
        surplus = max(len(self.recent) - limit, 0)
        for key in [key for key in self.recent if key not in pinned][:surplus]:
            self.recent.remove(key)

    def may_lend(self, key: ExpertKey) -> bool:
        return self.state(key) == RESIDENT and self.limit - len(self.borrowed) - 1 >= MIN_SLOTS

    def prefetches(self) -> set[ExpertKey]:
        return {key for key, load in self.loads.items() if load.priority == PREDICTED}

    def hurry(self, key: ExpertKey, priority: int) -> bool:
        """Carry out an expert's fill with this priority. Return False if none is on its way."""
        load = self.fills.get(key)
        if load is None:
            return False
        self.queue.put(load, priority)
        if not load.ended:
            self.loads[key] = self.fills.pop(key)
        return not load.ended

    def forget_failed(self, key: ExpertKey) -> None:
        for loads in (self.loads, self.fills):
            if key in loads and loads[key].failed:
                del loads[key]
                self.recent.remove(key)

    def start(self, key: ExpertKey, priority: int, pinned: Collection[ExpertKey]) -> bool:
        """Begin a load in a free slot, or in that of the expert that was used longest ago."""
        self.count_hits()
        kept = {*pinned, *self.borrowed}
        has_slot = self.admit(key, kept | self.prefetches())
        if priority == REQUESTED:
            has_slot = has_slot or self.admit(key, kept)
        for loads in (self.loads, self.fills):
            for evicted in loads.keys() - self.recent:
                loads.pop(evicted).cancelled = True
        if has_slot:
            self.loads[key] = NaiveLoad(key)
            self.queue.put(self.loads[key], priority)
        return has_slot

    def admit(self, key: ExpertKey, pinned: Collection[ExpertKey]) -> bool:
        while len(self.recent) >= self.limit:
            victims = [other for other in self.recent if other not in pinned]
            if not victims:
                return False
            self.recent.remove(victims[0])
        self.recent.append(key)
        return True
