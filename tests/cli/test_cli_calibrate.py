"""`calibrate`, and `download --calibrate`: on a tiny model, whose checkpoint is a directory."""

import shlex
import shutil
from pathlib import Path

import pytest
from tiny_tokenizer import write_tokenizer

from mixchat.loading import calibrate as calibrate_module
from mixchat.weights.care.convert import _Converter
from mixchat.weights.format.manifest import CONVERSION_DIR, INPUTS_DIR, read_manifest

EXPERTS = ("experts-000.safetensors", "experts-001.safetensors")
TEXT = "hello, this is a text. " * 40


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    shape = {"vocab_size": 262, "hidden_size": 128, "max_position_embeddings": 256}
    return write_tokenizer(make_checkpoint(**shape))


@pytest.fixture
def installed(mixchat, environment, checkpoint):
    assert mixchat("download", str(checkpoint), "--name", "mine").returncode == 0
    return Path(environment["MIXCHAT_HOME"]) / "models" / "mine"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(calibrate_module, "WINDOW", 32)
    monkeypatch.setattr(calibrate_module, "WINDOWS", 3)


def contents(directory, names=EXPERTS):
    return [(directory / name).read_bytes() for name in names]


def lines_of(done):
    return done.stderr.decode().splitlines()


def test_with_a_text_all_experts_and_nothing_else_change(mixchat, installed, text):
    before, shared = contents(installed), contents(installed, ["shared.safetensors"])
    size = read_manifest(installed).size
    done = mixchat("calibrate", "mine", "--calibrate-text", text)
    assert (done.stdout, done.returncode) == (b"", 0), done.stderr
    assert lines_of(done)[-1] == "mine is calibrated"
    assert all(one != other for one, other in zip(contents(installed), before, strict=True))
    assert contents(installed, ["shared.safetensors"]) == shared
    assert read_manifest(installed).size == size
    assert mixchat("verify", "mine").returncode == 0
    assert b"scales             calibrated\n" in mixchat("show", "mine").stdout
    assert not (installed / INPUTS_DIR).exists()


def test_a_text_of_its_own_needs_no_file(mixchat, installed):
    before = contents(installed)
    assert mixchat("calibrate", "mine").returncode == 0
    assert contents(installed) != before
    assert mixchat("verify", "mine").returncode == 0


def test_the_scales_follow_from_the_text(mixchat, installed, text):
    made = []
    for content in (TEXT, TEXT[::-1]):
        text.write_text(content)
        assert mixchat("calibrate", "mine", "--calibrate-text", text).returncode == 0
        made.append(contents(installed))
    assert made[0] != made[1]


def test_cut_off_while_experts_are_made_it_resumes_with_the_same_inputs(
    mixchat, installed, text, monkeypatch
):
    whole = shutil.copytree(installed, installed.parent / "whole")
    assert mixchat("calibrate", "whole", "--calibrate-text", text).returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(_Converter, "_rewrite", interrupt_at(EXPERTS[1]))
        stopped = mixchat("calibrate", "mine", "--calibrate-text", text)
    assert stopped.returncode == 130
    assert lines_of(stopped)[-1] == "interrupted; the same command resumes"
    assert (installed / CONVERSION_DIR).exists()
    refused = mixchat("convert", "mine")
    assert refused.returncode == 2
    assert lines_of(refused)[1] == "hint: Finish it first: mixchat calibrate mine"
    assert mixchat("verify", "mine").returncode == 0
    assert mixchat("gc").returncode == 0
    assert mixchat("calibrate", "mine").returncode == 0
    assert contents(installed) == contents(whole)


