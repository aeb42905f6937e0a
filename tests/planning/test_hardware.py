"""Figures of another machine replace those of this one, and nothing else."""

from dataclasses import replace

import pytest
import torch

from mixchat.base import gpu
from mixchat.planning.cards import Card, find_card
from mixchat.planning.fitting import FreeMemory
from mixchat.planning.gpu_speeds import BUS_PART, GPUSpeeds
from mixchat.planning.hardware import Machine, OtherGPU, ToldMachine
from mixchat.planning.machine_speeds import MachineSpeeds, Measurement

GB = 10**9
CPU, GPU = torch.device("cpu"), torch.device(gpu.KIND, 0)
SPEEDS = MachineSpeeds(2e9, 3e9, 1e9, 3e10, {1: 0.003, 8: 0.005}, 0.001)
HERE = Machine("a CPU", 8, 64 * GB, FreeMemory(40 * GB, limit="control group"), 500 * GB)


def test_with_nothing_told_all_is_as_it_is_here():
    known = Measurement(1.7e9, (SPEEDS,))
    told = ToldMachine()
    assert told.machine(HERE) == HERE
    assert told.device(CPU) == CPU
    assert told.measurement(known) == known
    assert not told.is_another


@pytest.mark.parametrize(("ram", "free"), [(16 * GB, 14 * GB), (4 * GB, 3 * GB)])
def test_of_ram_that_is_told_the_system_takes_some_and_no_limit_of_this_machine_counts(ram, free):
    found = ToldMachine(ram=ram).machine(HERE)
    assert found == replace(HERE, memory=ram, free=FreeMemory(free))


def test_gpus_that_are_told_stand_beside_the_ram_that_is_here():
    found = ToldMachine(gpus=(Card.of_size(24 * GB), Card.of_size(8 * GB))).machine(HERE)
    assert found.free.host == HERE.free.host
    assert (found.gpu_memory, found.free.device) == (24 * GB, int(23.5 * GB))
    assert found.other_gpus == (OtherGPU("cuda:1", "a GPU", 8 * GB),)
    assert found.free.other_gpus == {"cuda:1": int(7.5 * GB)}


def test_a_named_gpu_has_its_data_sheet_and_another_the_measured_speeds_or_a_cheap_card_s():
    here = GPUSpeeds("a GPU", 5e11, 2.5e10, 4e13)
    known = Measurement(1.7e9, (replace(SPEEDS, gpus=(here,)),))
    unnamed, card = Card.of_size(24 * GB), find_card("RTX 3090")
    assert ToldMachine(gpus=(unnamed,)).measurement(known) == known
    (named,) = ToldMachine(gpus=(card,)).measurement(known).typical.gpus
    assert (named.name, named.memory, named.origin) == ("RTX 3090", 936e9, "card")
    assert named.bus == BUS_PART * card.bus
    first, second = ToldMachine(gpus=(unnamed, unnamed)).measurement(known).typical.gpus
    assert (first, second.origin) == (here, "assumed")
    assert second.memory < here.memory


def test_a_disk_that_is_told_has_one_speed():
    known = Measurement(1.7e9, (SPEEDS, SPEEDS))
    found = ToldMachine(disk_speed=5 * GB).measurement(known)
    for sample in found.samples:
        assert sample.disk_bandwidth == 5e9
        assert sample.disk_bandwidth_idle == sample.disk_bandwidth_fresh == 5e9
        assert sample.expert_seconds == SPEEDS.expert_seconds
