"""`plan`: what a model would do here, said before it is downloaded, with the reasons."""

import dataclasses
import itertools
import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_tokenizer import write_tokenizer

from mixchat.base import machine
from mixchat.cli.output import plan_text
from mixchat.loading import plan
from mixchat.planning import fitting, measuring, torch_threads
from mixchat.planning.machine_speeds import MachineSpeeds
from mixchat.planning.measuring import SAMPLES
from mixchat.planning.worker_split import WorkerOffer
from mixchat.weights.format.manifest import read_manifest, write_manifest

GB = 10**9
SPEEDS = MachineSpeeds(
    2e9, 3e9, 3e9, 3e10, None, {"cpu": {1: 0.003, 8: 0.005, 64: 0.03, 512: 0.2}}, 0.001
)
BLIND = dataclasses.replace(
    SPEEDS, disk_bandwidth=None, disk_bandwidth_idle=None, disk_bandwidth_fresh=None
)
AGAIN = "note: measuring this machine again: "
BUSY = "note: this machine is busy, so the speeds measured "


@pytest.fixture
def measured(monkeypatch):
    """A machine with 16 GB, 14.5 of them free, and 500 GB of free disk, that is measured in no
    time; counts how often."""
    calls = []

    def measure(blueprint, directory, device, layer, **how):
        calls.append(blueprint.expert.stride)
        return SPEEDS

    monkeypatch.setattr(measuring, "take_sample", measure)
    monkeypatch.setattr(measuring, "MOST_SECONDS", 1e6)  # however busy this machine is
    monkeypatch.setattr(fitting, "free_on", lambda device: int(14.5 * GB))
    monkeypatch.setattr(fitting, "tightest_memory_limit", lambda: None)
    monkeypatch.setattr(machine, "total_memory", lambda: 16 * GB)
    monkeypatch.setattr(machine, "free_disk", lambda directory: 500 * GB)
    monkeypatch.setattr(torch_threads, "choose_threads", lambda blueprint: None)
    monkeypatch.setattr(machine.OtherPrograms, "share", lambda self: 0.0)
    return calls


@pytest.fixture
def run(mixchat):
    """Runs `mixchat plan ARGS`, on the CPU unless they name another device."""

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
        "Verdict",
        "This machine",
        "The model: instruct",
        "What goes where",
        "What to expect",
        "With experts in fewer bits",
        "What more memory would give",
        "To download it",
        "The known models on this machine",
    ]
    assert "16 GB, 14.5 GB free" in found["This machine"]
    read = "reads 3 GB/s (tokens get 85% of it), 2 GB/s while the CPU computes"
    assert read in found["This machine"]
    assert "3 ms for a token on the CPU" in found["This machine"]
    assert (
        "256 of 93.6 MB each, 2 of 8 a token in each of 32 layers" in found["The model: instruct"]
    )
    assert "25.7 GB, once it is downloaded" in found["The model: instruct"]
    places = re.findall(r"(\d+) of 256 experts|the other (\d+) experts", found["What goes where"])
    assert sum(int(held or others) for held, others in places) == 256
    assert "'mixchat download instruct --dry-run'" in found["To download it"]
    assert not (Path(environment["MIXCHAT_HOME"]) / "models").exists()


def test_without_a_name_all_known_models_are_compared(run, measured):
    done = run()
    table = sections(done)["The known models on this machine"].splitlines()
    assert max(map(len, table)) <= 80
    assert table[0].split() == ["model", "disk", "tok/s", "experts"]
    assert re.fullmatch(r"  qwen3, qwen3-coder +17\.3 GB +\S+ +79% in RAM, 21% on disk", table[5])
    assert re.fullmatch(r"  gpt-oss +12\.6 GB +\S+ +100% in RAM", table[4])
    assert len({*measured}) == 2  # instruct in 4 and in 3 bits
    made = json.loads(run("--json").stdout)
    ours = next(model for model in made["known_models"] if "instruct" in model["names"])
    assert ours["tokens_per_second"] == pytest.approx(made["tokens_per_second"])
    assert ours["bytes"] == pytest.approx(made["kept_bytes"], rel=1e-3)
    assert json.loads(run("instruct", "--json").stdout)["known_models"] == []
    told = sections(run("--ram", "4GB", "--ctx-size", "512"))["The known models on the machine"]
    assert re.search(r"  8x22b +77\.6 GB +- +does not fit into memory", told)


