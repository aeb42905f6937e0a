"""Figures of another machine replace those of this one, and nothing else."""

from dataclasses import replace

import pytest
import torch
from planning_tools import SPEEDS

from mixchat.base import gpu
from mixchat.planning.cards import Card, find_card
from mixchat.planning.fitting import FreeMemory
from mixchat.planning.hardware import InstalledGPU, Machine, ToldMachine
from mixchat.planning.machine_speeds import GPUSpeeds

GB = 10**9
CPU, GPU = torch.device("cpu"), torch.device(gpu.KIND, 0)
HERE = Machine("a CPU", 8, 64 * GB, FreeMemory(40 * GB, limit="control group"), 500 * GB)


def test_with_nothing_told_all_is_as_it_is_here():
    told = ToldMachine()
    assert told.machine(HERE) == HERE
    assert told.device(CPU) == CPU
    assert told.speeds(SPEEDS) == SPEEDS
    assert not told.is_another


@pytest.mark.parametrize(("ram", "free"), [(16 * GB, 14 * GB), (4 * GB, 3 * GB)])
def test_of_ram_that_is_told_the_system_takes_some_and_no_limit_of_this_machine_counts(ram, free):
    found = ToldMachine(ram=ram).machine(HERE)
    assert found == replace(HERE, memory=ram, free=FreeMemory(free))


def test_gpus_that_are_told_stand_beside_the_ram_that_is_here():
    found = ToldMachine(gpus=(Card.of_size(24 * GB), Card.of_size(8 * GB))).machine(HERE)
    assert found.free.host == HERE.free.host
    assert found.free.device == int(23.5 * GB)
    assert found.gpus == (
        InstalledGPU("cuda:0", "a GPU", 24 * GB),
        InstalledGPU("cuda:1", "a GPU", 8 * GB),
    )
    assert found.free.other_gpus == {"cuda:1": int(7.5 * GB)}
    assert found.without_gpus() == HERE


def test_a_named_gpu_has_its_data_sheet_and_another_the_measured_speeds_or_a_cheap_card_s():
    here = GPUSpeeds("a GPU", 5e11, 2.5e10, 4e13, 1e13)
    known = replace(SPEEDS, gpus=(here,))
    unnamed, card = Card.of_size(24 * GB), find_card("RTX 3090")
    assert ToldMachine(gpus=(unnamed,)).speeds(known) == known
    assert ToldMachine(gpus=(card,)).speeds(known).gpus == (GPUSpeeds.of_card(card),)
    first, second = ToldMachine(gpus=(unnamed, unnamed)).speeds(known).gpus
    assert (first, second.source) == (here, "a cheap card")
    assert second.memory < here.memory


def test_a_disk_that_is_told_has_one_speed():
    found = ToldMachine(disk_speed=5 * GB).speeds(SPEEDS)
    assert found == replace(SPEEDS, disk_busy=5e9, disk_idle=5e9)
