"""Compares logits with transformers and llama.cpp, and texts of one model byte for byte.

    pytest -q -s -p no:randomly tests/benchmarks/exactness.py [-k gemma4]
    MIXCHAT_TEST_LLAMA=PYTHON pytest ... -k llama_cpp

It takes the tiny models of `tests/engine/test_families.py`, and some of odd shapes. Each row of the
first table has the largest error of the logits of a prompt of 1, 7, 300 and 1,500 tokens, divided
by the largest logit, over three seeds and three ways to compute it: in one piece, in pieces of 128,
and token by token. Its last column counts the texts that end early, because a router chose another
expert than transformers' router, whose weights were equal but for the rounding. The second table
counts the answers, each with the logits after it, that are the same with few experts in memory, in
company, and after a text that begins alike.

With a PYTHON that has llama-cpp-python, the third table has the largest errors of a model in GGUF,
in fp32, for a prompt of 60 tokens: llama.cpp's and mixchat's, beside transformers with the original
checkpoint. `tests/tools/gguf_files.py` writes the file, so llama.cpp proves that it is one as
others write it. llama.cpp has a table of 16 bits for the GELU of Gemma 4.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from operator import eq
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from engine_tools import FAMILIES, answer, logits
from test_families import CASES, SPARSE

from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.base.progress import NoProgress
from mixchat.base.quantities import MemoryBudget
from mixchat.engine.answer import TokenAnswer
from mixchat.engine.generate import Engine
from mixchat.engine.passes import SequenceTokens
from mixchat.experts.recording_runner import RecordingRunner
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.source.open_checkpoint import open_checkpoint
from mixchat.loading.loader import load_engine
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.manifest import Source

PROMPTS, SEEDS = (1, 7, 300, 1500), 3
LONGEST = PROMPTS[-1]
MAX_ERROR = 2e-4  # of the largest logit
MAX_PARTED = 0.3  # of the texts. A wrong router parts all of them at their beginning.
ODD_HEADS = {"num_attention_heads": 5, "num_key_value_heads": 5}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **CASES,
    "gemma4, windows of 33": ("gemma4", {"sliding_window": 33, "num_attention_heads": 6}),
    "gemma4, windows of 64": ("gemma4", {"sliding_window": 64, **SPARSE}),
    "lfm2_moe, odd heads": ("lfm2_moe", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "qwen3_next, odd heads": ("qwen3_next", {"num_attention_heads": 3, "num_key_value_heads": 1}),
    "deepseek_v2, odd heads": ("deepseek_v2", {"hidden_size": 80, **ODD_HEADS}),
    "deepseek_v3, odd heads": ("deepseek_v3", {**ODD_HEADS, **SPARSE}),
    "mistral4, odd heads": ("mistral4", {**ODD_HEADS, **SPARSE}),
}


def ids_of(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (count,), generator=generator).tolist()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_logits(name: str, make_checkpoint: Callable[..., Path], install: Callable[..., Path]):
    model_type, changes = SHAPES[name]
    changes = {"num_key_value_heads": 2, "max_position_embeddings": 2048} | changes
    worst, parted, total = dict.fromkeys(PROMPTS, 0.0), 0, 0
    for seed in range(SEEDS):
        checkpoint = make_checkpoint(model_type=model_type, seed=seed, **changes)
        model = Ours(install(checkpoint, quant_type="none"))
        oracle, ids = Oracle(checkpoint), torch.tensor(ids_of(LONGEST, seed))
        one_by_one = model.read(ids, 1)
        for tokens in PROMPTS:
            expected, chosen = oracle.read(ids[:tokens])
            for numbers, experts in (
                model.read(ids[:tokens], tokens),
                model.read(ids[:tokens], 128),
                tuple(every[:tokens] for every in one_by_one),
            ):
                is_other = (experts != chosen).any(1)
                parted, total = parted + int(is_other.any()), total + 1
                # Later tokens know of the one that other experts have computed.
                until = int(is_other.int().argmax()) if is_other.any() else tokens
                error = (numbers - expected)[:until].abs().amax() if until else torch.zeros(())
                worst[tokens] = max(worst[tokens], float(error / expected.abs().max()))
        model.engine.close()
    errors = " | ".join(f"{error:.1e}" for error in worst.values())
    print(f"\n| {name} | {errors} | {parted} of {total} |", flush=True)
    assert max(worst.values()) < MAX_ERROR
    assert parted <= MAX_PARTED * total


class Ours:
    """A model of mixchat that tells which experts it has chosen."""

    def __init__(self, directory: Path) -> None:
        self._chosen: list[torch.Tensor] = []
        self.engine = load_engine(
            directory,
            LoadOptions(device="cpu"),
            wrap=lambda runner: RecordingRunner(
                runner, lambda layer, rows, experts: self._chosen.append(experts.sort().values)
            ),
        )

    def read(self, ids: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [T, vocabulary] and the experts [T, layers * choices] of a prompt."""
        self._chosen.clear()
        result = logits(self.engine, ids, chunk)
        layers = self.engine.config.num_moe_layers
        parts = [torch.cat(self._chosen[layer::layers]) for layer in range(layers)]
        return result, torch.cat(parts, dim=1)


