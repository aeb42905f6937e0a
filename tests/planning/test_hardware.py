"""Figures of another machine replace those of this one, and nothing else."""

from dataclasses import replace

import pytest
import torch

from mixchat.base import gpu
from mixchat.planning.fitting import FreeMemory
from mixchat.planning.hardware import GPU_BUS, Machine, OtherGPU, ToldMachine
from mixchat.planning.machine_speeds import MachineSpeeds, Measurement
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.known_models import KNOWN

GB = 10**9
CPU, GPU = torch.device("cpu"), torch.device(gpu.KIND, 0)
BLUEPRINT = Blueprint(read_config(KNOWN["instruct"].config), Quantization())
SPEEDS = MachineSpeeds(2e9, 3e9, 1e9, 3e10, None, {"cpu": {1: 0.003, 8: 0.005}}, 0.001)
HERE = Machine("a CPU", 8, 64 * GB, FreeMemory(40 * GB, limit="control group"), 500 * GB)


def test_with_nothing_told_all_is_as_it_is_here():
    known = Measurement(1.7e9, (SPEEDS,))
    told = ToldMachine()
    assert told.machine(HERE) == HERE
    assert told.device(CPU) == CPU
    assert told.measurement(known, BLUEPRINT, CPU) == known
    assert not told.is_another


@pytest.mark.parametrize(("ram", "free"), [(16 * GB, 14 * GB), (4 * GB, 3 * GB)])
def test_of_ram_that_is_told_the_system_takes_some_and_no_limit_of_this_machine_counts(ram, free):
    found = ToldMachine(ram=ram).machine(HERE)
    assert found == replace(HERE, memory=ram, free=FreeMemory(free))


def test_gpus_that_are_told_stand_beside_the_ram_that_is_here():
    found = ToldMachine(gpus=(24 * GB, 8 * GB)).machine(HERE)
    assert found.free.host == HERE.free.host
    assert (found.gpu_memory, found.free.device) == (24 * GB, int(23.5 * GB))
    assert found.other_gpus == (OtherGPU("cuda:1", "a GPU", 8 * GB),)
    assert found.free.other_gpus == {"cuda:1": int(7.5 * GB)}


def test_a_gpu_that_was_measured_keeps_its_speeds_and_another_gets_assumed_ones():
    seconds = {**SPEEDS.expert_seconds, "cuda:0": {1: 2e-4, 8: 4e-4}}
    with_gpu = replace(SPEEDS, copy_bandwidth=2.5e10, expert_seconds=seconds)
    told = ToldMachine(gpus=(24 * GB,))
    known = Measurement(1.7e9, (with_gpu,))
    assert told.measurement(known, BLUEPRINT, GPU) == known
    assumed = told.measurement(Measurement(1.7e9, (SPEEDS,)), BLUEPRINT, GPU).typical
    assert assumed.copy_bandwidth == GPU_BUS
    assert assumed.expert_time(str(GPU), 1) < assumed.expert_time(str(GPU), 64)
    assert assumed.expert_time("cpu", 1) == SPEEDS.expert_time("cpu", 1)


def test_a_disk_that_is_told_has_one_speed():
    known = Measurement(1.7e9, (SPEEDS, SPEEDS))
    found = ToldMachine(disk_speed=5 * GB).measurement(known, BLUEPRINT, CPU)
    for sample in found.samples:
        assert sample.disk_bandwidth == 5e9
        assert sample.disk_bandwidth_idle == sample.disk_bandwidth_fresh == 5e9
        assert sample.expert_seconds == SPEEDS.expert_seconds
