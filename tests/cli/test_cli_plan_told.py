"""`plan` for another machine, for other bits, and for disks and memory with limits."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from plan_tools import BLIND, GB, SPEEDS, at, verdict, verdict_text
from tiny_tokenizer import write_tokenizer

from mixchat.base import machine
from mixchat.planning import fitting, measuring


def test_another_machine_is_planned_by_what_is_told_about_it(planned, measured, monkeypatch):
    """A plan was only for the machine at hand, and what it could not measure was made up."""
    at(monkeypatch, 0)
    monkeypatch.setattr(measuring, "take_speeds", lambda *given: BLIND)
    told = ("--ram", "10GB", "--disk-speed", "1.5 GB/s", "--free-disk", "100GB")
    shown = verdict(planned("instruct", *told))
    assert shown["RAM"] == "8 GB of 10 GB free, assumed"
    assert shown["disk"].endswith("; 100 GB free")
    found = json.loads(planned("instruct", *told, "--json").stdout)
    assert found["told"] == {
        "ram": 10 * GB,
        "gpus": [],
        "disk_speed": 1.5e9,
        "free_disk": 100 * GB,
    }
    # The same as on a machine that has all that.
    monkeypatch.setattr(fitting, "free_on", lambda device: 8 * GB)
    same = dataclasses.replace(SPEEDS, disk_busy=1.5e9, disk_idle=1.5e9)
    monkeypatch.setattr(measuring, "take_speeds", lambda *given: same)
    there = json.loads(planned("instruct", "--json").stdout)
    for key in ("fit", "cost", "held", "tokens_per_second", "prompts"):
        assert found[key] == there[key]


@pytest.mark.parametrize(
    ("told", "own"),
    [
        (("--ram", "16GB"), "CPU and disk"),
        (("--gpu", "RTX 4060"), "CPU, RAM and disk"),
        (("--ram", "16GB", "--gpu", "RTX 4060", "--disk-speed", "3GB/s"), "CPU"),
    ],
)
def test_what_another_machine_has_from_this_one_is_said(mixchat, measured, told, own):
    """Only the help said that the speed of the CPU was this machine's."""
    for model in ((), ("qwen3",)):
        lines = mixchat("plan", *model, *told, fake=False).stdout.decode().splitlines()
        assert lines[-2] == f"Estimates with this machine's {own} (measured now)."
        assert max(map(len, lines)) <= 80


def test_two_gpus_of_a_size_have_speeds_that_are_said_to_be_estimates(mixchat, measured):
    arguments = ("plan", "instruct", "--ram", "32GB", "--gpu", "12GB,8GB")
    done = mixchat(*arguments, fake=False)
    shown = verdict(done)
    assert shown["GPU"] == "a GPU, 11.5 GB of 12 GB free"
    assert shown["cuda:1"] == "a GPU, 7.5 GB of 8 GB free"
    assert " experts on the GPUs, " in shown["it fits"]
    assert "an estimate by a cheap card, not measured" in verdict_text(done)
    found = json.loads(mixchat(*arguments, "--json", fake=False).stdout)
    assert [card["source"] for card in found["speeds"]["gpus"]] == ["a cheap card"] * 2
    assert found["device"] == "cuda:0"
    assert found["cost"]["waiting"] > found["cost"]["copying"] == 0


def test_a_machine_whose_gpu_is_too_small_is_planned_for_its_cpu_within_80_columns(
    mixchat, measured
):
    """It was an error, although the CPU has room."""
    arguments = ("plan", "qwen3", "--ram", "64GB", "--gpu", "2GB")
    done = mixchat(*arguments, fake=False)
    assert done.returncode == 0
    lines = verdict_text(done).splitlines()
    assert max(map(len, lines)) <= 80
    assert "the CPU computes, not a GPU: too little memory" in " ".join(verdict_text(done).split())
    found = json.loads(mixchat(*arguments, "--json", fake=False).stdout)
    assert (found["device"], found["machine"]["gpus"]) == ("cpu", [])
    assert "too little memory" in found["reason"]
    assert found["tokens_per_second"] > 0
    sized = mixchat(*arguments, "--device-memory", "1GB", fake=False)
    assert sized.returncode == 2  # a person asked for the GPU


