"""tests/gpu.sh, with short steps on a GPU on paper."""

import subprocess
import sys
from pathlib import Path

import paper_gpu
import pytest
from gpu_report import run_all
from gpu_steps import STEPS
from gpu_trial import LEFT_OUT, Step, Trial

SCRIPT = Path(__file__).with_name("gpu.sh")


def programs(**texts: str) -> tuple[list[Step], dict[str, list[str]]]:
    steps = [Step(name, f"{name} is proved", 20, lambda trial: None) for name in texts]
    return steps, {name: [sys.executable, "-c", text] for name, text in texts.items()}


def test_a_step_that_fails_is_reported_and_does_not_end_the_run(tmp_path):
    steps, commands = programs(
        first="print('7 GB/s')",
        crash="import os; print('half'); os.abort()",
        error="raise SystemExit('no card')",
        absent=f"print('torch sees one GPU'); raise SystemExit({LEFT_OUT})",
        last="print('9 GB/s')",
    )
    report = tmp_path / "gpu.txt"
    assert run_all(steps, report, lambda step: commands[step.name]) == 1
    ends = [block.splitlines()[-1] for block in report.read_text().split("\n\n")[1:]]
    rows = [line.split()[:2] for line in ends]
    results = [["first", "ok"], ["crash", "FAILED"], ["error", "FAILED"]]
    assert rows == [*results, ["absent", "left"], ["last", "ok"]]
    for figure in ("    7 GB/s", "    half", "    | no card", "    9 GB/s", "first is proved"):
        assert figure in report.read_text()


def test_a_line_is_in_the_report_as_soon_as_it_is_printed_and_stays_if_the_step_is_killed(tmp_path):
    """A step's lines were written at its end, so a machine that hung left none of them."""
    report = tmp_path / "gpu.txt"
    steps, commands = programs(
        killed=f"""
import os, pathlib, time
print('early', flush=True)
while 'early' not in pathlib.Path({str(report)!r}).read_text():
    time.sleep(0.01)
os.kill(os.getpid(), 9)""",
    )
    assert run_all(steps, report, lambda step: commands[step.name]) == 1
    assert "    early\n" in report.read_text()
    assert "FAILED -9" in report.read_text()


def test_the_report_tells_a_card_s_clocks_and_why_it_slowed_down(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    rows = "1900, 9500, 310.2, 70, 0x0000000000000000\n1500, 9500, 350.0, 83, 0x0000000000000040\n"
    fake.write_text(f"#!/bin/sh\nprintf '{rows}'\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    clocks = tmp_path / "gpu.txt.clocks"
    steps, commands = programs(
        busy=f"""
import pathlib, time
while '0x0000000000000040' not in pathlib.Path({str(clocks)!r}).read_text():
    time.sleep(0.01)""",
    )
    assert run_all(steps, tmp_path / "gpu.txt", lambda step: commands[step.name]) == 0
    told = "1500 to 1900 MHz, 9500 to 9500 MHz of memory, 310 to 350 W, 70 to 83 C"
    assert f"card: {told}, slowed down, by reasons 0x0000000000000040" in " ".join(
        (tmp_path / "gpu.txt").read_text().split()
    )


def test_a_step_ends_with_its_time_and_all_steps_with_theirs(tmp_path):
    steps, commands = programs(slow="import time; time.sleep(60)", next="print(1)")
    steps[0] = steps[0]._replace(limit_s=2)
    report = tmp_path / "gpu.txt"
    assert run_all(steps, report, lambda step: commands[step.name], seconds=3.5) == 1
    assert "FAILED: over 2 s" in report.read_text()
    assert run_all(steps[1:], report, lambda step: commands[step.name], seconds=0) == 1
    assert "no time left" in report.read_text()


def test_steps_without_a_failure_end_with_0(tmp_path):
    steps, commands = programs(first="print(1)")
    assert run_all(steps, tmp_path / "gpu.txt", lambda step: commands[step.name]) == 0


@pytest.mark.slow
def test_the_script_runs_steps_on_a_gpu_on_paper(tmp_path):
    report = tmp_path / "gpu.txt"
    command = [SCRIPT, "card", "llama", "--paper", "--report", report]
    done = subprocess.run(
        ["bash", *command, "--models", tmp_path / "models"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        check=False,
    )
    text = report.read_text()
    assert not done.returncode, text
    assert "GPU on paper" in text
    assert "a graph with a copy to page-locked RAM was captured and replayed" in text
    assert any(line.split()[:3] == ["llama", "left", "out"] for line in text.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("latency", "us a kernel of a graph (assumed 5.3)"),
        ("logits", "half in RAM: cosine of the prompt's logits 1.0"),
        ("trace", "nf4, 3 layers, all in VRAM: 4 launches"),
        ("others", "attention, 64 keys"),
        ("copies", "through the stages of experts"),
        ("long", "24 tokens"),
    ],
)
def test_a_step_runs_on_a_gpu_on_paper(name, told, tmp_path, monkeypatch, capsys):
    for folder in ("loading", "benchmarks"):
        monkeypatch.syspath_prepend(str(SCRIPT.with_name(folder)))
    trial = Trial(True, tmp_path, 1.0, sys.executable, tmp_path / "gpu.txt")
    (step,) = (step for step in STEPS if step.name == name)
    with paper_gpu.in_place_of_cuda():
        step.run(trial)
    assert told in capsys.readouterr().out
