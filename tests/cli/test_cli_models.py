"""`list`, `show`, `download`, and which models `run` builds by itself."""

import json
import shutil
from pathlib import Path

import pytest

from mixchat.cli.opening import find_or_build
from mixchat.errors import HubError, ModelNotFoundError
from mixchat.weights import demo, models
from mixchat.weights.manifest import FileRecord, Manifest, Source, write_manifest

QUANTIZATION = {
    "quant_type": "nf4",
    "blocksize": 64,
    "layout": "bitsandbytes",
    "attention": False,
    "head": True,
    "dtype": "bfloat16",
}


@pytest.fixture
def keep(tmp_path):
    """Writes what `list` and `show` read of a kept model."""

    def write(key, repo, commit=None):
        directory = tmp_path / "home" / "models" / key
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(demo.CONFIG))
        files = {"shared.safetensors": FileRecord(26_100_000_000, "0" * 64)}
        write_manifest(directory, Manifest(Source(repo, commit), QUANTIZATION, files))
        return directory

    return write


def test_list_is_a_table(mixchat, keep, tmp_path):
    keep("org--name", "org/name")
    keep("tiny", "[red]\x1b[2J")
    (tmp_path / "home" / "models" / "zz").mkdir()
    lines = mixchat("list").stdout.decode().splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "org--name", "tiny", "zz"]
    assert lines[1].split()[-2:] == ["nf4", "org/name"]
    assert lines[2].endswith("nf4           [red][2J")
    assert "unfinished" in lines[3]
    assert len({line.index(word) for line, word in zip(lines, ("QUANT", "nf4"), strict=False)}) == 1


def test_list_as_json_is_for_programs(mixchat, keep):
    directory = keep("org--name", "org/name")
    (row,) = json.loads(mixchat("list", "--json").stdout)
    assert row["bytes"] > 0
    del row["bytes"]
    assert row == {
        "name": "org--name",
        "path": str(directory),
        "quantization": "nf4",
        "source": "org/name",
        "problem": None,
    }


def test_an_empty_list_says_what_to_do_on_stderr(mixchat):
    done = mixchat("list")
    assert (done.stdout, done.returncode) == (b"", 0)
    assert b"mixchat download demo" in done.stderr
    assert json.loads(mixchat("list", "--json").stdout) == []


def test_show_says_what_a_model_is(mixchat, keep):
    keep("org--name", "org/name", "abc123")
    rows = dict(
        line.split("  ", 1) for line in mixchat("show", "org/name").stdout.decode().splitlines()
    )
    shown = {key: value.strip() for key, value in rows.items()}
    assert shown["source"] == "org/name"
    assert shown["commit"] == "abc123"
    assert shown["size"] == "26.1 GB"
    assert (shown["experts"], shown["attention"], shown["head"]) == ("nf4", "bfloat16", "nf4")
    assert (shown["layers"], shown["experts a layer"]) == ("30", "8, 2 a token")


def test_show_demo_says_plainly_what_it_is_before_and_after_it_is_built(mixchat, keep):
    before = mixchat("show", "demo").stdout.decode()
    assert before.startswith(demo.ABOUT)
    assert "not built yet" in before
    keep("demo", "demo")
    after = mixchat("show", "demo").stdout.decode()
    assert after.startswith(demo.ABOUT)
    assert "not built yet" not in after
    assert "layers" in after


def test_show_refuses_a_damaged_model(mixchat, keep):
    (keep("org--name", "org/name") / "mixchat.json").write_text("{")
    done = mixchat("show", "org/name")
    assert (done.stdout, done.returncode) == (b"", 6)


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the download: notes what it was called with, and reports progress."""
    made = []

    def download(ref, options, *, progress, revision=None, check=None):
        made.append((ref, options, revision))
        progress.begin("quantizing", 1000)
        progress.advance(1000)
        return models.model_dir(ref)

    monkeypatch.setattr("mixchat.weights.download.download", download)
    return made


def test_download_passes_its_flags_on(mixchat, calls):
    flags = ("--name", "mine", "--revision", "abc", "--quantize-attention", "--quantize-head")
    done = mixchat("download", "org/name", *flags)
    assert (done.stdout, done.returncode) == (b"", 0)
    ((ref, options, revision),) = calls
    assert (ref.repo, ref.key, revision) == ("org/name", "mine", "abc")
    assert (options.quant_type, options.attention, options.head) == ("nf4", True, True)
    lines = done.stderr.decode().splitlines()
    assert lines[:2] == ["quantizing: 1 kB", "quantizing: 1 kB in 0 s"]
    assert lines[2].startswith("mine is ready in ")


def test_download_quantizes_the_experts_alone_unless_told_otherwise(mixchat, calls):
    mixchat("download", "demo")
    ((_, options, _),) = calls
    assert (options.quant_type, options.attention, options.head) == ("nf4", False, False)


def test_an_error_in_a_download_comes_after_its_bar_is_closed(mixchat, monkeypatch):
    def download(ref, options, *, progress, revision=None, check=None):
        progress.begin("fetching", 1000)
        raise HubError("no network")

    monkeypatch.setattr("mixchat.weights.download.download", download)
    done = mixchat("download", "org/name")
    assert done.returncode == 5
    assert done.stderr.decode().splitlines()[-1] == "error: no network"


def test_run_builds_the_demo_model_by_itself(calls, monkeypatch, tmp_path):
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    assert find_or_build("demo") == tmp_path / "models" / "demo"
    assert calls[0][0].demo


def test_run_fetches_no_other_model_by_itself(calls, monkeypatch, tmp_path):
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    with pytest.raises(ModelNotFoundError) as caught:
        find_or_build("instruct")
    assert "mixchat download instruct" in (caught.value.hint or "")
    assert calls == []


def test_run_takes_a_kept_model_as_it_is(calls, keep, monkeypatch, tmp_path):
    kept = keep("demo", "demo")
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path / "home"))
    assert find_or_build("demo") == kept
    assert calls == []


@pytest.mark.parametrize("flag", ["--quantize-attention", "--quantize-head"])
def test_4_bits_for_a_part_of_what_is_kept_as_it_is_are_refused(mixchat, calls, flag):
    done = mixchat("download", "org/name", "--quant-type", "none", flag)
    assert (done.returncode, calls) == (2, [])


@pytest.mark.parametrize("content", [None, b"{", b'{"a": 1}'])
def test_a_checkpoint_with_a_bad_tokenizer_is_refused_before_it_is_quantized(
    mixchat, environment, tiny_checkpoint, tmp_path, content
):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    if content is not None:
        (checkpoint / "tokenizer.json").write_bytes(content)
    done = mixchat("download", str(checkpoint))
    assert (done.stdout, done.returncode) == (b"", 6)
    assert b"tokenizer" in done.stderr
    assert b"quantizing" not in done.stderr
    assert not (Path(environment["MIXCHAT_HOME"]) / "models" / "checkpoint").exists()
