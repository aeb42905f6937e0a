"""Every command takes models of other families, as it takes Mixtral."""

import json
from pathlib import Path

import pytest
from care_tools import flip
from fake_hub import REPO
from tiny_tokenizer import write_tokenizer
from weight_tools import files_of

from mixchat.base.safetensors import SafetensorsFile

SHAPE = {"vocab_size": 262, "intermediate_size": 128, "max_position_embeddings": 512}
# Stacks with factors beside states, codes as they are published, and layers with many norms and
# heads of two shapes. Mixtral has all other tests of commands.
CHECKPOINTS = {
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 2,
        "layer_types": ["attention", "mamba"],
    },
    "gpt_oss in MXFP4": {"model_type": "gpt_oss", "stored_as": "mxfp4"},
    "gemma4": {
        "model_type": "gemma4",
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
MANIFESTS = {"mixchat.json", "mixchat.copy.json"}
SCHEMA = {"enum": ["tea", "milk"]}
QUICK = ("--rounds", "1", "--tokens", "3", "--prompt", "16")


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, make_checkpoint):
    return write_tokenizer(make_checkpoint(**SHAPE | CHECKPOINTS[request.param]))


@pytest.fixture
def installed(run, fake, environment):
    run("download", REPO, "--name", "mine")
    return Path(environment["MIXCHAT_HOME"]) / "models" / "mine"


@pytest.fixture
def ask(run, installed):
    """Answer a question greedily, and return the answer as JSON."""

    def ask(*flags, prompt=("Hi there",), **how):
        common = ("run", *prompt, "-m", "mine", "--temp", "0", "--json", "--device", "cpu")
        return json.loads(run(*common, "-n", "8", *flags, **how).out)

    return ask


def flip_tensor(path, tensor):
    with SafetensorsFile(path) as file:
        flip(path, file.header.start(tensor))


def test_it_is_downloaded_shown_measured_and_removed(run, checkpoint, installed, ask, known_limits):
    kind = json.loads((checkpoint / "config.json").read_text())["model_type"].removesuffix("_text")
    assert "mine" in run("list").out
    assert json.loads(run("show", "mine", "--json").out)["model_type"] == kind
    ids = ask()["ids"]
    assert ids
    assert ask(prompt=("-",), stdin=b"Hi there")["ids"] == ids
    report = json.loads(run("stats", "mine", "--json").out)
    assert (report["model"], len(report["tiers"])) == ("mine", 2)
    assert "decode after 0 tokens" in run("bench", "mine", *QUICK, "--device", "cpu").out
    run("rm", "mine", "--yes")
    assert not installed.exists()


def test_flipped_bits_are_found_and_mended(run, installed):
    whole = files_of(installed)
    flip_tensor(installed / "experts-001.safetensors", "2.w2.codes")
    flip_tensor(installed / "shared.safetensors", "model.layers.0.self_attn.qkv_proj.codes")
    found = run("verify", "mine", code=6).out
    assert found.count("damaged: ") == 2
    assert "experts-001.safetensors: 2.w2.codes" in found
    run("repair", "mine")
    run("verify", "mine")
    assert files_of(installed) == whole


def test_experts_are_calibrated_unless_they_came_in_4_bits(run, checkpoint, installed, ask):
    whole = files_of(installed)
    if "quantization_config" in json.loads((checkpoint / "config.json").read_text()):
        assert "mxfp4" in run("calibrate", "mine", code=2).said
        assert files_of(installed) == whole
        return
    assert "mine is calibrated" in run("calibrate", "mine").said
    changed = {name for name, content in files_of(installed).items() if content != whole[name]}
    assert changed == {"experts-000.safetensors", "experts-001.safetensors", *MANIFESTS}
    run("verify", "mine")
    assert ask()["ids"]