def test_a_known_model_that_the_gpu_cannot_hold_is_planned_for_the_cpu(mixchat, measured):
    """8x22b did "not fit into memory" with a GPU of 8 GB, and did without any GPU."""
    arguments = ("plan", "--ram", "32GB", "--free-disk", "500GB")

    def largest(*flags):
        done = mixchat(*arguments, *flags, "--json", fake=False)
        known = json.loads(done.stdout)["known_models"]
        return next(model for model in known if model["names"] == ["8x22b"])

    without, small, large = largest(), largest("--gpu", "8GB"), largest("--gpu", "RTX 4090")
    assert (without["names"], without["device"]) == (["8x22b"], "cpu")
    assert (small["device"], small["held"]) == ("cpu", without["held"])
    assert large["device"] == "cuda:0"
    done = mixchat(*arguments, "--gpu", "8GB", fake=False)
    table = done.stdout.decode().partition("Known models")[2].splitlines()
    rows = {line.split()[0]: line for line in table if line.startswith("  ")}
    assert "% GPU" in rows["granite"]
    assert "GPU" not in rows["8x22b"]
    assert "% RAM" in rows["8x22b"]


def test_another_machines_disk_is_asked_for_if_this_ones_is_too_small(
    mixchat, measured, monkeypatch
):
    """The advice was to free some disk, on this machine."""
    monkeypatch.setattr(machine, "free_disk", lambda directory: 9 * GB)
    told = ("plan", "8x22b", "--ram", "64GB")
    assert "--free-disk" in verdict(mixchat(*told, fake=False))["next"]
    small = mixchat(*told, "--free-disk", "9GB", fake=False)
    assert "free some disk" in verdict(small)["next"]


def test_a_model_is_recommended_only_if_the_disk_takes_its_download(mixchat, measured):
    """The only advice was to download instruct, with half a token a second."""

    def recommended(disk):
        done = mixchat("plan", "--ram", "16GB", "--free-disk", disk, "--json", fake=False)
        return json.loads(done.stdout)["model"]

    assert recommended("500GB") == "gpt-oss"
    assert recommended("15GB") == "lfm2"  # gpt-oss needs 17 GB meanwhile
    lines = verdict(mixchat("plan", "--ram", "16GB", "--free-disk", "1GB", fake=False))
    assert lines["it does not fit"].endswith("1 GB are free")


def test_experts_of_other_bits_are_planned_before_they_are_downloaded(planned, measured):
    """`plan` named --expert-bits as advice, and did not take it."""
    four, three = (
        json.loads(planned("instruct", "--expert-bits", bits, "--json").stdout)
        for bits in ("4", "3")
    )
    assert four["quantization"]["quant_type"] == "nf4"
    assert three["quantization"]["quant_type"] == "trellis3"
    assert (
        three["kept_bytes"]
        == json.loads(planned("instruct", "--json").stdout)["sizes"][1]["kept_bytes"]
    )
    assert three["held"] > four["held"]
    assert three["command"] == "mixchat download instruct --expert-bits 3"
    assert (four["sizes"], three["sizes"]) == ([], [])


