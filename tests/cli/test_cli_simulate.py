"""`simulate`: a trace, recorded or synthetic, against caches of several sizes."""

import inspect
import json

import pytest
import typer
from command_line import FAKE
from terminal import Terminal

from mixchat.cli.app import app
from mixchat.cli.simulate import simulate
from mixchat.experts.trace import TraceWriter, read_trace
from mixchat.planning.simulate import hit_rate_table


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A synthetic trace of 2,000 tokens takes seconds."""
    monkeypatch.setattr("mixchat.cli.simulate._TOKENS", 60)


@pytest.fixture
def recorded(tmp_path):
    """Five tokens of prefill, then four of decode, in 2 layers of 4 experts."""
    path = tmp_path / "a.trace"
    with TraceWriter(path, "tiny\x1b[2J", 2, 4, 2) as writer:
        for selected in ([0, 1] * 4 + [2, 3], [0, 1], [0, 1], [1, 0], [0, 2]):
            writer.add(0, selected)
            writer.add(1, selected)
    return path


def test_without_a_trace_it_takes_a_synthetic_one_and_says_so(mixchat):
    done = mixchat("simulate")
    about, blank, head, *rows = done.stdout.decode().splitlines()
    assert (done.returncode, done.stderr, blank) == (0, b"", "")
    assert about.startswith("Synthetic, with the repetitions that the Mixtral paper measured")
    assert about.endswith("60 tokens, 32 layers of 8 experts, 2 a token.")
    assert head.split() == ["CAPACITY", "SLOTS", "LAYERED", "LRU", "LFU", "BELADY"]
    assert [row.split()[:2] for row in rows] == [["25%", "64"], ["50%", "128"], ["75%", "192"]]
    for row in rows:
        layered, lru, lfu, belady = (float(rate.rstrip("%")) for rate in row.split()[2:])
        assert 0 < min(layered, lru, lfu) <= max(layered, lru, lfu) < belady < 100
        assert row.index(row.split()[2]) == head.index("LAYERED")


def test_a_recorded_trace_is_replayed_and_only_its_decode_counts(mixchat, recorded):
    about, _, _, *rows = mixchat("simulate", str(recorded)).stdout.decode().splitlines()
    assert about == (
        f"{recorded}: tiny[2J, 5 tokens of prefill, 4 of decode, 2 layers of 4 experts, "
        "2 a token; hit rates are those of decode."
    )
    assert [row.split()[:2] for row in rows] == [["25%", "2"], ["50%", "4"], ["75%", "6"]]


def test_a_terminal_is_shown_how_far_it_is(recorded, environment):
    """It was silent for nine seconds."""
    with Terminal([*FAKE, "simulate", str(recorded)], environment) as terminal:
        terminal.wait_for("replaying the trace")
        assert terminal.wait_for_end() == 0
    assert terminal.screen.decode().splitlines()[-1].startswith("75%")


def test_each_replay_is_told_when_it_begins(recorded):
    told = []
    rows = hit_rate_table(
        read_trace(recorded), (0.25, 0.5), started=lambda at, of: told.append((at, of))
    )
    count = sum(len(row.hit_rates) for row in rows)
    assert told == [(at, count) for at in range(1, count + 1)]


def test_slots_adds_a_row(mixchat, recorded):
    done = mixchat("simulate", str(recorded), "--slots", "8")
    row = done.stdout.decode().splitlines()[-1]
    assert row.split() == ["100%", "8", *["100.0%"] * 4]


def test_json_is_for_programs(mixchat, recorded):
    said = json.loads(mixchat("simulate", str(recorded), "--json", "--slots", "8").stdout)
    rows = said.pop("rows")
    assert said == {
        "trace": str(recorded),
        "model": "tiny\x1b[2J",
        "layers": 2,
        "experts": 4,
        "experts_per_token": 2,
        "prefill_tokens": 5,
        "decode_tokens": 4,
    }
    assert [row["slots"] for row in rows] == [2, 4, 6, 8]
    assert rows[3] == {
        "capacity": 1.0,
        "slots": 8,
        "hit_rates": {"layered": 1.0, "lru": 1.0, "lfu": 1.0, "belady": 1.0},
    }
    assert json.loads(mixchat("simulate", "--json").stdout)["trace"] is None


def test_a_trace_without_decode_has_no_hit_rates(mixchat, recorded):
    header, prefill, *_ = recorded.read_text().splitlines(keepends=True)
    recorded.write_text(header + prefill)
    rows = mixchat("simulate", str(recorded)).stdout.decode().splitlines()[3:]
    assert [row.split()[2:] for row in rows] == [["-", "-", "-", "-"]] * 3


@pytest.mark.parametrize(
    ("slots", "what"),
    [("0", b"'--slots'"), ("9", b"--slots 9: the model of this trace has 8 experts")],
)
def test_slots_that_cannot_be_are_refused(mixchat, recorded, slots, what):
    done = mixchat("simulate", str(recorded), "--slots", slots)
    assert (done.stdout, done.returncode) == (b"", 2)
    assert what in done.stderr


def test_what_is_not_a_trace_is_refused_in_one_line(mixchat, recorded, tmp_path):
    recorded.write_text(recorded.read_text() + "[[0, 9], [0, 1]]\n")
    done = mixchat("simulate", str(recorded))
    assert (done.stdout, done.returncode) == (b"", 2)
    assert b"a.trace: line 7: layer 0 has '9', not an expert from 0 to 3\n" in done.stderr
    for other in (tmp_path / "missing", tmp_path, ""):
        done = mixchat("simulate", str(other))
        assert (done.stdout, done.returncode) == (b"", 2)
        assert done.stderr.startswith(b"error: ")


def test_help_says_what_it_does():
    command = typer.main.get_command(app).commands["simulate"]
    assert command.help == inspect.getdoc(simulate)