class Oracle:
    """The same model of transformers."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._chosen: list[torch.Tensor] = []
        self._model = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        ).eval()
        for module in self._model.modules():
            if type(module).__name__.endswith("Experts"):
                module.register_forward_pre_hook(self._note_choices, with_kwargs=True)

    def _note_choices(self, module: torch.nn.Module, inputs: Any, options: Any) -> None:
        choices = inputs[1] if len(inputs) > 1 else options["router_indices"]
        self._chosen.append(choices.sort().values)

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `Ours.read` returns."""
        self._chosen.clear()
        return self._model(ids[None]).logits[0], torch.cat(self._chosen, dim=1)


LLAMA = os.environ.get("MIXCHAT_TEST_LLAMA")
# llama.cpp runs these families in some shapes alone. It has no limits of OLMoE's heads, and no
# scale of LFM2's experts. It rounds the limits of gpt-oss' rope, which the original does not.
YARN = {"rope_type": "yarn", "rope_theta": 1.5e5, "original_max_position_embeddings": 32}
IN_LLAMA_CPP: dict[str, dict[str, Any]] = {
    "olmoe": {"num_key_value_heads": 4, "clip_qkv": None},
    "dots1": {"num_key_value_heads": 4},
    "granitemoehybrid": {"mamba_expand": 2, "mamba_n_heads": 4, "mamba_n_groups": 2},
    "qwen3_next": {"linear_value_head_dim": 32},
    "qwen3_5_moe": {"linear_value_head_dim": 32},
    "lfm2_moe": {"routed_scaling_factor": 1.0},
    "gpt_oss": {"rope_parameters": {**YARN, "factor": 4.0, "truncate": True}},
}
IN_GGUF: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, IN_LLAMA_CPP.get(family, {})) for family in gguf_files.ARCHITECTURES},
    "granitemoehybrid, rope": (
        "granitemoehybrid",
        {**IN_LLAMA_CPP["granitemoehybrid"], "position_embedding_type": "rope"},
    ),
    "dots1, weights not normalized": (
        "dots1",
        {**IN_LLAMA_CPP["dots1"], "norm_topk_prob": False},
    ),
    "deepseek_v3, groups": (
        "deepseek_v3",
        {"num_local_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    ),
    "qwen3_moe, yarn": ("qwen3_moe", {"rope_parameters": {**YARN, "factor": 4.0}}),
    "glm4_moe, no norms": (
        "glm4_moe",
        {"use_qk_norm": False, "attention_bias": False, "head_dim": 16},
    ),
}


@pytest.mark.skipif(LLAMA is None, reason="MIXCHAT_TEST_LLAMA names no Python")
@pytest.mark.parametrize("name", IN_GGUF)
@torch.inference_mode()
def test_llama_cpp(name: str, make_checkpoint: Callable[..., Path], tmp_path: Path):
    model_type, changes = IN_GGUF[name]
    checkpoint = make_checkpoint(model_type=model_type, vocab_size=262, **changes)
    file, ids = gguf_files.write(checkpoint, tmp_path / "model.gguf"), ids_of(60)
    theirs = logits_of_llama(file, ids)
    with open_checkpoint(Source(str(file)), tmp_path / "made", NoProgress()) as opened:
        blueprint = make_blueprint(opened.index, QuantizeOptions("none"))
        CheckpointBuild(opened, tmp_path / "made", blueprint).run()
    ours, _ = Ours(tmp_path / "made").read(torch.tensor(ids), len(ids))
    original, _ = Oracle(checkpoint).read(torch.tensor(ids))
    own = original
    if name == "gpt_oss":
        plain = make_checkpoint(model_type=model_type, vocab_size=262)
        own, _ = Oracle(plain).read(torch.tensor(ids))
    errors = [
        float((result - expected).abs().max() / expected.abs().max())
        for result, expected in ((theirs, original), (ours, own))
    ]
    print(f"\n| {name} | {' | '.join(f'{error:.1e}' for error in errors)} |", flush=True)
    assert errors[0] < (5e-3 if model_type == "gemma4" else MAX_ERROR)
    assert errors[1] < MAX_ERROR


def logits_of_llama(file: Path, ids: list[int]) -> torch.Tensor:
    """Return llama.cpp's logits [T, vocabulary]."""
    assert LLAMA is not None
    child, out = Path(__file__).with_name("gguf_kinds_child.py"), file.with_suffix(".npy")
    command = [LLAMA, str(child), "logits", str(file), str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.run(command, input=f"{json.dumps([ids])}\n\n", check=False, **pipes)
    if run.returncode:  # -6 if an assertion of ggml failed
        pytest.fail(next((x for x in run.stderr.splitlines() if "error" in x), run.stderr[-300:]))
    return torch.from_numpy(np.load(out))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FAMILIES)
def test_bytes(name: str, make_checkpoint: Callable[..., Path], install: Callable[..., Path]):
    shape = {"std": 0.1, "intermediate_size": 128, "max_position_embeddings": 1024}
    directory = install(make_checkpoint(**{**shape, **FAMILIES[name]}))
    with InstalledModel(directory) as installed:
        size, choices = installed.blueprint.expert.stride, installed.config.num_experts_per_tok
    cold, full = loaded(directory), loaded(directory)
    prompts = [ids_of(tokens, tokens) for tokens in (1, 7, 40, 300)]
    expected = [text_of(full, prompt) for prompt in prompts]
    equal: dict[str, list[bool]] = {"cache": [], "company": [], "rollback": []}
    for slots in (choices, choices + 1):
        few = loaded(directory, host_memory=MemoryBudget(size=slots * size))
        equal["cache"] += map(eq, expected, [text_of(few, prompt) for prompt in prompts])
        equal["company"].append(in_company(few, prompts) == [text for text, _ in expected])
        few.close()
    equal["company"].append(in_company(full, prompts) == [text for text, _ in expected])
    full.forget()
    for shared in (300, 220, 130, 2):
        prompt = [*prompts[-1][:shared], *ids_of(41, shared)]
        equal["rollback"].append(text_of(cold, prompt) == text_of(full, prompt, forget=False))
    counts = [f"{sum(results)} of {len(results)}" for results in equal.values()]
    print(f"\n| {name} | {' | '.join(counts)} |", flush=True)
    assert all(itertools.chain(*equal.values()))


def loaded(directory: Path, **options: Any) -> Engine:
    options = {"device": "cpu", "exact_prompts": True, "parallel": 4, **options}
    return load_engine(directory, LoadOptions(**options))


def text_of(engine: Engine, prompt: list[int], *, forget: bool = True) -> tuple[list[int], Any]:
    """Return the tokens of an answer, and the logits of a token after it, as numbers."""
    if forget:
        engine.forget()
    text = answer(engine, prompt, SamplingOptions(temperature=1.0, seed=5), max_tokens=24)
    logits = engine.passes.compute([SequenceTokens(engine.sequences[0], [3])], exact=True)
    return text, logits.tolist()


def in_company(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Return the answers to all prompts at once."""
    for sequence in engine.sequences:
        sequence.clear()
    batch = engine.new_batch()
    sampling = SamplingOptions(temperature=1.0, seed=5)
    answers = [batch.add(TokenAnswer(ids, sampling, frozenset(), 24)) for ids in prompts]
    while batch.size:
        batch.step()
    return [answer.ids[answer.stats.prompt_tokens :] for answer in answers]
