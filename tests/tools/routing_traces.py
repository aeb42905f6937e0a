"""Experts, uses of them and routing traces, for the tests of eviction policies."""

from hypothesis import strategies as st
from routing_simulation import Trace

from mixchat.experts.cache import ExpertKey, Policy

A, B, C, D = (ExpertKey(0, expert) for expert in range(4))
keys = st.sampled_from([A, B, C, D, ExpertKey(1, 0)])


def used(policy: Policy, *uses: ExpertKey) -> list[ExpertKey]:
    for key in uses:
        policy.use(key)
    return list(policy.victims())


def trace(*forwards: list[list[int]], experts: int = 4, choices: int = 2) -> Trace:
    return Trace("synthetic", len(forwards[0]), experts, choices, list(forwards))


@st.composite
def traces(draw: st.DrawFn, forwards: int, layers: int, tokens: int, experts: int = 4) -> Trace:
    def forward(count: int) -> list[list[int]]:
        pair = st.permutations(range(experts)).map(lambda order: list(order)[:2])
        return [[e for _ in range(count) for e in draw(pair)] for _ in range(depth)]

    depth = draw(st.integers(1, layers))
    lengths = draw(st.lists(st.integers(1, tokens), min_size=1, max_size=forwards))
    return trace(*(forward(count) for count in lengths), experts=experts)
