"""`plan`: what a model would do here, said before it is downloaded, with the reasons."""

import json
import re
from pathlib import Path

import pytest
from plan_tools import GB, sections, verdict, verdict_text

from mixchat.base import machine
from mixchat.base.quantities import format_size
from mixchat.install.make.outline import known_blueprints

LAST = "Speeds are estimates by one measurement of this machine (now)."


def test_mixtral_is_planned_before_it_is_downloaded(planned, measured, environment):
    """ "It fits ... use a smaller model" contradicted itself, and nothing said how to go on."""
    done = planned("instruct")
    assert [*sections(done)] == ["instruct on this machine", "With experts in fewer bits", LAST]
    held = json.loads(planned("instruct", "--json").stdout)["held"]
    found = verdict(done)
    assert found["it fits"] == f"{held} of 256 experts in RAM, {256 - held} read from disk"
    assert found["RAM"] == "14.5 GB of 16 GB free"
    assert found["needs"] == "24 GB of experts, 1.52 GB of shared weights"
    assert found["context"] == "1.07 GB for 8,192 tokens"
    assert found["disk"] == "25.7 GB, once it is downloaded; 500 GB free"
    assert re.fullmatch(r"reads 512 tokens in .* s, 12 tokens in .* s once loaded", found["prompt"])
    assert found["next"] == "mixchat download instruct"
    assert not (Path(environment["MIXCHAT_HOME"]) / "models").exists()


def test_an_installed_model_runs_with_the_planned_options(planned, measured, tiny_model):
    installed = verdict(planned(str(tiny_model), "--ctx-size", "64", "--host-memory", "50%"))
    assert installed["it runs here"].startswith("4 of 8 experts in RAM, 4 read")
    assert installed["next"] == (
        f"mixchat run -m {tiny_model} --ctx-size 64 --device cpu --host-memory 50%"
    )


def test_without_a_name_all_known_models_are_compared(planned, measured):
    done = planned("--ram", "16GB")
    table = sections(done)["Known models on the machine"].splitlines()
    assert max(map(len, table)) <= 80
    assert table[0].split() == ["model", "download", "disk", "tok/s", "GPQA", "experts"]
    sizes = {names[0]: format_size(made.weights_size) for names, made in known_blueprints().items()}
    row = rf"  qwen3, qwen3-coder +61 GB +{sizes['qwen3']} +\S+ +70%, - +\d\d% RAM \d+% disk"
    assert len([line for line in table if re.fullmatch(row, line)]) == 1
    row = rf"  gpt-oss +14 GB +{sizes['gpt-oss']} +\S+ +72% +100% RAM"
    assert len([line for line in table if re.fullmatch(row, line)]) == 1
    assert len({*measured}) == 1  # instruct in 4 bits
    made = json.loads(planned("--json").stdout)
    assert (made["model"], made["recommended"], made["sizes"]) == ("gpt-oss", True, [])
    ours = next(model for model in made["known_models"] if "gpt-oss" in model["names"])
    assert ours["gpqa"] == {
        "gpt-oss": {"percent": 71.5, "source": "arXiv 2508.10925", "date": "2025-08"}
    }
    assert ours["tokens_per_second"] == pytest.approx(made["tokens_per_second"])
    assert ours["bytes"] == made["kept_bytes"]
    assert json.loads(planned("instruct", "--json").stdout)["known_models"] == []
    told = sections(planned("--ram", "4GB", "--ctx-size", "512"))["Known models on the machine"]
    assert re.search(r"  8x22b +281 GB +77\.6 GB +- +- +does not fit into memory", told)
    assert table[-1].split()[:2] == ["instruct,", "base"]


def test_one_model_is_recommended_with_its_sizes_speed_and_quality(planned, measured, mixchat):
    """`plan` opened with Mixtral, at half a token a second, and its download of 93 GB."""
    done = planned("--ram", "16GB")
    assert next(iter(sections(done))) == "Recommended for the machine: gpt-oss"
    lines = verdict(done)
    assert lines["it fits"] == "768 of 768 experts in RAM"
    assert re.fullmatch(r"[\d.]+ tok/s, faster than you read", lines["speed"])
    assert lines["size"] == "14 GB to download, then 12.3 GB of disk"
    assert lines["quality"] == "72% in GPQA, as its maker published (2025-08)"
    assert lines["next"] == "mixchat download gpt-oss"
    for shown in (done, planned("instruct")):
        assert shown.stdout.splitlines()[-1] == b"'mixchat plan --help' explains how to read this."
    assert b"GPQA is the" in mixchat("plan", "--help").stdout


