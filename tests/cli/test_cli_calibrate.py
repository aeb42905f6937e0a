"""`calibrate`, and `download --calibrate`: on a tiny model, whose checkpoint is a directory."""

import json
import re
import shutil
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
from care_tools import flip
from tiny_tokenizer import write_tokenizer

from mixchat.base.safetensors import SafetensorsFile, tensor_bytes, tensor_sha256
from mixchat.install.make.calibrator import inputs_size
from mixchat.loading import calibrate as calibrate_module
from mixchat.weights.families.read_config import read_config_file
from mixchat.weights.format.manifest import read_manifest
from mixchat.weights.format.workspace import INPUTS_DIR, workspace

EXPERTS = ("experts-000.safetensors", "experts-001.safetensors")
MODEL = ("mixchat.json", *EXPERTS)
TEXT = "hello, this is a text. " * 40


@pytest.fixture(scope="module")
def built(make_checkpoint):
    shape = {"vocab_size": 262, "hidden_size": 128, "max_position_embeddings": 256}
    return write_tokenizer(make_checkpoint(**shape))


@pytest.fixture
def checkpoint(built, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(built, tmp_path / "source")


@pytest.fixture
def install(run, environment, checkpoint):
    """Downloads the checkpoint as `mine`, and returns the model's directory."""

    def install(*flags):
        run("download", str(checkpoint), "--name", "mine", *flags)
        return Path(environment["MIXCHAT_HOME"]) / "models" / "mine"

    return install


@pytest.fixture
def installed(install):
    return install()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def contents(directory, names=EXPERTS):
    return [(directory / name).read_bytes() for name in names]


def lines_of(done):
    return done.said.splitlines()


def test_with_a_text_all_experts_and_nothing_else_change(run, installed, text):
    before, shared = contents(installed), contents(installed, ["shared.safetensors"])
    size = read_manifest(installed).size
    done = run("calibrate", "mine", "--calibrate-text", text)
    assert done.out == ""
    assert lines_of(done)[0].startswith("calibrating takes ")
    assert lines_of(done)[-1] == "mine is calibrated"
    ways = re.compile(
        r"of 16 matrices (\d+) are rounded with error feedback \(GPTQ\), "
        r"(\d+) have weighted scales, (\d+) are as they were; "
        r"on text that was held out, the error of their products is \d+% less"
    )
    found = ways.fullmatch(lines_of(done)[-2])
    assert found, lines_of(done)
    assert sum(map(int, found.groups())) == 16
    assert all(one != other for one, other in zip(contents(installed), before, strict=True))
    assert contents(installed, ["shared.safetensors"]) == shared
    assert read_manifest(installed).size == size
    run("verify", "mine")
    assert "scales             calibrated\n" in run("show", "mine").out
    assert not (workspace(installed) / INPUTS_DIR).exists()


def test_the_codes_follow_from_the_text_which_the_model_writes_if_there_is_none(
    run, installed, text
):
    made = [contents(installed)]
    for content in (TEXT, TEXT[::-1], None):
        text.write_text(content or "")
        run("calibrate", "mine", *(("--calibrate-text", text) if content else ()))
        made.append(contents(installed))
    assert all(one != other for one, other in combinations(made, 2))
    run("verify", "mine")


def test_cut_off_while_experts_are_made_it_answers_and_resumes_with_the_same_inputs(
    run, cut_off, installed, checkpoint, text
):
    """The model could not run until the same command had ended, for good without its checkpoint."""
    whole = shutil.copytree(installed, installed.parent / "whole")
    run("calibrate", "whole", "--calibrate-text", text)
    stopped = cut_off("calibrate", "mine", "--calibrate-text", text)
    assert lines_of(stopped)[-1] == "interrupted; the same command resumes"
    assert read_manifest(installed).quantization["scales"] == "search"
    assert (workspace(installed) / INPUTS_DIR).is_dir()
    hidden = checkpoint.rename(checkpoint.with_name("hidden"))
    for command in (("verify", "mine"), ("gc",), ("run", "-m", "mine", "-n", "3", "hello")):
        run(*command)
    hidden.rename(checkpoint)
    resumed = run("calibrate", "mine")
    assert any(line.startswith("resuming an interrupted") for line in lines_of(resumed))
    assert contents(installed, MODEL) == contents(whole, MODEL)
    assert not (workspace(installed) / INPUTS_DIR).exists()


def test_inputs_of_a_calibration_can_be_given_up(run, cut_off, installed, text):
    cut_off("calibrate", "mine", "--calibrate-text", text)
    left = run("gc")
    assert any("which the same command can resume" in line for line in lines_of(left))
    assert (workspace(installed) / INPUTS_DIR).exists()
    run("gc", "--unfinished")
    assert not (workspace(installed) / INPUTS_DIR).exists()
    run("calibrate", "mine", "--calibrate-text", text)
    run("verify", "mine")


def test_cut_off_while_it_reads_the_model_is_as_before(run, installed, text, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = contents(installed)
    with monkeypatch.context() as patch:
        patch.setattr(calibrate_module, "_run", interrupted)
        run("calibrate", "mine", "--calibrate-text", text, code=130)
    assert contents(installed) == before
    run("verify", "mine")
    assert not (workspace(installed) / INPUTS_DIR).exists()


def test_a_damaged_expert_of_a_calibrated_model_is_not_rebuilt(run, installed, text):
    run("calibrate", "mine", "--calibrate-text", text)
    flip(installed / EXPERTS[0], 5000)
    done = run("repair", "mine", code=6)
    assert "calibrated experts cannot be rebuilt alone" in lines_of(done)[-2]
    assert "mixchat rm mine" in lines_of(done)[-1]


@pytest.mark.parametrize("bits", ["4", "16"])
def test_attention_and_head_of_a_calibrated_model_can_be_rebuilt(run, install, bits):
    """In 4 bits they were made with searched scales, and rebuilt with absmax."""
    directory = install("--dense-bits", bits, "--calibrate")
    path = directory / "shared.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    run("repair", "mine")
    assert path.read_bytes() == whole


@pytest.fixture
def in_few_bits(install):
    """Attention and head have a type that is calibrated with the experts."""
    return install("--dense-bits", "attention=6,head=6")


def test_attention_and_head_in_few_bits_are_calibrated_with_the_experts(run, in_few_bits, text):
    shared, before = (in_few_bits / "shared.safetensors"), tensors_of(in_few_bits)
    size = shared.stat().st_size
    done = run("calibrate", "mine", "--calibrate-text", text)
    assert lines_of(done)[-2].startswith("of 21 matrices ")  # 16 of experts, and 2 * 2 + 1
    changed = {name for name, data in tensors_of(in_few_bits).items() if data != before[name]}
    assert {name.rpartition(".")[0] for name in changed} == {
        "lm_head",
        *(f"model.layers.{n}.self_attn.{x}_proj" for n in (0, 1) for x in ("qkv", "o")),
    }
    assert shared.stat().st_size == size
    run("verify", "mine")
    flip(shared, -5)
    refused = run("repair", "mine", code=6)
    assert "calibrated matrices cannot be rebuilt alone" in lines_of(refused)[-2]


@pytest.mark.parametrize("stopped_at", ["shared.safetensors", *EXPERTS])
def test_cut_off_attention_and_head_are_calibrated_once(
    run, cut_off, in_few_bits, text, stopped_at
):
    whole = shutil.copytree(in_few_bits, in_few_bits.parent / "whole")
    run("calibrate", "whole", "--calibrate-text", text)
    cut_off("calibrate", "mine", "--calibrate-text", text, at=stopped_at)
    run("verify", "mine")
    run("calibrate", "mine")
    names = ["shared.safetensors", *MODEL]
    assert contents(in_few_bits, names) == contents(whole, names)


def tensors_of(directory):
    """The bytes of what all tokens share, by name."""
    with SafetensorsFile(directory / "shared.safetensors") as file:
        return {spec.name: bytes(tensor_bytes(file.read(spec.name))) for spec in file.header.specs}


def test_a_download_cut_off_while_it_calibrates_is_resumed_by_the_same_command(
    run, cut_off, checkpoint, installed, text
):
    """It took a model that was half calibrated for one that it could not resume."""
    command = ("download", str(checkpoint), "--name", "mine", "--calibrate-text", text)
    stopped = cut_off(*command)
    assert lines_of(stopped)[-1] == "interrupted; the same command resumes"
    assert read_manifest(installed).quantization["scales"] == "search"
    run(*command)
    assert read_manifest(installed).quantization["scales"] == "calibrated"
    for again in (command, command[:-2]):
        assert not any("calibrating" in line for line in lines_of(run(*again)))


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        (b"a" * 154, (), "the text has 154 tokens: 5 windows need 155"),
        (b"a" * 185, ("--windows", "6"), "the text has 185 tokens: 6 windows need 186"),
        (b"\xff\xfe" * 50, (), "not text (UTF-8)"),
        (None, (), "cannot be read"),
    ],
)
def test_a_text_that_cannot_be_used_is_one_line(run, installed, text, content, flags, said):
    """511 tokens were taken without a word, and fewer windows than were wanted, too."""
    text.unlink()
    if content is not None:
        text.write_bytes(content)
    done = run("calibrate", "mine", "--calibrate-text", text, *flags, code=2)
    assert said in lines_of(done)[0]
    assert len(lines_of(done)) <= 2
    run("verify", "mine")


