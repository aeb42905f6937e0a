"""Network namespaces of this machine as machines of their own, joined by a link of a given speed.

    with network(["chat", "worker1"]) as joined:
        joined.set_link(Link(rate=1e9, round_trip=0.0002))
        server = start(joined.inside("worker1", ["some", "server"]))

It needs root, Linux, iproute2 and util-linux. The link is a process that carries packets between
the namespaces' TUN devices, because `tc netem` is missing in many kernels (of virtual machines,
above all). It does what netem does at both ends, and more: each machine sends at the link's rate
and, unlike there, receives at that rate, too. Packets of 1500 bytes come and go as a network
card's TSO bundles them, and each is counted with Ethernet's own 38 bytes.

Namespaces last as long as their processes, which end with the one that made them, whatever ends it.
"""

from __future__ import annotations

import argparse
import fcntl
import heapq
import itertools
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

# See linux/if_tun.h and linux/virtio_net.h: each packet follows a header of 10 bytes, which says
# how to cut it into segments.
_SET_DEVICE, _SET_OFFLOAD = 0x400454CA, 0x400454D0
_TUN, _NO_INFO, _WITH_HEADER = 0x0001, 0x1000, 0x4000
_CHECKSUMS, _TSO = 1, 2
_HEADER = struct.Struct("=BBHHHH")
_LARGEST = 65536 + _HEADER.size
_ETHERNET = 38  # bytes: preamble, addresses, type, checksum, gap
_SUBNET = "10.79.0."
_SHORT = 30e-6  # seconds: a process that sleeps for less wakes up too late
_DISCARD = 9  # a port without a listener
_HALVINGS = 7  # of the range in which the delay is looked for
_BOUND = ["setpriv", "--pdeathsig", "KILL"]  # ends with the thread that starts it


@dataclass(frozen=True)
class Link:
    """`rate`: bits a second of each machine, each way; `round_trip`: seconds, without sending."""

    rate: float
    round_trip: float

    @classmethod
    def parse(cls, text: str) -> Link:
        """Read `1:0.2`: 1 Gb/s and 0.2 ms."""
        rate, round_trip = map(float, text.split(":"))
        return cls(rate * 1e9, round_trip / 1e3)

    def __str__(self) -> str:
        return f"{self.rate / 1e9:g} Gb/s, {self.round_trip * 1e3:g} ms"


class Switch:
    """The times at which packets arrive: each port sends and receives one byte after the other.

    A packet is received while it is sent, so that only a port that two others send to at once
    delays it. With 1 s for each byte and a delay of 5 s:

        at 0, port 0 sends 2 bytes to port 2: there at 7      at 1, port 1 sends 2 as well: 9
    """

    def __init__(self, ports: int, rate: float, delay: float) -> None:
        self._rate, self._delay = rate, delay  # bits a second, seconds
        self._sent, self._received = [0.0] * ports, [0.0] * ports

    def arrival(self, now: float, source: int, target: int, size: int) -> float:
        """Return when `size` bytes have arrived whose sender had them ready at `now`."""
        seconds = 8 * size / self._rate
        self._sent[source] = max(now, self._sent[source]) + seconds
        self._received[target] = max(self._sent[source], self._received[target] + seconds)
        return self._received[target] + self._delay


