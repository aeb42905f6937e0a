"""`download`: its flags, its plan, and its JSON."""

import json
from pathlib import Path

import pytest
from fake_hub import COMMIT, REPO
from tiny_tokenizer import write_tokenizer

from mixchat.base import machine
from mixchat.base.errors import HubError
from mixchat.install.make.quantize_options import QuantizeOptions


def home_of(environment):
    return Path(environment["MIXCHAT_HOME"])


def test_its_flags_are_passed_on(mixchat, calls):
    flags = ("--name", "mine", "--revision", "abc", "--dense-bits", "4")
    done = mixchat("download", "org/name", *flags, "--keep-source")
    assert (done.stdout, done.returncode) == (b"", 0)
    (request,) = calls
    ref, options = request.ref, request.options
    assert (ref.repo, ref.key, request.revision) == ("org/name", "mine", "abc")
    assert request.keep_source
    assert (options.quant_type, options.attention, options.head) == ("nf4", 4, 4)
    lines = done.stderr.decode().splitlines()
    assert lines[:2] == ["quantizing: 1 kB", "quantizing: 1 kB in less than 1 s"]
    assert lines[2].startswith("mine is ready in ")


def test_without_flags_it_takes_the_defaults(mixchat, calls):
    mixchat("download", "demo")
    (request,) = calls
    options = request.options
    assert options == QuantizeOptions()
    assert (request.keep_source, request.revision) == (False, None)


def test_an_error_comes_after_its_bar_is_closed(mixchat, monkeypatch):
    def download(request, progress, *, announce=None):
        progress.task("fetching", 1000)
        raise HubError("no network")

    monkeypatch.setattr("mixchat.install.make.download.download", download)
    done = mixchat("download", "org/name")
    assert done.returncode == 5
    lines = done.stderr.decode().splitlines()
    assert lines == ["fetching: 1 kB", "fetching: 0 bytes in less than 1 s", "error: no network"]


@pytest.mark.parametrize(
    ("value", "attention", "head"),
    [
        ("16", 16, 16),
        ("8", 8, 8),
        (" 4 ", 4, 4),
        ("attention=8,head=16", 8, 16),
        ("attention=8,head=6", 8, 6),
        ("head=4, attention=16", 16, 4),
        ("head=16", None, 16),
        ("attention = 4", 4, None),
    ],
)
def test_dense_bits_are_for_all_or_for_each(mixchat, calls, value, attention, head):
    assert mixchat("download", "org/name", "--dense-bits", value).returncode == 0
    (request,) = calls
    assert (request.options.attention, request.options.head) == (attention, head)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "has to be 16, 8, 6 or 4, not ''"),
        ("7", "has to be 16, 8, 6 or 4, not '7'"),
        ("8.0", "has to be 16, 8, 6 or 4"),
        ("attention=", "has to be 16, 8, 6 or 4, not ''"),
        ("8,head=16", "the parts are attention and head"),
        ("experts=8", "the parts are attention and head"),
        ("head=8,head=8", "names 'head' twice"),
        ("head=8,", "the parts are attention and head"),
    ],
)
def test_dense_bits_that_cannot_be_are_refused_in_one_line(mixchat, calls, value, said):
    done = mixchat("download", "org/name", "--dense-bits", value)
    assert (done.returncode, calls) == (2, [])
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("error: --dense-bits ")
    assert said in line


@pytest.mark.parametrize("bits", ["8", "4", "attention=8", "attention=16,head=4"])
def test_fewer_bits_for_a_part_of_what_stays_unquantized_are_refused(mixchat, calls, bits):
    done = mixchat("download", "org/name", "--expert-bits", "16", "--dense-bits", bits)
    assert (done.returncode, calls) == (2, [])
    assert b"leaves the attention and the head unquantized, too" in done.stderr


def test_16_bits_for_what_stays_unquantized_are_no_contradiction(mixchat, calls):
    flags = ("--expert-bits", "16", "--dense-bits", "16")
    assert mixchat("download", "org/name", *flags).returncode == 0
    assert calls[0].options == QuantizeOptions("none", 16, 16)


@pytest.mark.parametrize("content", [None, b"{"])
def test_a_checkpoint_with_a_bad_tokenizer_is_refused_before_it_is_quantized(
    mixchat, checkpoint, content
):
    (checkpoint / "tokenizer.json").unlink()
    if content is not None:
        (checkpoint / "tokenizer.json").write_bytes(content)
    done = mixchat("download", str(checkpoint))
    assert (done.stdout, done.returncode) == (b"", 6)
    assert b"tokenizer" in done.stderr
    assert b"quantizing" not in done.stderr


def test_an_unknown_rope_type_is_refused_with_those_that_run(mixchat, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "other", "factor": 4.0, "rope_theta": 1e6}
    (checkpoint / "config.json").write_text(json.dumps(config))
    error, hint = mixchat("download", str(checkpoint)).stderr.decode().splitlines()
    assert error == "error: config.json: rope type 'other' is not supported"
    types = "default, linear, dynamic, yarn, llama3, longrope, proportional"
    assert hint == f"hint: The types that run are {types}."