def test_where_the_usual_model_does_not_fit_the_smallest_known_one_is_planned(run, measured):
    done = run("--ram", "3GB")
    assert done.stderr.decode().startswith("note: instruct does not fit into memory, so this is")
    found = sections(done)
    assert "The model: granite" in found
    assert re.search("instruct, base .* does not fit", found["The known models on the machine"])
    named = run("instruct", "--ram", "3GB")
    assert b"error: not enough memory" in named.stderr


def test_a_router_without_published_figures_is_taken_to_choose_by_chance(run, measured):
    expected = sections(run("qwen3"))["What to expect"]
    assert "all are chosen alike: no figures are published for 8 of 128" in expected
    assert "published" not in sections(run("instruct"))["What to expect"]


def test_fewer_bits_are_compared_with_4_before_a_download(run, measured):
    forms = sections(run())["With experts in fewer bits"]
    held = [int(count) for count in re.findall(r"(\d+) of 256 experts in memory", forms)]
    sizes = re.findall(r"([\d.]+) bits +([\d.]+) GB of disk", forms)
    assert sizes == [("4", "25.7"), ("3", "22"), ("2.5", "15.9"), ("2", "13.8")]
    made = json.loads(run("instruct", "--json").stdout)
    smaller = [made["in_3_bits"], *made["mixes"]]
    assert [made["held"], *(form["held"] for form in smaller)] == held
    assert [form["bits"] for form in made["mixes"]] == ["2.5", "2"]
    assert held == sorted(held)
    assert held[0] < held[1] < held[2]
    assert made["in_3_bits"]["tokens_per_second"] > made["tokens_per_second"]


def test_the_reasons_add_up_to_the_speed(run, measured):
    expected = sections(run())["What to expect"]
    total, computing, reading, less = (
        float(number) * {"ms": 1e-3, "s": 1}[unit]
        for number, unit in re.findall(
            r"([\d.]+) (ms|s)(?: computing| reading \S+ experts| less|$)", expected, re.MULTILINE
        )[:4]
    )
    assert total == pytest.approx(computing + reading - less, rel=0.01)
    speed = float(re.search(r"decode +([\d.]+) tok/s", expected)[1])
    assert speed == pytest.approx(1 / total, rel=0.05)  # it has two digits
    exactly = json.loads(run("--json").stdout)["tokens_per_second"]
    assert exactly == pytest.approx(1 / total, rel=0.01)
    assert "reading 255 experts from disk" in expected  # the first token
    assert re.search(r"context +up to 32768 tokens fit, with fewer experts in memory", expected)


@pytest.mark.parametrize(("free", "grows"), [(4.6, True), (14.5, True), (40, False)])
def test_a_context_that_needs_the_room_of_experts_is_said_to(
    run, measured, monkeypatch, free, grows
):
    monkeypatch.setattr(fitting, "free_on", lambda device: int(free * GB))
    places = sections(run())["What goes where"]
    assert ("as the context fills, fewer experts fit" in places) == grows
    assert re.search(r"; [\d.]+ GB left free", places)


