"""`bench`: a small model's speed, beside limits that are quick to measure."""

import json
import re
import shutil

import pytest

from mixchat.bench import rounds

QUICK = ("--rounds", "2", "--tokens", "3", "--prompt", "16", "--device", "cpu")


pytestmark = pytest.mark.usefixtures("known_limits")


@pytest.fixture
def tiny(tiny_model, tmp_path):
    """The tiny model, installed under the name tiny."""
    place = tmp_path / "home" / "models" / "tiny"
    place.parent.mkdir(parents=True)
    shutil.copytree(tiny_model, place)
    return "tiny"


def run(mixchat, *arguments):
    return mixchat("bench", *arguments, *QUICK, fake=False)


def test_a_table_says_how_fast_and_how_near_to_the_limit(mixchat, tiny):
    done = run(mixchat, tiny)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode().splitlines()
    assert (
        lines[1]
        == "2 layers of 4 experts, 2 a token; experts in nf4, attention in int8, head in int8"
    )
    assert lines[2] == "Limits: memory 1.0 GB/s, matrix products 0.00 TFLOP/s, disk 3.0 GB/s"
    assert re.match(r"First token: \S+ s for a prompt of 12 tokens \(\S+ s computing\)", lines[3])
    assert lines[4].startswith("Cold start: ")
    # Four tiny experts may be in memory before the prompt asks for them.
    assert re.fullmatch(
        r"  \S+ s starting, \S+ s loading \S+ GB, (\S+ s waiting for \S+ GB of experts, )?"
        r"\S+ s computing",
        lines[5],
    )
    head, decode, prompt = lines[7:]
    assert head.split("  ")[0] == ""
    assert [part for part in head.split() if part.isupper()] == [
        *("TOK/S", "MIN", "MAX", "OF", "THE", "LIMIT"),
    ]
    assert decode.startswith("decode after 0 tokens  ")
    assert decode.endswith("(memory)")
    assert prompt.startswith("prompt of 16 tokens  ")
    assert prompt.endswith("(compute)")


def test_json_has_each_round_of_the_only_model(mixchat, tiny):
    done = run(mixchat, "--json", "--depth", "0", "--depth", "30", "--kv-bits", "8")
    found = json.loads(done.stdout)
    assert [task["name"] for task in found["tasks"]] == [
        "decode after 0 tokens",
        "decode after 30 tokens",
        "prompt of 16 tokens",
    ]
    for task in found["tasks"]:
        assert len(task["mixchat"]) == len(task["limit"]) == 2
        assert task["llama.cpp"] == []
        assert task["to_peer"] is None
    assert found["limits"]["memory"] == [1e9] * 6
    assert found["cold"]["seconds"] > found["cold"]["loading"] > 0
    assert found["warm"]["seconds"] > 0


def test_with_workers_it_says_how_many_experts_are_where(mixchat, tiny, monkeypatch):
    slots = {"host": 5, "worker": 3}
    monkeypatch.setattr(rounds.Engine, "slots_by_tier", property(lambda engine: slots))
    lines = run(mixchat, tiny).stdout.decode().splitlines()
    assert lines[2] == "Experts: 5 RAM slots, 3 worker slots"
    assert lines[3].startswith("Limits: ")
    assert json.loads(run(mixchat, tiny, "--json").stdout)["slots"] == slots


def test_a_model_of_elsewhere_is_measured_where_nothing_was_ever_installed(
    mixchat, tiny_model, tmp_path
):
    """With a new MIXCHAT_HOME it ended with "No such file or directory" for one of its own."""
    done = run(mixchat, str(tiny_model))
    assert (done.returncode, done.stderr) == (0, b"")
    assert not (tmp_path / "home" / "models").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("demo", "--synthetic", "4"), "give a MODEL or --synthetic LAYERS, not both"),
        (("--synthetic", "33"), "--synthetic has to be at most 32, the layers of instruct, not 33"),
        (("--synthetic", "2", "--shape", "mixtral"), "--shape cannot be 'mixtral'"),
    ],
)
def test_what_cannot_be_is_refused(mixchat, arguments, said):
    done = run(mixchat, *arguments)
    assert done.returncode == 2
    assert said in done.stderr.decode()
    assert done.stdout == b""