@pytest.mark.parametrize(("what", "free"), [("memory", 1000), ("disk", 1000)])
def test_what_does_not_fit_is_refused_before_anything_changes(
    run, installed, text, monkeypatch, what, free
):
    before = contents(installed)
    name = "free_memory" if what == "memory" else "free_disk"
    monkeypatch.setattr(calibrate_module.machine, name, lambda *_: free)
    if what == "memory":  # loading asks for it, too
        monkeypatch.setattr(calibrate_module, "_record_inputs", None)
    done = run("calibrate", "mine", "--calibrate-text", text, code=7)
    assert f"not enough {what}" in lines_of(done)[0]
    assert contents(installed) == before
    assert not (workspace(installed) / INPUTS_DIR).exists()


def test_without_weights_to_round_there_is_nothing_to_calibrate(run, checkpoint, text):
    run("download", str(checkpoint), "--name", "dense", "--expert-bits", "16")
    done = run("calibrate", "dense", "--calibrate-text", text, code=2)
    assert "no experts in 3 or 4 bits" in lines_of(done)[0]


def test_the_manifest_has_the_hash_of_each_tensor_that_was_read(installed, checkpoint):
    with SafetensorsFile(checkpoint / "model.safetensors") as file:
        expected = {spec.name: tensor_sha256(file.read(spec.name)) for spec in file.header.specs}
    assert read_manifest(installed).checkpoint == expected