def test_as_json_it_has_all_of_it(run, measured):
    done = run("instruct", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (found["model"], found["kept"], found["download"]) == ("instruct", False, None)
    assert found["kept_bytes"] == 25742086144
    assert found["tokens_per_second"] == pytest.approx(1 / found["cost"]["seconds"])
    parts = found["cost"]
    assert parts["seconds"] == pytest.approx(
        parts["computing"] + parts["copying"] + parts["reading"] - parts["hidden"]
    )
    assert found["first_token"]["seconds"] > 9
    assert found["fit"]["largest_context"] == 32768
    assert found["machine"]["free"] == {
        "host": int(14.5 * GB),
        "device": None,
        "limit": None,
        "others": {},
    }
    assert [more["bytes"] for more in found["what_more_buys"]] == [8 * GB, 16 * GB]
    assert found["speeds"]["expert_seconds"]["cpu"]["8"] == 0.005


def test_a_machine_is_measured_once_for_models_of_one_shape(run, measured):
    for name in ("instruct", "base", "demo", "instruct", "demo"):
        assert run(name).returncode == 0
    assert len(measured) == 2 * 2 * SAMPLES  # in 4 bits and in 3


def test_the_demo_is_planned_with_what_its_building_takes(run, measured):
    done = run("demo")
    found = sections(done)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "nothing that is read more than once" in found["What goes where"]
    assert "all experts are in the fastest memory" in found["What more memory would give"]
    assert re.search(r"fetch +92\.9 MB", found["To download it"])
    download = json.loads(run("demo", "--json").stdout)["download"]
    assert download["fetch_bytes"] == 92871040


def test_an_installed_model_is_planned_as_it_is_installed(run, measured, tiny_model):
    done = run(str(tiny_model))
    found = sections(done)
    assert done.returncode == 0
    assert "To download it" not in found
    assert ", installed" in found[f"The model: {tiny_model}"]
    assert "up to 128 tokens fit" in found["What to expect"]
    made = json.loads(run(str(tiny_model), "--json").stdout)
    assert (made["kept"], made["path"]) == (True, str(tiny_model))


@pytest.mark.parametrize("scales", ["given", "search"])
def test_experts_that_stay_as_they_were_published_are_said_to(
    run, measured, tiny_model, tmp_path, scales
):
    copy = Path(shutil.copytree(tiny_model, tmp_path / "mine"))
    manifest = read_manifest(copy)
    stored = {**manifest.quantization, "scales": scales}
    write_manifest(copy, dataclasses.replace(manifest, quantization=stored))
    experts = sections(run(str(copy)))[f"The model: {copy}"].splitlines()[0]
    assert (" in nf4, as published: 8 of " in experts) == (scales == "given")


def test_a_checkpoint_in_a_directory_is_planned_before_it_is_installed(
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


def test_answers_at_once_take_a_context_each(run, measured):
    one = json.loads(run("--json").stdout)["fit"]
    four = json.loads(run("--parallel", "4", "--json").stdout)["fit"]
    assert four["demand"]["context"] == 4 * one["demand"]["context"]
    assert b"8192 tokens for each of 4 answers at once" in run("--parallel", "4").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--host-memory", "20GB"], 7, b"--host-memory asks for 19.9 GB, 11.9 GB are free"),
        (["--host-memory", "1MB"], 2, b"two experts take"),
        (["--host-memory", "much"], 2, b"cannot read 'much'"),
        (["--device-memory", "1GB"], 2, b"--device-memory is for a GPU"),
        (["--ctx-size", "0"], 2, b"--ctx-size has to be 1 or more"),
        (["--ctx-size", "99999"], 2, b"this model takes 2 to 32768 tokens"),
        (["--device", "abacus"], 2, b"'abacus' is not a device"),
        (["--device", "cuda:0,abacus"], 2, b"'abacus' is not a device"),
        (["--device", "cuda:0,"], 2, b"'' is not a device"),
        (["--device", "cuda:1,cuda:1"], 2, b"names 'cuda:1' twice"),
        (["--device", "cpu,cuda:0"], 2, b"'cpu' has to stand alone"),
        (["--device", "cuda,cuda:1"], 2, b"'cuda' has to stand alone"),
        (["--device", "cuda:98,cuda:99"], 2, b"'cuda:98': torch sees"),
        (["--device", "cuda:256"], 2, b"'cuda:256' is not a device"),
        (["--device-memory", "8GB,much"], 2, b"cannot read 'much'"),
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
    monkeypatch.setattr(fitting, "free_on", lambda device: GB)
    done = run("instruct")
    assert done.returncode == 7
    assert b"the model needs at least 2.8 GB" in done.stderr
    assert measured == []


def at(monkeypatch, days):
    """Let it be so many days after some moment, for what measures and what says how long ago."""
    clock = SimpleNamespace(time=lambda: 1.7e9 + 86400 * days, perf_counter=time.perf_counter)
    for module in (measuring, plan_text, plan):
        monkeypatch.setattr(module, "time", clock)


def test_a_measurement_has_a_date_and_can_be_made_again(run, measured, monkeypatch):
    """A measurement stayed for good, without a date, even one of a busy machine."""
    at(monkeypatch, 0)
    assert "(now), 3 samples; --measure measures again" in sections(run())["This machine"]
    at(monkeypatch, 3.5)
    slower = dataclasses.replace(SPEEDS, layer_seconds=0.01)
    monkeypatch.setattr(measuring, "take_sample", lambda *_, **how: slower)
    made = json.loads(run("--json").stdout)
    assert (made["measured_at"], made["samples"]) == (1.7e9, SAMPLES)
    assert re.search(
        r"measured +2023-11-1\d \d\d:\d\d \(3 days ago\)", sections(run())["This machine"]
    )
    again = json.loads(run("--json", "--measure").stdout)
    assert again["measured_at"] == 1.7e9 + 3.5 * 86400
    assert again["tokens_per_second"] < made["tokens_per_second"]
    assert json.loads(run("--json").stdout) == again


@pytest.mark.parametrize(
    ("then", "now", "days", "said"),
    [
        (0.1, 0.1, 29, ""),
        (0.1, 0.1, 31, f"{AGAIN}the last time was 31 days ago\n"),
        (0.9, 0.1, 0.1, f"{AGAIN}it was busy the last time, 2 hours ago\n"),
        (0.9, 0.1, 0.001, ""),
        (0.1, 0.9, 31, f"{BUSY}31 days ago are used\n"),
        (0.9, 0.9, 0.1, f"{BUSY}2 hours ago are used\n"),
    ],
)
def test_what_is_outdated_is_measured_again_unless_the_machine_is_busy(
    run, measured, monkeypatch, then, now, days, said
):
    """On a busy machine a saved measurement was replaced by a worse one, which took minutes."""
    monkeypatch.setattr(machine.OtherPrograms, "share", lambda self: then)
    at(monkeypatch, 0)
    assert run("demo").stderr == b""
    before = len(measured)
    monkeypatch.setattr(machine.OtherPrograms, "share", lambda self: now)
    at(monkeypatch, days)
    done = run("demo")
    again = said.startswith(AGAIN)
    assert (len(measured) > before) == again
    assert done.stderr.decode() == said  # once, for 4 bits and for 3
    busy = b"measured on a busy machine" in done.stdout
    assert busy == (then > 0.5 and not again)


def test_a_second_form_is_left_out_if_the_first_took_all_the_time(run, measured, monkeypatch):
    """On a busy machine `plan` measured for five minutes, twice as many figures as it needed."""
    clock = SimpleNamespace(now=0.0, time=time.time, perf_counter=lambda: clock.now)

    def measure_slowly(*_, **how):
        clock.now += 30
        return SPEEDS

    for module in (measuring, plan):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(measuring, "MOST_SECONDS", 20)
    monkeypatch.setattr(measuring, "take_sample", measure_slowly)
    done = run()
    assert clock.now == 30
    assert "With experts in fewer bits" not in sections(done)
    assert done.stderr.startswith(b"note: 3 bits are not compared: ")
    again = json.loads(run("--json").stdout)
    assert (again["samples"], again["in_3_bits"] is None) == (1, False)


def test_a_model_that_was_downloaded_since_is_measured_again_with_its_own_files(
    run, measured, tiny_model, environment
):
    """A host's cache holds a file that was just written, and gives that faster than a model."""
    assert run(str(tiny_model)).stderr == b""
    saved = Path(environment["MIXCHAT_HOME"]) / "machine.json"
    made = saved.read_text()
    assert str(tiny_model) in made
    saved.write_text(made.replace(str(tiny_model), str(tiny_model.parent)))
    said = b"note: measuring this machine again: the last time a file just written was read"
    assert run(str(tiny_model)).stderr.startswith(said)
    assert len(measured) == 2 * SAMPLES
    assert run(str(tiny_model)).stderr == b""
    assert len(measured) == 2 * SAMPLES


def test_it_says_on_what_it_was_measured(run, measured, monkeypatch, environment):
    monkeypatch.setattr(machine, "cpu_name", lambda: "Abacus 3000")
    found = sections(run())["This machine"]
    assert "on Abacus 3000, and the disk of /" in found
    on = json.loads(run("--json").stdout)["measured_on"]
    assert on["cpu"] == "Abacus 3000"
    assert Path(environment["MIXCHAT_HOME"]).is_relative_to(on["directory"])


def test_speeds_and_the_first_token_are_ranges_over_the_samples(run, measured, monkeypatch):
    samples = itertools.cycle(
        dataclasses.replace(
            SPEEDS, layer_seconds=seconds, disk_bandwidth_idle=disk, disk_bandwidth_fresh=disk
        )
        for seconds, disk in ((0.001, 4e9), (0.004, 3e9), (0.02, 2e9))
    )
    monkeypatch.setattr(measuring, "take_sample", lambda *_, **how: next(samples))
    done = sections(run())
    expected = done["What to expect"]
    assert re.search(r"speed +\S+ to \S+ tok/s, ", done["Verdict"])
    assert re.search(r"decode +\S+ to \S+ tok/s: a token takes ", expected)
    assert " to " in done["What more memory would give"]
    assert re.search(r"prompt +\S+ to \S+ tok/s: 512 tokens are read in .* (s|min)\n", expected)
    assert re.search(r"first token +after \d+ to \d+ s for a prompt of 20 tokens", expected)
    found = json.loads(run("--json").stdout)
    assert found["speed"]["low"] < found["tokens_per_second"] < found["speed"]["high"]
    prompt, first = found["prompt"], found["first_token"]
    assert (prompt["tokens"], first["tokens"]) == (512, 20)
    assert prompt["low"] < prompt["high"]
    assert first["low"] < first["seconds"] < first["high"]


def test_the_verdict_is_in_words(run, measured, monkeypatch):
    for factor, words in ((0.1, "faster than you read"), (10, "much slower than you read")):
        seconds = {"cpu": {1: 0.003 * factor, 8: 0.005 * factor, 512: 0.2 * factor}}
        changed = dataclasses.replace(SPEEDS, expert_seconds=seconds, layer_seconds=0.001 * factor)
        monkeypatch.setattr(measuring, "take_sample", lambda *_, it=changed, **how: it)
        monkeypatch.setattr(fitting, "free_on", lambda device: 64 * GB)
        _, speed, _ = sections(run("--measure"))["Verdict"].splitlines()
        assert speed.endswith(words)
        assert json.loads(run("--json").stdout)["verdict"] == words


def verdict(done):
    """The verdict's three lines: their labels and what they say."""
    assert (done.returncode, done.stderr) == (0, b"")
    lines = sections(done)["Verdict"].splitlines()
    return dict(re.split(" {2,}", line.strip(), maxsplit=1) for line in lines)


def test_the_verdict_says_what_fits_how_fast_it_is_and_what_to_type(run, measured, tiny_model):
    """ "It fits ... use a smaller model" contradicted itself, and nothing said how to go on."""
    found = verdict(run())
    held = json.loads(run("--json").stdout)["held"]
    assert found == {
        "it fits": f"{held} of 256 experts in RAM, {256 - held} on disk, read when a token needs "
        "them",
        "speed": found["speed"],
        "type": "mixchat download instruct",
    }
    installed = verdict(run(str(tiny_model), "--ctx-size", "64", "--host-memory", "50%"))
    assert installed["it runs here"].startswith("4 of 8 experts in RAM, 4 on disk")
    assert installed["type"] == (
        f"mixchat run -m {tiny_model} --ctx-size 64 --device cpu --host-memory 50%"
    )


def test_with_answers_at_once_it_says_whose_speed_is_which(run, measured):
    """`--parallel 4` gave one speed without saying whose."""
    speed = verdict(run("--parallel", "4"))["speed"]
    each, together = map(float, re.findall(r"([\d.]+) tok/s", speed))
    assert " tok/s for each of 4 answers at once, " in speed
    assert " tok/s together" in speed
    assert together == pytest.approx(4 * each, rel=0.1)  # they have two digits
    found = json.loads(run("--parallel", "4", "--json").stdout)
    assert found["together"]["low"] == pytest.approx(4 * found["speed"]["low"])
    alone = json.loads(run("--ctx-size", "32768", "--json").stdout)  # takes as much memory
    assert found["held"] == alone["held"]
    assert found["speed"]["high"] < alone["speed"]["high"] < found["together"]["high"]


def test_an_installed_model_for_answers_at_once_is_served(run, measured, tiny_model):
    command = verdict(run(str(tiny_model), "--parallel", "2"))["type"]
    assert command == f"mixchat serve -m {tiny_model} --parallel 2 --device cpu"


def test_another_machine_is_planned_by_what_is_told_about_it(run, measured, monkeypatch):
    """A plan was only for the machine at hand, and what it could not measure was made up."""
    at(monkeypatch, 0)
    monkeypatch.setattr(measuring, "take_sample", lambda *_, **how: BLIND)
    told = ("--ram", "10GB", "--disk-speed", "1.5 GB/s", "--free-disk", "100GB")
    shown = sections(run(*told))
    assert "This machine" not in shown
    assert "To download it" not in shown  # is about this machine's disk and memory
    there = shown["The machine"]
    assert "RAM       10 GB (told), 8 GB free (assumed)" in there
    assert "disk      100 GB free (told), reads 1.5 GB/s (told; tokens get 85% of it)" in there
    found = json.loads(run(*told, "--json").stdout)
    assert found["told"] == {
        "ram": 10 * GB,
        "gpus": [],
        "disk_speed": 1.5e9,
        "free_disk": 100 * GB,
    }
    assert found["assumed"] is None
    # The same as on a machine that has all that.
    monkeypatch.setattr(fitting, "free_on", lambda device: 8 * GB)
    same = dataclasses.replace(
        SPEEDS, disk_bandwidth=1.5e9, disk_bandwidth_idle=1.5e9, disk_bandwidth_fresh=1.5e9
    )
    monkeypatch.setattr(measuring, "take_sample", lambda *_, **how: same)
    there = json.loads(run("--json").stdout)
    for key in ("fit", "cost", "held", "tokens_per_second", "what_more_buys", "first_token"):
        assert found[key] == there[key]


def test_a_gpu_that_is_told_about_has_speeds_that_are_said_to_be_assumed(mixchat, measured):
    arguments = ("plan", "--ram", "32GB", "--gpu", "12GB,8GB")
    done = mixchat(*arguments, fake=False)
    there = sections(done)["The machine"]
    assert "GPU       a GPU, 12 GB (told), 11.5 GB free (assumed)" in there
    assert "cuda:1    a GPU, 8 GB (told), 7.5 GB free (assumed)" in there
    assert "300 GB/s from its memory, 12 GB/s from RAM, 20 TFLOP/s" in there
    assert "(of a GPU whose speed is assumed)" in verdict(done)["speed"]
    found = json.loads(mixchat(*arguments, "--json", fake=False).stdout)
    assert found["assumed"] == {"gpu_memory": 3e11, "gpu_bus": 1.2e10, "gpu_compute": 2e13}
    assert found["machine"]["free"]["others"] == {"cuda:1": int(7.5 * GB)}
    assert found["device"] == "cuda:0"
    expert = found["fit"]["demand"]["expert"]
    assert found["speeds"]["expert_seconds"]["cuda:0"]["1"] == pytest.approx(expert / 3e11, rel=0.1)
    assert found["cost"]["copying"] > 0
    one = json.loads(mixchat("plan", "--ram", "32GB", "--gpu", "12GB", "--json", fake=False).stdout)
    assert found["hit_rate"] > one["hit_rate"]
    assert found["tokens_per_second"] > one["tokens_per_second"]


@pytest.mark.parametrize(("free", "fits"), [("20GB", False), ("100GB", True)])
def test_a_disk_that_is_told_about_is_one_without_the_model(run, measured, free, fits):
    found = json.loads(run("--free-disk", free, "--json").stdout)
    assert found["fits"] is fits
    assert found["disk"][0]["free_bytes"] == int(free[:-2]) * GB
    assert found["command"] == ("mixchat download instruct" if fits else None)


def test_experts_of_other_bits_are_planned_before_they_are_downloaded(run, measured):
    """`plan` named --expert-bits as advice, and did not take it."""
    four, three = (json.loads(run("--expert-bits", bits, "--json").stdout) for bits in ("4", "3"))
    assert four["quantization"]["quant_type"] == "nf4"
    assert three["quantization"]["quant_type"] == "nf3"
    assert three["kept_bytes"] == json.loads(run("--json").stdout)["in_3_bits"]["kept_bytes"]
    assert three["held"] > four["held"]
    assert three["command"] == "mixchat download instruct --expert-bits 3"
    assert (four["in_3_bits"], three["in_3_bits"]) == (None, None)


def test_other_bits_of_an_installed_model_are_those_of_a_second_download(
    run, mixchat, measured, make_checkpoint
):
    source = write_tokenizer(make_checkpoint(vocab_size=262, hidden_size=128))
    assert mixchat("download", str(source), "--name", "mine", fake=False).returncode == 0
    same = json.loads(run("mine", "--expert-bits", "4", "--json").stdout)
    assert (same["kept"], same["command"]) == (True, "mixchat run -m mine --device cpu")
    other = json.loads(run("mine", "--expert-bits", "3", "--json").stdout)
    assert (other["kept"], other["quantization"]["quant_type"]) == (False, "nf3")
    assert Path(other["path"]).name == "mine-3bit"
    assert other["command"] == f"mixchat download {source} --expert-bits 3 --name mine-3bit"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ram", "50%"], b"--ram: '50%' is a part of nothing"),
        (["--ram", "much"], b"--ram: cannot read 'much' as an amount of memory"),
        (["--gpu", "24GB,"], b"--gpu: cannot read '' as"),
        (["--disk-speed", "fast"], b"--disk-speed: cannot read 'fast' as"),
        (["--disk-speed", "3GB/h"], b"--disk-speed: cannot read '3GB/h' as"),
        (["--free-disk", "no"], b"--free-disk: cannot read 'no' as"),
        (["--gpu", "24GB", "--device", "cpu"], b"--gpu tells about a GPU of another machine"),
        (["--expert-bits", "5"], b"'5'"),
    ],
)
def test_what_cannot_be_told_is_refused_before_torch_loads(run, measured, arguments, said):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    assert said in done.stderr
    assert measured == []


