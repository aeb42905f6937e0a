"""`list`, `show`, and which models `run` builds by itself."""

import json

import pytest

from mixchat.cli.output.progress import TerminalReporter
from mixchat.face.load import find_or_build
from mixchat.install.models import DEMO_ABOUT
from mixchat.install.source import demo
from mixchat.weights.format.manifest import (
    FileRecord,
    Manifest,
    Source,
    WeightsRecord,
    write_manifest,
)

QUANTIZATION = {
    "quant_type": "nf4",
    "blocksize": 64,
    "scales": "absmax",
    "attention": "none",
    "head": "nf4",
    "dtype": "bfloat16",
}


@pytest.fixture
def keep(tmp_path):
    """Writes what `list` and `show` read of an installed model."""

    def write(key, repo, commit=None):
        directory = tmp_path / "home" / "models" / key
        directory.mkdir(parents=True)
        config = json.dumps(demo.DEMO_CONFIG)
        (directory / "config.json").write_text(config)
        with open(directory / "shared.safetensors", "wb") as file:
            file.truncate(26_100_000_000)  # a hole: it takes no disk
        files = {"config.json": FileRecord(len(config), "0" * 64)}
        weights = {"shared.safetensors": WeightsRecord(26_100_000_000, {"x": "0" * 64})}
        write_manifest(directory, Manifest(Source(repo, commit), QUANTIZATION, files, weights))
        return directory

    return write


def test_list_is_a_table(mixchat, keep, tmp_path):
    keep("org--name", "org/name", "c0ffee" * 6 + "abcd")
    keep("tiny", "[red]\x1b[2J")
    (keep("broken", "org/broken") / "config.json").unlink()
    (tmp_path / "home" / "models" / "notes").mkdir()
    (tmp_path / "home" / "models" / ".zz.mixchat.unfinished").mkdir()
    lines = mixchat("list").stdout.decode().splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "QUANTIZATION", "CONTEXT", "COMMIT", "SOURCE"]
    assert [line.split()[0] for line in lines[1:]] == ["broken", "org--name", "tiny", "zz"]
    assert "damaged" in lines[1]
    assert lines[2].split()[-4:] == ["nf4", "8192", "c0ffeec0ffee", "org/name"]
    assert lines[3].split()[-4:] == ["nf4", "8192", "-", "[red][2J"]
    assert lines[4].split()[-4:] == ["unfinished", "-", "-", "-"]
    for column, value in (("QUANTIZATION", "nf4"), ("CONTEXT", "8192"), ("SOURCE", "org/name")):
        assert lines[0].index(column) == lines[2].rindex(value)


def test_list_as_json_is_for_programs(mixchat, keep):
    directory = keep("org--name", "org/name", "abc123")
    (row,) = json.loads(mixchat("list", "--json").stdout)
    assert 0 < row["bytes"] < 1_000_000  # what it takes, not what a hole pretends
    del row["bytes"]
    assert row == {
        "name": "org--name",
        "path": str(directory),
        "quantization": "nf4",
        "context": 8192,
        "source": "org/name",
        "commit": "abc123",
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
    assert (shown["model type"], shown["layers"]) == ("mixtral", "30")
    assert shown["experts per layer"] == "8, 2 per token"


def test_show_demo_says_plainly_what_it_is_before_and_after_it_is_built(mixchat, keep):
    before = mixchat("show", "demo").stdout.decode()
    assert before.startswith(DEMO_ABOUT)
    assert "not built yet" in before
    keep("demo", "demo")
    after = mixchat("show", "demo").stdout.decode()
    assert after.startswith(DEMO_ABOUT)
    assert "not built yet" not in after
    assert "layers" in after


def test_show_as_json_has_what_list_has_and_more(mixchat, keep):
    keep("org--name", "org/name", "abc123")
    shown = json.loads(mixchat("show", "org/name", "--json").stdout)
    (row,) = json.loads(mixchat("list", "--json").stdout)
    assert {key: shown.pop(key) for key in row} == row
    assert shown == {
        "revision": None,
        "weight_bytes": 26_100_000_000,
        "scales": "absmax",
        "attention": "bfloat16",
        "head": "nf4",
        "model_type": "mixtral",
        "layers": 30,
        "experts_per_layer": 8,
        "experts_per_token": 2,
        "hidden_size": 576,
    }


def test_show_and_verify_take_the_only_model_if_none_is_named(mixchat, keep):
    """They asked for a MODEL, although there was one."""
    keep("org--name", "org/name")
    assert mixchat("show").stdout == mixchat("show", "org/name").stdout
    assert mixchat("verify").stderr == mixchat("verify", "org--name").stderr
    keep("other", "org/other")
    several = mixchat("show")
    assert several.returncode == 2
    assert b"Say which: org--name or other." in several.stderr


@pytest.mark.parametrize(("flags", "fault"), [([], "missing"), (["--json"], "short")])
def test_show_and_list_agree_that_a_model_is_damaged(mixchat, keep, flags, fault):
    """`show` called a model healthy that `list` called damaged, and that `run` refused."""
    directory = keep("mine", "org/name")
    if fault == "missing":
        (directory / "shared.safetensors").unlink()
    else:
        (directory / "shared.safetensors").write_bytes(b"short")
    problem = "damaged"
    assert problem in mixchat("list").stdout.decode()
    done = mixchat("show", "mine", *flags)
    assert done.returncode == 6
    assert "mixchat repair mine" in done.stderr.decode().splitlines()[1]
    if flags:
        shown = json.loads(done.stdout)
        assert (shown["problem"], shown["source"], shown["layers"]) == (problem, "org/name", 30)
    else:
        assert "org/name" in done.stdout.decode()


@pytest.mark.parametrize("quiet", [True, False])
def test_run_builds_the_demo_model_by_itself_with_quiet_without_a_word(
    calls, monkeypatch, tmp_path, capsys, quiet
):
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    assert find_or_build("demo", TerminalReporter(quiet)) == tmp_path / "models" / "demo"
    assert calls[0].ref.demo
    assert ("quantizing" in capsys.readouterr().err) is not quiet
