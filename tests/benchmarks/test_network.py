"""The link between network namespaces: when packets arrive, and their size on the wire."""

import struct

from network import Switch, wire_size

SECOND_A_BYTE = 8.0  # bits a second


def test_a_packet_arrives_after_it_is_sent_and_the_delay():
    assert Switch(3, SECOND_A_BYTE, 5).arrival(10, 0, 2, 2) == 10 + 2 + 5


def test_a_machine_sends_one_packet_after_the_other():
    switch = Switch(3, SECOND_A_BYTE, 5)
    assert [switch.arrival(0, 0, target, 2) for target in (1, 2)] == [7, 9]


def test_a_machine_receives_from_two_others_at_its_own_rate():
    switch = Switch(3, SECOND_A_BYTE, 5)
    assert [switch.arrival(now, now, 2, 2) for now in (0, 1)] == [7, 9]


def test_both_directions_have_the_whole_rate():
    switch = Switch(2, SECOND_A_BYTE, 5)
    assert [switch.arrival(0, one, 1 - one, 4) for one in (0, 1)] == [9, 9]


def test_each_segment_of_a_bundle_has_headers_on_the_wire():
    head, segment = 52, 1448
    bundle = struct.pack("=BBHHHH", 0, 1, head, segment, 0, 0) + bytes(head + 3 * segment)
    alone = struct.pack("=BBHHHH", 0, 0, 0, 0, 0, 0) + bytes(head + segment)
    assert wire_size(alone) == 1500 + 38
    assert wire_size(bundle) == 3 * wire_size(alone)
