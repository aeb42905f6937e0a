"""Cards are found by the names that people and drivers give them, with their published figures."""

import pytest

from mixchat.base.errors import UsageError
from mixchat.planning.cards import cards, find_card, parse_cards

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("RTX 4060", ["RTX 4060"]),
        ("nvidia GeForce  rtx4060", ["RTX 4060"]),
        ("4060", ["RTX 4060"]),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", ["RTX 4060 Laptop"]),
        ("rtx 4060ti 16 GB", ["RTX 4060 Ti 16GB"]),
        ("2x RTX 3090", ["RTX 3090", "RTX 3090"]),
        ("2 * 3090, T4", ["RTX 3090", "RTX 3090", "T4"]),
        ("RTX 3090 24GB", ["RTX 3090"]),
        ("NVIDIA H100 80GB HBM3", ["H100"]),
        ("NVIDIA H100 PCIe", ["H100 PCIe"]),
        ("NVIDIA A100-PCIE-40GB", ["A100"]),
        ("NVIDIA A100-SXM4-80GB", ["A100 80GB"]),
        ("NVIDIA RTX 6000 Ada Generation", ["RTX 6000 Ada"]),
        ("AMD Radeon RX 7900 XTX", ["RX 7900 XTX"]),
        ("24GB", ["a GPU"]),
        ("2x 24GB", ["a GPU", "a GPU"]),
    ],
)
def test_a_name_is_found_however_it_is_written(text, names):
    assert [card.name for card in parse_cards(text)] == names


def test_a_card_has_the_figures_of_its_data_sheet():
    card = find_card("RTX 4060")
    assert (card.memory, card.bandwidth, card.bus) == (8 * GIB, 272e9, 15.8e9)
    assert (card.compute, card.lanes, card.capability) == (30e12, 7.5e12, (8, 9))
    assert find_card("MI300X").capability is None


def test_each_card_is_found_by_its_own_name():
    for card in cards():
        assert find_card(card.name) == card


def test_of_cards_with_the_same_name_a_driver_s_memory_decides():
    name = "NVIDIA GeForce RTX 5060 Ti"
    assert find_card(name, 8151 * 2**20).name == "RTX 5060 Ti 8GB"
    assert find_card(name, 16311 * 2**20).name == "RTX 5060 Ti"
    assert find_card("RTX 4090", 48 * GIB) is None  # rebuilt ones exist
    assert find_card("a GPU of a virtual machine") is None


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("RTX 4061", "no card is known as 'RTX 4061'", "The nearest: RTX 4060, "),
        ("abacus", "no card is known as 'abacus'", "A size works, too"),
        ("", "no card is known as ''", "A size works, too"),
        ("GTX 1080 Ti", "compute capability 6.1", ""),
        ("99x T4", "a machine has 1 to 16 GPUs, not 99", ""),
        ("50%", "a part of nothing", ""),
        ("RTX " + 10_000 * "9", "no card is known", ""),
    ],
)
def test_a_name_that_is_unknown_or_cannot_be_used_is_an_error(text, said, hint):
    with pytest.raises(UsageError, match=said) as error:
        parse_cards(text)
    assert hint in (error.value.hint or "")
    assert len(str(error.value)) < 200
