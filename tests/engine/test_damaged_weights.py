"""Weights that are no numbers: an error that says so, not an empty answer or an internal one."""

import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.base.safetensors import SafetensorsFile
from mixchat.engine.generate import Engine
from mixchat.loading.loader import load_engine

PROMPT = [5, 17, 42, 8, 90, 3, 3, 61]
# Of each kind of tensor one, by its file. In 8 bits, the scales stand for a matrix.
PLACES = {
    "embedding": ("shared", "model.embed_tokens.weight"),
    "norm before attention": ("shared", "model.layers.1.input_layernorm.weight"),
    "norm before experts": ("shared", "model.layers.1.post_attention_layernorm.weight"),
    "attention in": ("shared", "model.layers.1.self_attn.qkv_proj.weight"),
    "attention out": ("shared", "model.layers.1.self_attn.o_proj.weight"),
    "gate": ("shared", "model.layers.1.block_sparse_moe.gate.weight"),
    "scales of w1 and w3": ("experts-001", "{expert}.w13.absmax"),
    "scales of w2": ("experts-001", "{expert}.w2.absmax"),
    "last norm": ("shared", "model.norm.weight"),
    "head": ("shared", "lm_head.weight"),
}


@pytest.fixture(
    scope="module",
    params=[(96, 16), (128, 8)],
    ids=["16 bits", "8 bits"],
)
def healthy(
    request: pytest.FixtureRequest,
    make_checkpoint: Callable[..., Path],
    install: Callable[..., Path],
) -> Path:
    """A model with experts in 4 bits. One with 16 bits elsewhere has them in w2, too."""
    inner, bits = request.param
    return install(make_checkpoint(intermediate_size=inner), attention=bits, head=bits)


def plant(model: Path, place: str, value: float) -> None:
    """Fill a tensor with the value, of experts in all of a layer."""
    file, name = PLACES[place]
    path = model / f"{file}.safetensors"
    with SafetensorsFile(path) as opened:
        there = {spec.name for spec in opened.header.specs}
        names = sorted({name.format(expert=expert) for expert in range(4)})
        if not there.issuperset(names):
            stem, kind = name.rsplit(".", 1)
            kind = {"weight": "absmax", "absmax": "weight"}[kind]
            names = sorted({f"{stem}.{kind}".format(expert=expert) for expert in range(4)})
        specs = [(opened.header.start(one), opened.header.spec(one)) for one in names]
    data = bytearray(path.read_bytes())
    for start, spec in specs:
        count = math.prod(spec.shape)
        one = struct.pack("<f", value)[4 - spec.dtype.itemsize :]
        data[start : start + spec.nbytes] = one * count
    path.write_bytes(data)


@pytest.fixture
def answer(healthy: Path) -> Callable[[Path, str], list[int]]:
    """Answers with a damaged model: from the beginning on, or from the second token on."""

    def answered(damaged: Path, since: str) -> list[int]:
        engine = opened(damaged)
        if since == "prefill":
            return list(ids_of(engine))
        whole = opened(healthy)
        ids = ids_of(whole)
        first = next(ids)
        whole.passes.model = engine.passes.model
        return [first, *ids]

    def opened(model: Path) -> Engine:
        return load_engine(model, LoadOptions(device="cpu"))

    def ids_of(engine: Engine):
        options = SamplingOptions(temperature=0.7, seed=1)
        return engine.generate(PROMPT, sampling=options, stop_ids={2}, max_tokens=4)

    return answered


@pytest.mark.parametrize(("since", "value"), [("prefill", math.nan), ("decode", math.inf)])
@pytest.mark.parametrize("place", PLACES)
def test_numbers_that_are_none_end_in_an_error_that_names_the_command(
    healthy, answer, tmp_path, place, since, value
):
    """The answer was empty and the exit code 0, or torch's complaint an internal error."""
    damaged = tmp_path / "model"
    shutil.copytree(healthy, damaged)
    plant(damaged, place, value)
    with pytest.raises(CheckpointError, match="values that are not numbers") as error:
        answer(damaged, since)
    assert "mixchat verify" in str(error.value.hint)
    assert error.value.exit_code == 6


@pytest.mark.parametrize("since", ["prefill", "decode"])
def test_a_healthy_model_answers(healthy, answer, since):
    assert len(answer(healthy, since)) == 4


def test_an_installed_model_is_called_by_its_name(healthy, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    shutil.copytree(healthy, tmp_path / "models" / "mine")
    engine = load_engine(tmp_path / "models" / "mine", LoadOptions(device="cpu"))
    with pytest.raises(CheckpointError) as error:
        engine.passes.checked(torch.tensor([1.0, -math.inf]))
    assert error.value.hint is not None
    assert "mixchat verify mine." in error.value.hint