def test_without_any_model_a_run_names_the_one_for_this_machine(mixchat, measured):
    """It asked for 93 GB of Mixtral. A busy machine would change it if its speed were measured."""
    for command in (("run", "hi"), ("serve",)):
        done = mixchat(*command, fake=False)
        assert (done.returncode, done.stdout) == (4, b"")
        first, hint = done.stderr.decode().splitlines()
        assert first == "error: no model is on this machine yet"
        assert "mixchat download gpt-oss (14 GB, then 12.3 GB of disk)" in hint
        assert "mixchat run -m demo" in hint
    named = mixchat("run", "-m", "qwen3", "hi", fake=False)
    assert b"mixchat download qwen3 (61 GB)" in named.stderr


def test_a_plan_says_that_only_a_models_text_part_is_planned(planned, measured):
    left_out = "parts for images and predicting further tokens are left out"
    assert verdict(planned("qwen3.6"))["text only"] == left_out
    assert verdict(planned("glm-4.7-flash"))["left out"] == "parts for predicting further tokens"
    parts = json.loads(planned("glm-4.7-flash", "--json").stdout)["left_out"]
    assert parts == ["predicting further tokens"]
    assert not {"text only", "left out"} & verdict(planned("granite")).keys()


def test_where_mixtral_does_not_fit_a_smaller_model_is_recommended(planned, measured):
    done = planned("--ram", "3GB")
    assert done.stderr == b""
    found = sections(done)
    assert "Recommended for the machine: granite" in found
    assert re.search("instruct, base .* does not fit", found["Known models on the machine"])
    named = planned("instruct", "--ram", "3GB")
    assert b"error: not enough memory" in named.stderr


def test_fewer_bits_are_compared_with_4_before_a_download(planned, measured):
    table = sections(planned("instruct"))["With experts in fewer bits"].splitlines()
    rows = [re.split(r" {2,}", line.strip()) for line in table[1:6]]
    assert [(bits, size) for bits, size, *_ in rows] == [
        *[("4", "25.7 GB"), ("3", "19.4 GB"), ("2.5", "15.9 GB"), ("2.3", "14.7 GB")],
        ("2", "13.8 GB"),
    ]
    sizes = json.loads(planned("instruct", "--json").stdout)["sizes"]
    assert [f"{size['held'] / 256:.0%}" for size in sizes] == [row[2] for row in rows]
    held = [size["held"] for size in sizes]
    assert held == sorted(held)
    assert held[0] < held[1] < held[-1]
    words = [re.fullmatch(r"(\w+) \(demo \+\d+%, larger models less\)", row[4])[1] for row in rows]
    assert words == ["good", "fair", "low", "low", "poor"]
    rises = [size["demo_loss"]["plain"] or size["demo_loss"]["calibrated"] for size in sizes]
    assert [f"+{rise:.0%}" for rise in rises] == [re.search(r"\+\d+%", row[4])[0] for row in rows]


def test_the_rows_of_a_table_come_from_one_measurement(planned, measured, monkeypatch):
    """4 bits had 1.6 to 7 tok/s, and 3 bits, measured a moment later, had 8 to 9.6."""
    for arguments in ((), ("instruct",)):
        measured.clear()
        found = json.loads(planned(*arguments, "--measure", "--json").stdout)
        assert len(measured) == 1
        rows = found["sizes"] + found["known_models"]
        ours = next(row for row in rows if found["model"] in row.get("names", ["instruct"]))
        assert ours["tokens_per_second"] == pytest.approx(found["tokens_per_second"])
    speeds = [size["tokens_per_second"] for size in found["sizes"]]
    assert speeds == sorted(speeds)