def test_a_download_for_which_the_disk_is_too_small_is_the_verdict(run, measured, monkeypatch):
    """With 2 GB free it promised tokens a second of a model whose download takes 30."""
    monkeypatch.setattr(machine, "free_disk", lambda directory: 2 * GB)
    done = run()
    assert done.returncode == 0
    first, *rest = sections(done)
    assert first == "Verdict"
    assert "What to expect" in rest
    lines = sections(done)["Verdict"].splitlines()
    assert re.search(
        r"it does not fit +28\.0 GB of disk are missing: the download takes up to 30\.0 GB in "
        r"\S+, 2 GB are free$",
        lines[0],
    )
    assert re.search(r"speed +\S+ tok/s", lines[1])
    assert re.search(r"to do .* set MIXCHAT_HOME to a directory on a larger disk", lines[2])
    found = json.loads(run("--json").stdout)
    assert found["fits"] is False
    (need,) = found["disk"]
    assert need["path"] == found["path"]
    assert (need["needed_bytes"] // GB, need["free_bytes"]) == (29, 2 * GB)


def test_a_disk_with_room_is_no_obstacle_and_an_installed_model_needs_none(
    run, measured, monkeypatch, tiny_model
):
    found = json.loads(run("--json").stdout)
    assert found["fits"] is True
    assert found["disk"][0]["needed_bytes"] // GB == 33  # with room, it fetches ahead
    monkeypatch.setattr(machine, "free_disk", lambda directory: 0)
    installed = json.loads(run(str(tiny_model), "--json").stdout)
    assert (installed["fits"], installed["disk"]) == (True, [])
    assert "it runs here" in sections(run(str(tiny_model)))["Verdict"]
    demo = json.loads(run("demo", "--json").stdout)
    assert demo["fits"] is False
    assert demo["disk"] == demo["download"]["disk"]


def test_what_an_unfinished_download_has_already_is_not_needed_again(run, measured, monkeypatch):
    before = json.loads(run("--json").stdout)
    monkeypatch.setattr(machine, "disk_usage", lambda path: 20 * GB)
    after = json.loads(run("--json").stdout)
    spared = before["disk"][0]["needed_bytes"] - after["disk"][0]["needed_bytes"]
    assert spared == 20 * GB


def test_what_limits_the_memory_from_outside_is_named(run, measured, monkeypatch):
    monkeypatch.setattr(fitting, "tightest_memory_limit", lambda: "control group")
    assert "16 GB, 14.5 GB free (limit: control group)" in sections(run())["This machine"]
    monkeypatch.setattr(fitting, "free_on", lambda device: GB)
    done = run("instruct")
    assert done.returncode == 7
    assert b"hint: A limit on this process allows no more (control group): raise it." in done.stderr


def test_an_unmeasured_disk_leaves_the_speed_unknown(run, measured, monkeypatch):
    monkeypatch.setattr(measuring, "take_sample", lambda *_, **how: BLIND)
    found = sections(run())
    assert "unknown, because the disk could not be measured" in found["What to expect"]
    assert "not measured" in found["This machine"]


@pytest.fixture
def offered(monkeypatch):
    """Workers with these offers, whatever their addresses; returns the list to fill."""
    offers = []
    monkeypatch.setattr(plan, "ask_workers", lambda installed, options: offers)
    return offers


def test_with_workers_it_says_who_holds_what_and_how_fast_it_is_with_them_and_without(
    run, measured, offered, tiny_model
):
    offered += [
        WorkerOffer("10.0.0.2:7917", 3, 0.004, 2e-4),
        WorkerOffer("10.0.0.3:80", 4, 0.0035, 1e-3),
    ]
    arguments = (str(tiny_model), "--host-memory", "40%", "--worker", "10.0.0.2")
    shown = sections(run(*arguments))
    assert list(shown)[4:6] == ["What to expect", "With workers"]
    lines = [
        re.split(" {2,}", line.strip(), maxsplit=1) for line in shown["With workers"].split("\n")
    ]
    assert lines[:-1] == [
        ["10.0.0.2:7917", "holds 3 experts, with room for 3"],
        ["takes 4 ms for an expert and a token, and 0.2 ms for the way there and back"],
        ["10.0.0.3:80", "holds 4 experts, with room for 4"],
        ["takes 3.5 ms for an expert and a token, and 1 ms for the way there and back"],
        ["this machine", "holds 3 experts, 1 of them beside a worker"],
        ["disk", "nothing that is read more than once"],
        ["decode", lines[6][1]],
        [lines[7][0]],
    ]
    assert re.fullmatch(r"\d+ tok/s: a token takes [\d.]+ ms", lines[6][1])
    assert re.fullmatch(r"[\d.]+ ms computing", lines[7][0])
    assert re.fullmatch(r"[\d.]+ ms waiting for workers, beyond .*", lines[8][0])
    alone = re.search(r"decode +(.* tok/s)", shown["What to expect"])[1]
    with_them = re.match(r".* tok/s", lines[6][1])[0]
    assert f"{with_them} with 2 workers, {alone} without, faster than you read" in shown["Verdict"]


def test_as_json_it_has_what_workers_offer_and_hold(run, measured, offered, tiny_model):
    assert json.loads(run(str(tiny_model), "--json").stdout)["workers"] is None
    offered.append(WorkerOffer("10.0.0.2:7917", 2, 0.004, 2e-4))
    arguments = (str(tiny_model), "--host-memory", "40%", "--worker", "10.0.0.2", "--json")
    found = json.loads(run(*arguments).stdout)
    assert found["workers"]["offers"] == [
        {
            "address": "10.0.0.2:7917",
            "slots": 2,
            "expert_seconds": 0.004,
            "round_trip": 2e-4,
            "held": 2,
        }
    ]
    assert found["workers"]["experts"] == {"here": 3, "copies": 0, "workers": 2, "disk": 3}
    assert found["workers"]["cost"]["waiting"] > 0
    rate = found["workers"]["tokens_per_second"]
    assert rate == pytest.approx(1 / found["workers"]["cost"]["seconds"])
    assert rate != found["tokens_per_second"]


def test_workers_are_of_no_use_before_the_model_is_installed(run, measured, offered):
    done = run("instruct", "--worker", "10.0.0.2")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().splitlines() == [
        "error: --worker is for an installed model, and instruct is not installed",
        "hint: Workers serve only the same model as this machine's: install it on each of them.",
    ]
    assert measured == []