def wire_size(packet: bytes) -> int:
    """Return the bytes on an Ethernet of a packet with its header, which may be many segments."""
    _, kind, head, segment, _, _ = _HEADER.unpack_from(packet)
    size = len(packet) - _HEADER.size
    segments = -(-(size - head) // segment) if kind else 1
    return size + (segments - 1) * head + segments * _ETHERNET


def carry(ports: Sequence[int], rate: float, delay: float) -> None:
    """Carry packets between TUN devices for ever. Machine n has the address that ends in n + 1."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # or computing would delay it
    print(flush=True)
    switch, number = Switch(len(ports), rate, delay), itertools.count()
    waiting: list[tuple[float, int, int, bytes]] = []
    while True:
        timeout = waiting[0][0] - time.perf_counter() if waiting else None
        if timeout is not None and timeout < _SHORT:
            timeout = 0
        for port in select.select(ports, [], [], timeout)[0]:
            packet = os.read(port, _LARGEST)
            target = packet[_HEADER.size + 19] - 1  # the last byte of an IPv4 destination
            if packet[_HEADER.size] >> 4 != 4 or target not in range(len(ports)):
                continue  # IPv6 looks for neighbours
            source, now = ports.index(port), time.perf_counter()
            due = switch.arrival(now, source, target, wire_size(packet))
            heapq.heappush(waiting, (due, next(number), ports[target], packet))
        while waiting and waiting[0][0] <= time.perf_counter():
            _, _, port, packet = heapq.heappop(waiting)
            os.write(port, packet)


class Network:
    """Namespaces by name, in the order of their addresses, and the link between them."""

    def __init__(self, namespaces: dict[str, int], ports: Sequence[int]) -> None:
        self._namespaces, self._ports = namespaces, ports  # processes; devices
        self._carrier: subprocess.Popen[str] | None = None

    def address(self, name: str) -> str:
        """Return the address of a machine."""
        return f"{_SUBNET}{list(self._namespaces).index(name) + 1}"

    def inside(self, name: str, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on a machine, as the same process."""
        return ["nsenter", "-t", str(self._namespaces[name]), "-n", *command]

    def set_link(self, link: Link) -> float:
        """Give the link its speed; return the round trip in seconds as it is then.

        To carry a packet takes time of its own, so the delay is looked for. It is measured with
        a core that computes: where all of them sleep, to wake one takes longer.
        """
        low, high, ends = 0.0, link.round_trip / 2, list(self._namespaces)[:2]
        with ended(start(["sh", "-c", "while :; do :; done"])):
            for _ in range(_HALVINGS):
                delay = (low + high) / 2
                self._carry(link.rate, delay)
                found = self.round_trip(*ends)
                low, high = (delay, high) if found < link.round_trip else (low, delay)
        return found

    def round_trip(self, name: str, other: str) -> float:
        """Return the seconds from a packet to the kernel's answer, median of many."""
        command = [sys.executable, __file__, "ping", self.address(other)]
        done = subprocess.run(self.inside(name, command), stdout=subprocess.PIPE, check=True)
        return float(done.stdout)

    def stop(self) -> None:
        """Let no packet through any more: a pulled cable."""
        if self._carrier is not None:
            self._carrier.kill()
            self._carrier.wait()

    def _carry(self, rate: float, delay: float) -> None:
        self.stop()
        command = [sys.executable, __file__, "carry", *map(str, self._ports)]
        command += [f"--rate={rate}", f"--delay={delay}"]
        self._carrier = start(command, pass_fds=self._ports, stdout=subprocess.PIPE)
        self._carrier.stdout.readline()


@contextmanager
def network(names: Sequence[str]) -> Iterator[Network]:
    """Yield a network of machines of these names, at least two; its link is not set yet."""
    with ExitStack() as stack:
        namespaces: dict[str, int] = {}
        ports: list[int] = []
        for number, name in enumerate(names, 1):
            holder = stack.enter_context(ended(start(["unshare", "--net", "sleep", "infinity"])))
            _wait_for_namespace(holder)
            ports.append(os.open("/dev/net/tun", os.O_RDWR))
            stack.callback(os.close, ports[-1])
            namespaces[name] = holder.pid
            _attach(ports[-1], number, holder.pid)
        made = Network(namespaces, ports)
        stack.callback(made.stop)
        yield made


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start a process that ends with this one."""
    return subprocess.Popen([*_BOUND, *command], text=True, **options)


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Yield the process, and kill it afterwards."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_for_namespace(holder: subprocess.Popen[str]) -> None:
    """Wait until the process has left the network namespace of this one."""
    here, there = Path("/proc/self/ns/net"), Path(f"/proc/{holder.pid}/ns/net")
    while here.readlink() == there.readlink():
        if holder.poll() is not None:
            raise SystemExit("cannot make a network namespace: this needs root")
        time.sleep(0.01)


def _attach(port: int, number: int, pid: int) -> None:
    """Make the port a TUN device, the network of machine `number`, the namespace of `pid`."""
    name = f"mixchat{number}"
    flags = _TUN | _NO_INFO | _WITH_HEADER
    fcntl.ioctl(port, _SET_DEVICE, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(port, _SET_OFFLOAD, _CHECKSUMS | _TSO)
    inside = ["nsenter", "-t", str(pid), "-n"]
    for command in (
        ["ip", "link", "set", name, "netns", str(pid)],
        [*inside, "ip", "addr", "add", f"{_SUBNET}{number}/24", "dev", name],
        [*inside, "ip", "link", "set", name, "up"],
        [*inside, "ip", "link", "set", "lo", "up"],
    ):
        subprocess.run(command, check=True)


def ping(address: str) -> float:
    """Return the median seconds until the other kernel refuses a connection."""
    return median(_refused(address) for _ in range(101))


def _refused(address: str) -> float:
    with socket.socket() as probe:
        began = time.perf_counter()
        try:
            probe.connect((address, _DISCARD))
        except ConnectionRefusedError:
            return time.perf_counter() - began
    raise SystemExit(f"{address} has a service on port {_DISCARD}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    pinged = commands.add_parser("ping")
    pinged.add_argument("address")
    pinged.set_defaults(run=lambda given: print(ping(given.address)))
    carried = commands.add_parser("carry")
    carried.add_argument("ports", type=int, nargs="+")
    carried.add_argument("--rate", type=float, required=True)
    carried.add_argument("--delay", type=float, required=True)
    carried.set_defaults(run=lambda given: carry(given.ports, given.rate, given.delay))
    arguments = parser.parse_args()
    arguments.run(arguments)