@pytest.mark.parametrize("arguments", [(), ("--ram", "16GB"), ("instruct",)])
def test_the_first_screen_has_at_most_27_lines_of_80_columns(
    planned, measured, monkeypatch, arguments
):
    """65 lines hid the three that a person wants: does it fit, how fast, and what to type."""
    monkeypatch.setattr(machine.OtherPrograms, "share", lambda self: 0.9)
    done = planned(*arguments)
    lines = done.stdout.decode().splitlines()
    assert len(lines) <= 27
    assert max(map(len, lines)) <= 80
    labels = [*verdict(done)]
    assert labels[0] == "it fits"
    assert "speed" in labels
    assert labels[-1] == "next"


def test_the_parts_of_a_token_add_up_to_its_speed(planned, measured):
    number = r"([\d.]+) (ms|s)"
    line = rf"{number} a token: computing {number}, reading {number} \({number} meanwhile\)"
    parts = re.search(line, verdict_text(planned("instruct"))).groups()
    scale = {"ms": 1e-3, "s": 1}
    total, computing, reading, meanwhile = (
        float(count) * scale[unit] for count, unit in zip(parts[::2], parts[1::2], strict=True)
    )
    assert total == pytest.approx(computing + reading - meanwhile, rel=0.01)
    found = json.loads(planned("instruct", "--json").stdout)
    assert found["tokens_per_second"] == pytest.approx(1 / total, rel=0.01)
    assert found["tokens_per_second"] == pytest.approx(1 / found["cost"]["seconds"])
    assert float(verdict(planned("instruct"))["speed"].split()[0]) == pytest.approx(
        found["tokens_per_second"], rel=0.05
    )


def test_as_json_it_has_all_of_it(planned, measured):
    done = planned("instruct", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (found["model"], found["kept"], found["download"]) == ("instruct", False, None)
    assert found["kept_bytes"] == 25741926400
    assert [prompt["tokens"] for prompt in found["prompts"]] == [12, 512]
    assert found["fit"]["largest_context"] == 32768
    assert found["machine"]["free"] == {
        "host": int(14.5 * GB),
        "device": None,
        "limit": None,
        "other_gpus": {},
    }
    assert found["speeds"]["expert_seconds"]["8"] == 0.005


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--host-memory", "20GB"], 7, b"--host-memory asks for 19.9 GB, 11.9 GB are free"),
        (["--device-memory", "1GB"], 2, b"--device-memory is for a GPU"),
        (["--ctx-size", "99999"], 2, b"this model takes 2 to 32768 tokens"),
        (["--device", "abacus"], 2, b"'abacus' is not a device"),
        (["no such model"], 4, b"there is no model"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    planned, measured, arguments, code, said
):
    done = planned(*arguments)
    assert (done.returncode, done.stdout) == (code, b"")
    assert said in done.stderr
    assert b"Traceback" not in done.stderr
    assert measured == []


def test_more_memory_for_experts_than_there_is_is_said(planned, measured):
    """With 500 GB for experts, nothing said that the machine has 16."""
    done = planned("granite", "--host-memory", "500GB")
    assert (done.returncode, done.stderr) == (
        0,
        b"note: --host-memory 500 GB: there are only 16 GB of RAM\n",
    )
    assert planned("granite", "--host-memory", "4GB").stderr == b""
    told = planned("granite", "--host-memory", "500GB", "--ram", "1TB")
    assert told.stderr == b""


def test_with_answers_at_once_it_says_whose_speed_is_which(planned, measured):
    """`--parallel 4` gave one speed without saying whose."""
    speed = verdict(planned("instruct", "--parallel", "4"))["speed"]
    each, together = map(float, re.findall(r"([\d.]+) tok/s", speed))
    assert " tok/s for each of 4 answers at once, " in speed
    assert " tok/s together" in speed
    assert together == pytest.approx(4 * each, rel=0.1)  # they have two digits
    found = json.loads(planned("instruct", "--parallel", "4", "--json").stdout)
    assert found["together"] == pytest.approx(4 * found["tokens_per_second"])


def test_a_busy_machine_is_named_within_80_columns_for_an_installed_model_too(
    planned, measured, monkeypatch, tiny_model
):
    """'mixchat plan --measure' was the advice, which measures for the default model instead."""
    monkeypatch.setattr(machine.OtherPrograms, "share", lambda self: 0.9)
    *lines, command = verdict_text(planned(str(tiny_model))).splitlines()
    assert max(map(len, lines)) <= 80
    assert "mixchat plan" not in lines[-1]
    assert "--measure" in lines[-1]
    assert command.split()[0] == "next"