def test_what_it_takes_is_said_before_it_is_done(mixchat, environment, checkpoint):
    done = mixchat("download", str(checkpoint))
    lines = done.stderr.decode().splitlines()
    said = [line.split()[0] for line in lines]
    assert said[:5] == ["from", "fetch", "install", "disk", "memory"]
    assert said.index("memory") < said.index("quantizing:")
    assert lines[-1] == f"checkpoint is ready in {home_of(environment) / 'models' / 'checkpoint'}"
    assert (done.stdout, done.returncode) == (b"", 0)


def test_as_json_it_tells_the_plan_and_the_place(mixchat, environment, checkpoint):
    done = mixchat("download", str(checkpoint), "--json")
    made = json.loads(done.stdout)
    place = home_of(environment) / "models" / "checkpoint"
    assert (made["name"], made["path"]) == ("checkpoint", str(place))
    assert (made["source"], made["commit"], made["fetch_bytes"]) == (str(checkpoint), None, 0)
    installed = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    assert made["kept_bytes"] == installed
    again = json.loads(mixchat("download", str(checkpoint), "--json").stdout)
    assert again == {"name": "checkpoint", "path": str(place)}


def test_a_dry_run_from_the_hub_says_what_it_would_take_and_does_nothing(
    mixchat, environment, fake
):
    done = mixchat("download", REPO, "--dry-run")
    assert done.returncode == 0
    rows = dict(line.split(maxsplit=1) for line in done.stdout.decode().splitlines())
    assert rows["from"] == f"{REPO} at {COMMIT[:12]}"
    assert set(rows) == {"from", "fetch", "install", "disk", "memory", "time", "note"}
    assert not home_of(environment).exists()


def test_a_dry_run_as_json_has_bytes(mixchat, environment, fake):
    done = mixchat("download", REPO, "--dry-run", "--json")
    made = json.loads(done.stdout)
    size = len(fake.files["model.safetensors"])
    assert made["checkpoint_bytes"] == made["fetch_bytes"] == size
    assert made["commit"] == COMMIT
    assert made["quantization"]["quant_type"] == "nf4"
    (disk,) = made["disk"]
    assert 0 < disk["needed_bytes"] < disk["free_bytes"]
    assert made["memory"]["needed_bytes"] > 0
    assert made["bytes_per_second"] > 0
    assert made["seconds"] > 0
    assert not home_of(environment).exists()


@pytest.mark.parametrize(
    ("dtype", "options", "said"),
    [
        ("float16", [], "fp16 weights are stored as bf16, which rounds them to 8 bits"),
        ("float32", [], "fp32 weights are stored as bf16, which rounds them to 8 bits"),
        ("bfloat16", [], None),
        ("float16", ["--expert-bits", "16"], None),
        ("float32", ["--expert-bits", "16"], None),
    ],
)
def test_it_is_said_where_weights_are_rounded_to_bf16(
    mixchat, make_checkpoint, dtype, options, said
):
    """A checkpoint in fp16 lost three bits of its eleven, and nothing said so."""
    checkpoint = write_tokenizer(make_checkpoint(stored_as=dtype))
    done = mixchat("download", str(checkpoint), "--name", "mine", *options)
    assert done.returncode == 0
    notes = [line for line in done.stderr.decode().splitlines() if "stored as bf16" in line]
    assert len(notes) == (said is not None)
    assert all(said in note for note in notes)
    rows = mixchat("show", "mine").stdout.decode().splitlines()
    shown = dict(row.split(maxsplit=1) for row in rows)["dtype"]
    assert shown == (f"bfloat16, rounded from {dtype}" if said else dtype)


def test_a_dry_run_that_would_not_fit_says_so_and_by_how_much(
    mixchat, environment, fake, monkeypatch
):
    monkeypatch.setattr(machine, "free_disk", lambda place: 1000)
    done = mixchat("download", REPO, "--dry-run", "--json")
    assert done.returncode == 7
    assert json.loads(done.stdout)["disk"][0]["free_bytes"] == 1000
    assert b"needed, 1 kB free" in done.stderr


def test_a_dry_run_of_what_is_installed_already_says_so(mixchat, checkpoint):
    mixchat("download", str(checkpoint))
    assert (
        mixchat("download", "checkpoint", "--dry-run").stdout
        == b"checkpoint is already installed\n"
    )
    made = json.loads(mixchat("download", "checkpoint", "--dry-run", "--json").stdout)
    assert made["name"] == "checkpoint"


def test_a_dry_run_of_the_demo_builds_nothing(mixchat, environment, monkeypatch):
    monkeypatch.setenv("MIXCHAT_DEMO_WHEEL", "/nowhere")
    done = mixchat("download", "demo", "--dry-run")
    assert done.returncode == 0
    assert b"92.9 MB" in done.stdout
    assert not home_of(environment).exists()


def test_keep_source_is_counted_in_the_cache(mixchat, fake, cache, monkeypatch):
    monkeypatch.setattr(machine, "same_disk", lambda one, other: False)
    made = json.loads(mixchat("download", REPO, "--dry-run", "--json", "--keep-source").stdout)
    assert [need["path"] for need in made["disk"]] == [made["path"], str(cache)]
    assert made["disk"][1]["needed_bytes"] == made["fetch_bytes"]
