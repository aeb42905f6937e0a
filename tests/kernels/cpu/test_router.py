"""The choice of experts, against transformers' routers and a slow one in double precision."""

from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from mixchat.kernels.cpu.compile import instruction_set
from mixchat.kernels.cpu.router import Router

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="kernels need AVX2")


def slowly(x: torch.Tensor, router: Router) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose by sorting (-logit, number) in Python. Returns experts and weights in fp64."""
    logits = x.double() @ router.gate.double().T
    if router.bias is not None:
        logits += router.bias.double()
    scores = logits.sigmoid() if router.scoring == "sigmoid" else logits.softmax(-1)
    ranks = logits if router.correction is None else scores + router.correction.double()
    chosen = torch.tensor(
        [
            sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[: router.choices]
            for row in ranks.tolist()
        ]
    )
    best = scores.gather(1, chosen)
    total = best.sum(-1, keepdim=True) if router.normalized else 1
    scales = 1 if router.scales is None else router.scales[chosen].double()
    return chosen, best / total * router.scaling * scales


# Tokens, experts and choices.
SHAPES = [(1, 8, 2), (3, 16, 3), (300, 8, 8), (5, 128, 8), (2, 160, 10), (4, 64, 1), (1, 2000, 6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("columns", [576, 60])  # 60 are left to torch
def test_the_experts_are_those_of_the_largest_scores_and_the_weights_are_these_scores(
    dtype, scoring, columns
):
    flags = product((True, False), repeat=3)
    for (tokens, experts, choices), (normalized, biased, corrected) in product(SHAPES, flags):
        x, gate = torch.randn(tokens, columns).to(dtype), torch.randn(experts, columns) * 0.1
        bias = torch.randn(experts) if biased else None
        correction = torch.randn(experts) * 0.1 if corrected else None
        scaling = 2.5 if corrected else 1.0
        scales = torch.rand(experts) + 0.5 if biased else None
        router = Router(
            gate, choices, normalized, bias, scoring, correction, scaling, scales=scales
        )
        expected, scores = slowly(x, router)
        selected, weights = router(x)
        assert (selected.dtype, weights.dtype) == (torch.int64, torch.float32)
        assert torch.equal(selected, expected)
        assert (weights - scores).abs().max() < 1e-5


def transformers_router(kind: str, experts: int, choices: int, normalized: bool) -> Any:
    """Return a random router of transformers for 96 columns."""
    modules = import_module(f"transformers.models.{kind}.modeling_{kind}")
    name = next(name for name in vars(modules) if name.lower().endswith("topkrouter"))
    config = AutoConfig.for_model(kind, hidden_size=96)
    config.num_experts = config.num_local_experts = experts
    config.num_experts_per_tok, config.routed_scaling_factor = choices, 2.5
    config.norm_topk_prob = normalized
    config.moe_router_logit_softcapping = 0.2
    router = getattr(modules, name)(config)
    for parameter in (*router.parameters(), *router.buffers()):
        torch.nn.init.normal_(parameter, std=0.3)
    return router


@pytest.mark.parametrize(
    ("kind", "normalized"),
    [
        ("mixtral", True),
        ("qwen3_moe", True),
        ("qwen3_moe", False),
        ("olmoe", False),
        ("mellum", True),
        ("granitemoe", True),
        ("gpt_oss", True),
        ("qwen2_moe", False),
        ("ernie4_5_moe", True),
        ("dots1", True),
        ("dots1", False),
        ("glm4_moe", True),
        ("laguna", True),
    ],
)
def test_each_family_is_routed_as_transformers_routes_it(kind, normalized):
    for experts, choices in ((3, 1), (8, 4), (160, 10)):
        theirs = transformers_router(kind, experts, choices, normalized)
        router = Router(
            theirs.weight.detach(),
            choices,
            normalized,
            theirs.bias.detach() if kind == "gpt_oss" else None,
            "sigmoid" if hasattr(theirs, "e_score_correction_bias") else "softmax",
            correction_of(theirs),
            getattr(theirs, "routed_scaling_factor", 1.0),
            cap=getattr(theirs, "router_logit_softcapping", None),
        )
        x = torch.randn(9, 96)
        selected, weights = router(x)
        _, expected_weights, expected = theirs(x)
        # Routers with groups give no order.
        expected, places = expected.sort(dim=-1)
        selected, own = selected.sort(dim=-1)
        assert torch.equal(selected, expected)
        assert (weights.gather(1, own) - expected_weights.gather(1, places)).abs().max() < 1e-6


def correction_of(router: Any) -> torch.Tensor | None:
    """Return what a router of transformers adds to its scores [E], if it does."""
    found = getattr(getattr(router, "moe_statics", router), "e_score_correction_bias", None)
    return None if found is None else found.detach().flatten()


@settings(max_examples=100)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**31), st.booleans(), st.data())
def test_the_kernel_and_torch_choose_the_same_of_equal_logits(
    experts, values, seed, normalized, data
):
    """Logits of few different values, for which torch's topk promises no order."""
    choices = data.draw(st.integers(1, min(experts, 10)))
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(3, 64)
    x[:, 0] = 1
    gate = torch.zeros(experts, 64)
    gate[:, 0] = torch.randint(values, (experts,), generator=generator).float()
    router = Router(gate, choices, normalized)
    expected, softmax = slowly(x, router)
    for selected, weights in (router(x), router._by_torch(x)):
        assert torch.equal(selected, expected)
        assert (weights - softmax).abs().max() < 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_expert_is_chosen_twice_where_logits_are_no_numbers(value):
    for scaling in (1.0, 2.0):
        router = Router(torch.ones(4, 64), 3, scaling=scaling)
        selected, weights = router(torch.full((1, 64), value))
        assert sorted(selected[0].tolist()) == [0, 1, 2]
        assert weights.isnan().all()


@pytest.mark.parametrize(("scoring", "scaling"), [("softmax", 1.0), ("sigmoid", 2.0)])
def test_a_damaged_gate_does_not_pass_unseen(scoring, scaling):
    """As with torch: what is no number is chosen first, and gets into the result."""
    gate = torch.randn(4, 64)
    gate[2] = torch.nan
    selected, weights = Router(gate, 2, scoring=scoring, scaling=scaling)(torch.randn(1, 64))
    assert selected[0, 0] == 2
    assert weights.isnan().any()


def test_an_expert_that_cannot_be_chosen_has_no_weight():
    gate = torch.tensor([1.0, 2.0, -torch.inf])[:, None].repeat(1, 64)
    selected, weights = Router(gate, 3)(torch.full((1, 64), 0.01))
    assert selected.tolist() == [[1, 0, 2]]
    assert weights[0, 2] == 0
    assert weights.sum() == pytest.approx(1)
