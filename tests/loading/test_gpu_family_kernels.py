"""The kernels of GPUs themselves compute each family in an engine, by Triton's interpreter."""

import os
from statistics import median

import pytest
from paper_tools import CONTEXT, Case, apart, load, logits
from test_gpus import FAMILIES

from mixchat.base.options import LoadOptions
from mixchat.loading.loader import load_engine

PASSES = ([5, 9, 33], [60], [2])


@pytest.mark.slow
@pytest.mark.skipif("MIXCHAT_TEST_GPU_FAMILIES" not in os.environ, reason="takes half an hour")
@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_compute_every_family(paper, make_checkpoint, install, family, kv_bits):
    """Inside an engine, they had been run for Mixtral alone."""
    checkpoint = make_checkpoint(model_type=family, std=0.05, stored_as="bfloat16")
    directory = install(checkpoint, quant_type="none", attention=16, head=16)
    options = LoadOptions(device="cpu", context_size=CONTEXT, kv_bits=kv_bits)
    on_cpu = load_engine(directory, options)
    case = Case(directory, on_cpu.blueprint, logits(on_cpu, PASSES))
    paper.interprets = True
    experts = case.blueprint.expert_count
    engine = load(case, experts // 2 + 2, experts, kv_bits=kv_bits)
    # In 16 bits, the choice between two experts may fall otherwise for one of the five tokens.
    pairs = zip(logits(engine, PASSES), case.expected, strict=True)
    assert median(apart(*pair) for pair in pairs) < 0.03
