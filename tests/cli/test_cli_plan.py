"""`plan`: what a model would do here, said before it is downloaded, with the reasons."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mixchat import machine
from mixchat.engine import fitting, speeds, threads
from mixchat.experts.calibration import Calibration

GB = 10**9
SPEEDS = Calibration(
    2e9, 3e9, True, 3e10, None, {"cpu": {1: 0.003, 8: 0.005, 64: 0.03, 512: 0.2}}, 0.001
)


@pytest.fixture
def measured(monkeypatch):
    """A machine with 16 GB, 14.5 of them free, that is measured in no time; counts how often."""
    calls = []

    def measure(blueprint, directory, device, compute, layer):
        calls.append(blueprint.expert.stride)
        return SPEEDS

    monkeypatch.setattr(speeds, "measure", measure)
    monkeypatch.setattr(fitting, "free_memory", lambda device: int(14.5 * GB))
    monkeypatch.setattr(fitting, "memory_limit", lambda: None)
    monkeypatch.setattr(machine, "total_memory", lambda: 16 * GB)
    monkeypatch.setattr(threads, "settle_threads", lambda blueprint: None)
    return calls


@pytest.fixture
def run(mixchat):
    """Runs `mixchat plan ARGS`, on the CPU where nothing else is said."""

    def run(*arguments):
        device = () if "--device" in arguments else ("--device", "cpu")
        return mixchat("plan", *arguments, *device, fake=False)

    return run


def sections(done):
    """The text of each section, by its title."""
    parts = done.stdout.decode().rstrip("\n").split("\n\n")
    return {title: text for title, _, text in (part.partition("\n") for part in parts)}


def test_mixtral_is_planned_before_it_is_downloaded(run, measured, environment):
    done = run()
    assert (done.returncode, done.stderr) == (0, b"")
    found = sections(done)
    assert list(found) == [
        "This machine",
        "The model: instruct",
        "What goes where",
        "What to expect",
        "What more memory would give",
        "To download it",
    ]
    assert "16 GB, 14.5 GB free" in found["This machine"]
    assert "reads 3 GB/s, 2 GB/s while the CPU computes" in found["This machine"]
    assert "3 ms for a token on the CPU" in found["This machine"]
    assert (
        "256 of 93.6 MB each, 2 of 8 a token in each of 32 layers" in found["The model: instruct"]
    )
    assert "27.2 GB, once it is downloaded" in found["The model: instruct"]
    assert "'mixchat download instruct --dry-run'" in found["To download it"]
    assert not (Path(environment["MIXCHAT_HOME"]) / "models").exists()


def test_the_reasons_add_up_to_the_speed(run, measured):
    expected = sections(run())["What to expect"]
    total, computing, reading, less = (
        float(number) * {"ms": 1e-3, "s": 1}[unit]
        for number, unit in re.findall(
            r"([\d.]+) (ms|s)(?: computing| reading \S+ experts| less|$)", expected, re.MULTILINE
        )[:4]
    )
    assert total == pytest.approx(computing + reading - less, rel=0.01)
    speed = float(re.search(r"speed +([\d.]+) tokens/s", expected)[1])
    assert speed == pytest.approx(1 / total, rel=0.01)
    assert "reading 255 experts from disk" in expected  # the first token
    assert re.search(r"context +up to 32768 tokens fit, with fewer experts at hand", expected)


def test_where_experts_go_adds_up(run, measured):
    places = sections(run())["What goes where"]
    held = int(re.search(r"(\d+) experts of 256", places)[1])
    others = int(re.search(r"the other (\d+) experts", places)[1])
    assert held + others == 256


@pytest.mark.parametrize(("free", "grows"), [(4.6, True), (14.5, True), (40, False)])
def test_a_context_that_needs_the_room_of_experts_is_said_to(
    run, measured, monkeypatch, free, grows
):
    monkeypatch.setattr(fitting, "free_memory", lambda device: int(free * GB))
    places = sections(run())["What goes where"]
    assert ("a context that fills takes room from the experts" in places) == grows
    assert re.search(r"; [\d.]+ GB left free", places)


def test_as_json_it_has_all_of_it(run, measured):
    done = run("instruct", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (found["model"], found["kept"], found["download"]) == ("instruct", False, None)
    assert found["kept_bytes"] == 27169288192
    assert found["tokens_per_second"] == pytest.approx(1 / found["cost"]["seconds"])
    parts = found["cost"]
    assert parts["seconds"] == pytest.approx(
        parts["computing"] + parts["copying"] + parts["reading"] - parts["hidden"]
    )
    assert found["first_token"]["seconds"] > 10
    assert found["fit"]["largest_context"] == 32768
    assert found["machine"]["free"] == {"host": int(14.5 * GB), "device": None, "limit": None}
    assert [more["bytes"] for more in found["what_more_buys"]] == [8 * GB, 16 * GB]
    assert found["speeds"]["expert_seconds"]["cpu"]["8"] == 0.005


def test_base_is_of_the_same_shape(run, measured):
    plans = [json.loads(run(name, "--json").stdout) for name in ("base", "instruct")]
    assert plans[0]["fit"] == plans[1]["fit"]
    assert plans[0]["path"] != plans[1]["path"]


def test_a_machine_is_measured_once_for_models_of_one_shape(run, measured):
    for name in ("instruct", "base", "demo", "instruct", "demo"):
        assert run(name).returncode == 0
    assert len(measured) == 2


def test_the_demo_is_planned_with_what_its_building_takes(run, measured):
    done = run("demo")
    found = sections(done)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "nothing that is read more than once" in found["What goes where"]
    assert "all experts are in the fastest memory" in found["What more memory would give"]
    assert re.search(r"fetch +92\.9 MB", found["To download it"])
    download = json.loads(run("demo", "--json").stdout)["download"]
    assert download["fetch_bytes"] == 92871040


def test_a_kept_model_is_planned_as_it_is_kept(run, measured, tiny_model):
    done = run(str(tiny_model))
    found = sections(done)
    assert done.returncode == 0
    assert "To download it" not in found
    assert ", here already" in found[f"The model: {tiny_model}"]
    assert "up to 128 tokens fit" in found["What to expect"]
    made = json.loads(run(str(tiny_model), "--json").stdout)
    assert (made["kept"], made["path"]) == (True, str(tiny_model))


def test_a_checkpoint_in_a_directory_is_planned_before_it_is_made_a_kept_one(
    run, measured, tiny_checkpoint
):
    done = run(str(tiny_checkpoint), "--json")
    found = json.loads(done.stdout)
    assert found["kept"] is False
    assert found["download"]["kept_bytes"] == found["kept_bytes"]
    assert found["download"]["source"] == str(tiny_checkpoint)


def test_budgets_and_context_change_the_plan(run, measured):
    for option in ("--host-memory", "--expert-memory"):
        arguments = (option, "5GB", "--ctx-size", "1000", "--json")
        fit = json.loads(run(*arguments).stdout)["fit"]
        assert fit["placement"]["slots"] == 5 * GB // 93585408
        assert fit["context"] == 1000


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--host-memory", "20GB"], 7, b"--host-memory asks for 19.9 GB, 10.2 GB are free"),
        (["--host-memory", "1MB"], 2, b"two experts take"),
        (["--host-memory", "much"], 2, b"cannot read 'much'"),
        (["--device-memory", "1GB"], 2, b"--device-memory is for a GPU"),
        (["--ctx-size", "0"], 2, b"--ctx-size has to be 1 or more"),
        (["--ctx-size", "99999"], 2, b"this model can do 2 to 32768 tokens"),
        (["--device", "abacus"], 2, b"'abacus' is not a device"),
        (["no such model"], 4, b"there is no model"),
        ([""], 2, b"the model's name is empty"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    run, measured, arguments, code, said
):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (code, b"")
    assert said in done.stderr
    assert b"Traceback" not in done.stderr
    assert measured == []


def test_a_model_that_does_not_fit_is_refused_as_run_refuses_it(run, measured, monkeypatch):
    monkeypatch.setattr(fitting, "free_memory", lambda device: GB)
    done = run()
    assert done.returncode == 7
    assert b"the model needs at least 4.5 GB" in done.stderr
    assert measured == []


def test_what_limits_the_memory_from_outside_is_named(run, measured, monkeypatch):
    monkeypatch.setattr(fitting, "memory_limit", lambda: "control group")
    assert "16 GB, 14.5 GB free (limit: control group)" in sections(run())["This machine"]
    monkeypatch.setattr(fitting, "free_memory", lambda device: GB)
    done = run()
    assert done.returncode == 7
    assert b"hint: A limit from outside allows no more (control group): raise it." in done.stderr


def test_an_unmeasured_disk_leaves_the_speed_unknown(run, measured, monkeypatch):
    blind = dataclasses.replace(SPEEDS, disk_bandwidth=None, disk_bandwidth_idle=None)
    monkeypatch.setattr(speeds, "measure", lambda *_: blind)
    found = sections(run())
    assert "unknown, because the disk could not be measured" in found["What to expect"]
    assert "not measured" in found["This machine"]


def test_a_name_that_means_nothing_does_not_wait_for_torch(environment):
    code = "import sys\nfrom mixchat.cli.app import run\ntry:\n run(['plan', 'x'])\n"
    code += "finally:\n print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, env=environment
    )
    assert (done.returncode, done.stdout.split()) == (4, [b"False"])


def test_its_flags_are_those_of_run(run):
    said = run("--help").stdout.decode()
    for flag in ("--ctx-size", "--host-memory", "--device-memory", "--device", "--json"):
        assert flag in said
