"""`calibrate --expert-bits` and `download --expert-bits` with bits between those of the types."""

import json
import shutil
from pathlib import Path

import pytest
from test_cli_calibrate import EXPERTS, TEXT, contents, interrupt_at, lines_of
from tiny_tokenizer import write_tokenizer

from mixchat.loading import calibrate as calibrate_module
from mixchat.weights.care.convert import _Converter
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.manifest import INPUTS_DIR, read_manifest
from mixchat.weights.make.mix import bits_of, forms_of
from mixchat.weights.matrix.linear import TYPES

BITS = "3.7"


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    shape = {"vocab_size": 262, "hidden_size": 256, "intermediate_size": 512}
    return write_tokenizer(make_checkpoint(**shape, max_position_embeddings=256))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(calibrate_module, "WINDOW", 32)


@pytest.fixture
def models(environment):
    return Path(environment["MIXCHAT_HOME"]) / "models"


def blueprint_of(directory):
    with InstalledModel(directory) as installed:
        return installed.blueprint


def test_a_download_in_mixed_bits_says_what_it_takes_and_calibrates(
    mixchat, checkpoint, models, text
):
    download = ("download", str(checkpoint), "--name", "mine", "--expert-bits", BITS)
    done = mixchat(*download, "--calibrate-text", text)
    assert done.returncode == 0, done.stderr
    said = done.stderr.decode()
    assert "calibrates experts to 3." in said
    assert "the experts get 3." in said
    made = blueprint_of(models / "mine")
    assert 3.5 < bits_of(made) <= 3.7
    assert len({*forms_of(made)}) > 1
    manifest = (models / "mine" / "mixchat.json").read_bytes()
    assert json.loads(manifest)["format"] == 5
    for command in (("verify", "mine"), ("run", "-m", "mine", "-n", "3", "hello")):
        assert mixchat(*command).returncode == 0
    assert b"mixed" in mixchat("list").stdout
    again = mixchat(*download)
    assert (again.returncode, (models / "mine" / "mixchat.json").read_bytes()) == (0, manifest)
    other = mixchat(*download[:-1], "4.1")
    assert other.returncode == 2
    assert "calibrated in other bits" in lines_of(other)[0]


def test_cut_off_it_answers_and_resumes_with_the_same_types(
    mixchat, checkpoint, models, text, monkeypatch
):
    assert mixchat("download", str(checkpoint), "--name", "mine").returncode == 0
    whole = shutil.copytree(models / "mine", models / "whole")
    flags = ("--expert-bits", BITS, "--calibrate-text", text)
    assert mixchat("calibrate", "whole", *flags).returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(_Converter, "_rewrite", interrupt_at(EXPERTS[1]))
        assert mixchat("calibrate", "mine", *flags).returncode == 130
    assert mixchat("verify", "mine").returncode == 0
    assert mixchat("run", "-m", "mine", "-n", "3", "hello").returncode == 0
    refused = mixchat("calibrate", "mine", "--expert-bits", "4")
    assert refused.returncode == 2
    assert lines_of(refused)[-1].endswith("mixchat calibrate mine --expert-bits 3.7")
    assert mixchat("calibrate", "mine").returncode == 0
    names = ["mixchat.json", *EXPERTS]
    assert contents(models / "mine", names) == contents(whole, names)
    assert not (models / "mine" / INPUTS_DIR).exists()
    converted = mixchat("convert", "mine", "--layout", "bitsandbytes")
    assert converted.returncode == 0, converted.stderr
    assert forms_of(blueprint_of(models / "mine")) == forms_of(blueprint_of(whole))
    assert mixchat("verify", "mine").returncode == 0


def test_two_bits_give_all_layers_one_type_and_are_always_calibrated(
    mixchat, checkpoint, models, text
):
    download = ("download", str(checkpoint), "--name", "mine", "--expert-bits", "2")
    planned = mixchat(*download, "--dry-run")
    assert b"calibrates experts to 2." in planned.stdout
    assert mixchat(*download, "--calibrate-text", text).returncode == 0
    quantization = read_manifest(models / "mine").quantization
    assert TYPES[quantization["quant_type"]].bits == 2
    assert quantization["scales"] == "calibrated"
    assert not blueprint_of(models / "mine").layers
    assert mixchat("run", "-m", "mine", "-n", "3", "hello").returncode == 0


@pytest.mark.parametrize(
    ("bits", "said"),
    [("1.5", "the experts take at least"), ("100MB", "the experts take at least")],
)
def test_bits_that_no_type_has_are_refused_before_anything_is_made(
    mixchat, checkpoint, models, bits, said
):
    refused = mixchat("download", str(checkpoint), "--name", "mine", "--expert-bits", bits)
    assert refused.returncode == 2
    assert said in lines_of(refused)[0]
    assert not (models / "mine" / "mixchat.json").exists()