def test_other_bits_of_an_installed_model_are_those_of_a_second_download(
    planned, mixchat, measured, make_checkpoint
):
    source = write_tokenizer(make_checkpoint(vocab_size=262, hidden_size=128))
    assert mixchat("download", str(source), "--name", "mine", fake=False).returncode == 0
    same = json.loads(planned("mine", "--expert-bits", "4", "--json").stdout)
    assert (same["kept"], same["command"]) == (True, "mixchat run -m mine --device cpu")
    other = json.loads(planned("mine", "--expert-bits", "3", "--json").stdout)
    assert (other["kept"], other["quantization"]["quant_type"]) == (False, "trellis3")
    assert Path(other["path"]).name == "mine-3bit"
    assert other["command"] == f"mixchat download {source} --expert-bits 3 --name mine-3bit"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ram", "50%"], b"--ram: '50%' is a part of nothing"),
        (["--disk-speed", "fast"], b"--disk-speed: cannot read 'fast' as"),
        (["--gpu", "24GB", "--device", "cpu"], b"--gpu tells about a GPU of another machine"),
        (["--gpu", "RTX 4061"], b"The nearest: RTX 4060, "),
    ],
)
def test_what_cannot_be_told_is_refused_before_torch_loads(planned, measured, arguments, said):
    done = planned(*arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    assert said in done.stderr
    assert measured == []


def test_a_download_for_which_the_disk_is_too_small_is_the_verdict(planned, measured, monkeypatch):
    """With 2 GB free it promised tokens a second of a model whose download takes 30."""
    monkeypatch.setattr(machine, "free_disk", lambda directory: 2 * GB)
    done = planned("instruct")
    assert done.returncode == 0
    lines = verdict(done)
    assert re.fullmatch(
        r"needs 29\.9 GB of disk while downloading; 2 GB are free in \S+", lines["it does not fit"]
    )
    assert re.match(r"\S+ tok/s", lines["speed"])
    assert "set MIXCHAT_HOME to a directory on a larger one" in lines["next"]
    found = json.loads(planned("instruct", "--json").stdout)
    assert found["fits"] is False
    (need,) = found["disk"]
    assert need["path"] == found["path"]
    assert (need["needed_bytes"] // GB, need["free_bytes"]) == (29, 2 * GB)


def test_a_disk_with_room_is_no_obstacle_and_an_installed_model_needs_none(
    planned, measured, monkeypatch, tiny_model
):
    found = json.loads(planned("instruct", "--json").stdout)
    assert found["fits"] is True
    assert found["disk"][0]["needed_bytes"] // GB == 33  # with room, it fetches ahead
    monkeypatch.setattr(machine, "free_disk", lambda directory: 0)
    installed = json.loads(planned(str(tiny_model), "--json").stdout)
    assert (installed["fits"], installed["disk"]) == (True, [])
    assert "it runs here" in verdict_text(planned(str(tiny_model)))
    demo = json.loads(planned("demo", "--json").stdout)
    assert demo["fits"] is False
    assert demo["disk"] == demo["download"]["disk"]


def test_what_limits_the_memory_from_outside_is_named(planned, measured, monkeypatch):
    monkeypatch.setattr(fitting, "tightest_memory_limit", lambda: "control group")
    shown = verdict(planned("instruct"))
    assert shown["RAM"] == "14.5 GB of 16 GB free, limited by control group"
    monkeypatch.setattr(fitting, "free_on", lambda device: GB)
    done = planned("instruct")
    assert done.returncode == 7
    assert b"hint: A limit on this process allows no more (control group): raise it." in done.stderr


def test_ram_holds_the_experts_that_gpus_do_not(mixchat, measured):
    """RAM was said to hold 138 experts, 94 of them copies, where the GPU had left 44."""
    arguments = ("plan", "instruct", "--ram", "16GB", "--gpu", "22GB")
    found = json.loads(mixchat(*arguments, "--json", fake=False).stdout)
    placement = found["fit"]["placement"]
    on_gpu, slots = placement["slots"], placement["host_slots"]
    assert found["held"] == 256 < on_gpu + slots
    shown = verdict(mixchat(*arguments, fake=False))
    assert shown["it fits"] == f"{on_gpu} of 256 experts on the GPU, {256 - on_gpu} in RAM"


def test_fewer_bits_that_a_gpu_decodes_more_slowly_than_4_are_not_offered(mixchat, measured):
    """3 bits were offered for an H100, which decodes them at four fifths of the speed of 4."""

    def offered(card):
        arguments = ("plan", "qwen3", "--ram", "64GB", "--gpu", card)
        text = mixchat(*arguments, fake=False).stdout.decode()
        found = json.loads(mixchat(*arguments, "--json", fake=False).stdout)
        bits = [size["bits"] for size in found["sizes"]]
        assert ("With experts in fewer bits" in text) == bool(bits)
        note = "the GPU holds all experts in 4 bits; slower in"
        assert (note in text) == bool(found["slower_sizes"])
        return bits, found["slower_sizes"]

    assert offered("H100") == ([], ["3", "2.5", "2.3", "2"])
    bits, slower = offered("RTX 3090")
    assert (bits[0], slower[0]) == ("4", "3")
    assert offered("RTX 4060") == (["4", "3", "2.5", "2.3", "2"], [])  # which 4 bits do not fit


def test_a_plan_for_a_card_says_what_it_assumes_and_how_fast_a_full_context_is(mixchat, measured):
    arguments = ("plan", "qwen3", "--ram", "64GB", "--gpu", "RTX 3090", "--ctx-size", "8192")
    text = verdict_text(mixchat(*arguments, fake=False))
    assert "assumed: 5.3 us for a kernel, 20 us for a wait" in text
    assert "tok/s once the context holds 8,192 tokens" in text
    found = json.loads(mixchat(*arguments, "--json", fake=False).stdout)
    assert found["tokens_per_second_at_full_context"] < 0.9 * found["tokens_per_second"]
