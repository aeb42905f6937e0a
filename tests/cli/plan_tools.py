"""Speeds of a machine, and the parts of what `plan` says."""

import dataclasses
import re
import time
from types import SimpleNamespace

from mixchat.cli.output import plan_report
from mixchat.loading import plan
from mixchat.planning import measuring
from mixchat.planning.machine_speeds import MachineSpeeds

GB = 10**9
SPEEDS = MachineSpeeds(2e9, 3e9, {1: 0.003, 8: 0.005, 64: 0.03, 512: 0.2}, 0.001)
BLIND = dataclasses.replace(SPEEDS, disk_busy=None, disk_idle=None)


def sections(done):
    """The text of each section, by its title."""
    parts = done.stdout.decode().rstrip("\n").split("\n\n")
    return {title: text for title, _, text in (part.partition("\n") for part in parts)}


def verdict_text(done):
    """The lines under the first title."""
    return done.stdout.decode().split("\n\n")[0].partition("\n")[2]


def verdict(done):
    """The verdict's lines: their labels and what they say."""
    assert (done.returncode, done.stderr) == (0, b"")
    lines = verdict_text(done).splitlines()
    return dict(re.split(" {2,}", line.lstrip(), maxsplit=1) for line in lines if line[2] != " ")


def at(monkeypatch, days):
    """Let it be so many days after some moment, for what measures and what says how long ago."""
    clock = SimpleNamespace(time=lambda: 1.7e9 + 86400 * days, perf_counter=time.perf_counter)
    for module in (measuring, plan_report, plan):
        monkeypatch.setattr(module, "time", clock)