def test_an_interrupted_conversion_is_finished_first(mixchat, installed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(_Converter, "_rewrite", interrupt_at(EXPERTS[1]))
        assert mixchat("convert", "mine", "--layout", other_layout(installed)).returncode == 130
    refused = mixchat("calibrate", "mine")
    assert refused.returncode == 2
    assert lines_of(refused)[1] == "hint: Finish it first: mixchat convert mine"
    assert not (installed / INPUTS_DIR).exists()


def interrupt_at(stop):
    rewrite = _Converter._rewrite

    def stopping(self, name, task):
        if name == stop:
            raise KeyboardInterrupt
        return rewrite(self, name, task)

    return stopping


def other_layout(installed):
    now = read_manifest(installed).quantization["layout"]
    return "bitsandbytes" if now == "cpu-packed" else "cpu-packed"


def test_cut_off_while_it_reads_the_model_is_as_before(mixchat, installed, text, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = contents(installed)
    with monkeypatch.context() as patch:
        patch.setattr(calibrate_module, "_run", interrupted)
        assert mixchat("calibrate", "mine", "--calibrate-text", text).returncode == 130
    assert contents(installed) == before
    assert mixchat("verify", "mine").returncode == 0
    assert {path.name for path in installed.iterdir()}.isdisjoint({INPUTS_DIR, CONVERSION_DIR})


def test_inputs_that_no_conversion_needs_are_swept_away(mixchat, installed):
    (installed / INPUTS_DIR).mkdir()
    assert mixchat("gc").returncode == 0
    assert not (installed / INPUTS_DIR).exists()


def test_a_damaged_expert_of_a_calibrated_model_is_not_rebuilt(mixchat, installed, text):
    assert mixchat("calibrate", "mine", "--calibrate-text", text).returncode == 0
    path = installed / EXPERTS[0]
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    done = mixchat("repair", "mine")
    assert done.returncode == 6
    assert "calibrated experts cannot be rebuilt alone" in lines_of(done)[-2]
    assert "mixchat rm mine" in lines_of(done)[-1]


def test_attention_in_4_bits_of_a_calibrated_model_can_be_rebuilt(mixchat, environment, checkpoint):
    """It was made with searched scales, and rebuilt with absmax."""
    command = ("download", str(checkpoint), "--name", "mine", "--dense-bits", "4")
    assert mixchat(*command, "--calibrate").returncode == 0
    path = Path(environment["MIXCHAT_HOME"]) / "models" / "mine" / "shared.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert mixchat("repair", "mine").returncode == 0
    assert path.read_bytes() == whole


def test_download_can_calibrate_and_the_same_command_finds_it_done(mixchat, checkpoint, text):
    command = ("download", str(checkpoint), "--name", "new", "--calibrate-text", text)
    assert mixchat(*command).returncode == 0
    assert b"scales             calibrated\n" in mixchat("show", "new").stdout
    again = mixchat(*command)
    assert again.returncode == 0
    assert not any("converting" in line for line in lines_of(again))
    assert mixchat("download", str(checkpoint), "--name", "new").returncode == 0


def test_a_download_cut_off_while_it_calibrates_names_the_command_that_resumes(
    mixchat, checkpoint, installed, text, monkeypatch
):
    """It named none, and the same command does not resume."""
    text = text.rename(text.with_name("a text.txt"))
    command = ("download", str(checkpoint), "--name", "mine")
    with monkeypatch.context() as patch:
        patch.setattr(_Converter, "_rewrite", interrupt_at(EXPERTS[1]))
        stopped = mixchat(*command, "--calibrate-text", text)
    assert stopped.returncode == 130
    begin, named = lines_of(stopped)[-1].split(": ")
    assert (begin, named) == (
        "interrupted; to resume",
        f"mixchat calibrate mine --calibrate-text '{text}'",
    )
    assert mixchat(*shlex.split(named)[1:]).returncode == 0
    assert mixchat(*command, "--calibrate").returncode == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"too short", "the text has "),
        (b"\xff\xfe" * 50, "not text (UTF-8)"),
        (None, "cannot be read"),
    ],
)
def test_a_text_that_cannot_be_used_is_one_line(mixchat, installed, text, content, said):
    text.unlink()
    if content is not None:
        text.write_bytes(content)
    done = mixchat("calibrate", "mine", "--calibrate-text", text)
    assert done.returncode == 2
    assert said in lines_of(done)[0]
    assert len(lines_of(done)) <= 2
    assert mixchat("verify", "mine").returncode == 0


@pytest.mark.parametrize(("what", "free"), [("memory", 1000), ("disk", 1000)])
def test_what_does_not_fit_is_refused_before_anything_changes(
    mixchat, installed, text, monkeypatch, what, free
):
    before = contents(installed)
    name = "free_memory" if what == "memory" else "free_disk"
    monkeypatch.setattr(calibrate_module.machine, name, lambda *_: free)
    if what == "memory":  # loading asks for it, too
        monkeypatch.setattr(calibrate_module, "record_inputs", None)
    done = mixchat("calibrate", "mine", "--calibrate-text", text)
    assert done.returncode == 7
    assert f"not enough {what}" in lines_of(done)[0]
    assert contents(installed) == before
    assert {path.name for path in installed.iterdir()}.isdisjoint({INPUTS_DIR, CONVERSION_DIR})


def test_without_weights_to_round_there_is_nothing_to_calibrate(mixchat, checkpoint, text):
    mixchat("download", str(checkpoint), "--name", "dense", "--expert-bits", "16")
    done = mixchat("calibrate", "dense", "--calibrate-text", text)
    assert done.returncode == 2
    assert "no experts in 3 or 4 bits" in lines_of(done)[0]
