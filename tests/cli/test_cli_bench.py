"""`bench`: a small model's speed, beside limits and a peer that are quick to measure."""

import json
import shutil
import stat
import sys

import pytest

from mixchat.bench import rounds
from mixchat.bench.machine_limits import Limits

ECHO = f"""#!{sys.executable}
import sys
if sys.argv[1] != "-c" and sys.argv[2] != "make":
    assert sys.argv[2] == "serve", sys.argv
    print("ready", flush=True)
    for line in sys.stdin:
        print(*(0.5 * int(count) for count in line.split()), flush=True)
"""
QUICK = ("--rounds", "2", "--tokens", "3", "--prompt", "16", "--device", "cpu")


class KnownLimits:
    def __init__(self, device):
        pass

    def measure(self):
        return Limits(memory=1e9, gemm=2e9)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(rounds, "LimitsMeter", KnownLimits)
    monkeypatch.setattr(rounds, "disk_bandwidth", lambda directory, block: 3e9)


@pytest.fixture
def tiny(tiny_model, tmp_path):
    """The tiny model, kept under the name tiny."""
    place = tmp_path / "home" / "models" / "tiny"
    place.parent.mkdir(parents=True)
    shutil.copytree(tiny_model, place)
    return "tiny"


@pytest.fixture
def python(tmp_path):
    """A "Python" that plays llama.cpp."""
    path = tmp_path / "python"
    path.write_text(ECHO)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def run(mixchat, *arguments):
    return mixchat("bench", *arguments, *QUICK, fake=False)


def test_a_table_says_how_fast_and_how_near_to_the_limit(mixchat, tiny):
    done = run(mixchat, tiny)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode().splitlines()
    assert lines[1] == "2 layers of 4 experts, 2 a token; experts in nf4"
    assert lines[2] == "Limits: memory 1.0 GB/s, matrix products 0.00 TFLOP/s, disk 3.0 GB/s"
    assert lines[3].startswith("Cold: first token after ")
    head, decode, prompt = lines[5:]
    assert head.split("  ")[0] == ""
    assert [part for part in head.split() if part.isupper()] == [
        *("TOKENS/S", "FROM", "TO", "OF", "THE", "LIMIT"),
    ]
    assert decode.startswith("decode behind 0 tokens  ")
    assert decode.endswith("of memory")
    assert prompt.startswith("prompt of 16 tokens  ")
    assert prompt.endswith("of compute")


def test_json_has_each_round(mixchat, tiny):
    done = run(mixchat, tiny, "--json", "--context", "0", "--context", "30", "--kv-bits", "8")
    found = json.loads(done.stdout)
    assert [task["name"] for task in found["tasks"]] == [
        "decode behind 0 tokens",
        "decode behind 30 tokens",
        "prompt of 16 tokens",
    ]
    for task in found["tasks"]:
        assert len(task["mixchat"]) == len(task["limit"]) == 2
        assert task["llama.cpp"] == []
        assert task["to_peer"] is None
    assert found["limits"]["memory"] == [1e9] * 6
    assert found["cold"]["bytes"] > 0


def test_a_peer_stands_beside(mixchat, tiny, python, tmp_path):
    peer = ("--peer", "llama.cpp", "--peer-python", python, "--peer-model", str(tmp_path / "x"))
    done = run(mixchat, tiny, *peer)
    head, decode, prompt = done.stdout.decode().splitlines()[5:]
    assert head.split()[-2:] == ["LLAMA.CPP", "TIMES"]
    assert decode.split()[-2] == prompt.split()[-2] == "2.0"


def test_a_peer_stands_beside_a_model_of_elsewhere_where_nothing_was_ever_kept(
    mixchat, tiny_model, python, tmp_path
):
    """With a new MIXCHAT_HOME it ended with "No such file or directory" for one of its own."""
    peer = ("--peer", "llama.cpp", "--peer-python", python, "--peer-model", str(tmp_path / "x"))
    done = run(mixchat, str(tiny_model), *peer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "LLAMA.CPP" in done.stdout.decode()
    assert not (tmp_path / "home" / "models").exists()


@pytest.mark.parametrize("peer", [False, True])
def test_made_up_models_go_as_they_came_where_nothing_was_ever_kept(
    mixchat, python, tmp_path, monkeypatch, tiny_model, peer
):
    from mixchat.bench import synthetic

    monkeypatch.setattr(
        synthetic, "write_synthetic", lambda place, layers: shutil.copytree(tiny_model, place)
    )
    others = ("--peer", "llama.cpp", "--peer-python", python) if peer else ()
    done = run(mixchat, "--synthetic", "2", *others)
    assert (done.returncode, done.stderr) == (0, b"")
    assert list((tmp_path / "home" / "models").iterdir()) == []


def test_a_picture_is_drawn(mixchat, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    done = run(mixchat, tiny, "--png", str(tmp_path / "a.png"))
    assert done.stderr.decode() == f"wrote {tmp_path / 'a.png'}\n"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a MODEL, or --synthetic LAYERS"),
        (("demo", "--synthetic", "4"), "give a MODEL, or --synthetic LAYERS"),
        (("demo", "--peer", "ollama"), "--peer has to be llama.cpp, not 'ollama'"),
        (("demo", "--peer", "llama.cpp"), "--peer needs --peer-model FILE.gguf"),
        (("demo", "--kv-bits", "4"), "--kv-bits has to be 8 or 16, not 4"),
        (("--synthetic", "33"), "Invalid value for '--synthetic'"),
    ],
)
def test_what_cannot_be_is_refused(mixchat, arguments, said):
    done = run(mixchat, *arguments)
    assert done.returncode == 2
    assert said in done.stderr.decode()
    assert done.stdout == b""


def test_a_peer_that_is_not_there_is_said_before_anything_is_measured(mixchat, tiny, tmp_path):
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    peer = ("--peer", "llama.cpp", "--peer-python", str(path), "--peer-model", "x")
    done = run(mixchat, tiny, *peer)
    assert "needs llama-cpp-python and gguf" in done.stderr.decode()
    assert done.returncode not in (0, 2)