def change_config(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (checkpoint / "config.json").write_text(json.dumps(config))


def change_tensor(checkpoint, layer, expert):
    """Change one weight of an expert."""
    path = checkpoint / "model.safetensors"
    with SafetensorsFile(path) as file:
        name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"
        start = file.header.start(name)
    flip(path, start + 3)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", change_config),
        ("model.safetensors", partial(change_tensor, layer=0, expert=0)),
        ("model.safetensors", partial(change_tensor, layer=1, expert=3)),
    ],
    ids=["config", "first expert", "last expert"],
)
def test_a_checkpoint_that_changed_is_refused_until_it_is_as_before(
    run, installed, checkpoint, text, name, change
):
    """It was accepted, and after a kill one model had layers of two checkpoints."""
    before, whole = contents(installed), (checkpoint / name).read_bytes()
    change(checkpoint)
    done = run("calibrate", "mine", "--calibrate-text", text, code=6)
    error = next(line for line in lines_of(done) if line.startswith("error: "))
    assert f"{name} is not what" in error
    assert contents(installed) == before
    run("verify", "mine")
    run("calibrate", "mine", code=6)
    (checkpoint / name).write_bytes(whole)
    run("calibrate", "mine", "--calibrate-text", text)


def test_as_many_windows_are_read_as_were_asked_for_and_it_is_said_beforehand(run, installed, text):
    done = run("calibrate", "mine", "--calibrate-text", text, "--windows", "7")
    said = (
        r"reads 7 windows of 32 tokens: about \d+ s on this machine; "
        r"then rounds 8 experts: about \d+ s"
    )
    assert any(re.fullmatch(said, line) for line in lines_of(done)), lines_of(done)


def test_by_default_no_more_windows_are_written_than_time_allows(run, installed, monkeypatch):
    monkeypatch.setattr(calibrate_module, "_DEFAULT_TEXT_S", 1e-9)
    done = run("calibrate", "mine")
    assert any(line.startswith("writes 5 windows of 32") for line in lines_of(done))


def test_by_default_there_are_as_many_windows_as_the_shape_wants_and_the_disk_holds(
    checkpoint, monkeypatch
):
    monkeypatch.setattr(calibrate_module, "WINDOW", 32)
    config = read_config_file(checkpoint / "config.json")
    wanted = 2 * max(config.hidden_size, config.intermediate_size) * config.num_local_experts
    wanted = -(-wanted // config.num_experts_per_tok // 32)
    assert calibrate_module.default_windows(config, checkpoint) == wanted > 6
    free = 2 * 6 * inputs_size(config, 32)
    monkeypatch.setattr(calibrate_module.machine, "free_disk", lambda *_: free)
    assert calibrate_module.default_windows(config, checkpoint) == 6
