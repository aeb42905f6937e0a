"""Connects to workers, and divides the experts among them and this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import median
from typing import TYPE_CHECKING

import torch

from mixchat.base.errors import ServerError
from mixchat.base.options import LoadOptions
from mixchat.base.progress import Note
from mixchat.engine.prompt_cache import identity_of
from mixchat.engine.report import report_path_by_key, saved_uses
from mixchat.experts.cache import ExpertKey
from mixchat.experts.placement import Placement
from mixchat.experts.sharing import divide
from mixchat.experts.workers.address import resolve_workers
from mixchat.experts.workers.key_file import default_key_file, read_key_file
from mixchat.planning.worker_split import WorkerOffer
from mixchat.weights.format.installed_model import InstalledModel

if TYPE_CHECKING:  # a chat without workers loads neither zmq nor pydantic
    from mixchat.experts.workers.link import Link
    from mixchat.experts.workers.remote_worker import RemoteWorker

# Experts that measure a worker in turn. One alone could stay in a processor's cache.
_TRIED_EXPERTS = 4
_TRIES = 5  # of each


@dataclass(frozen=True)
class Share:
    """This machine's part of a model's experts, and the workers that have the others."""

    placement: Placement
    here: Set[ExpertKey] | None = None  # the experts that are not left to workers, None for all
    copies: Set[ExpertKey] = frozenset()  # experts of `here` that a worker holds, too
    workers: Sequence[RemoteWorker] = ()


def connect_workers(
    installed: InstalledModel, options: LoadOptions, here: str, note: Note
) -> list[RemoteWorker]:
    """Connect to all workers that `options` name. Raises `MixchatError` if one fails.

    `here` is this machine's `LinearSpec.arithmetic`. `note` tells of workers with another.
    """
    if not options.workers:
        return []
    from mixchat.experts.workers.remote_worker import RemoteWorker

    workers = [RemoteWorker(connect, note) for connect in _connectors(installed, options)]
    for worker in workers:
        if worker.arithmetic != here:
            note(_otherwise(worker, here))
    return workers


def ask_workers(installed: InstalledModel, options: LoadOptions) -> list[WorkerOffer]:
    """Return the offer of each worker, by trying it. Raises `MixchatError` if one fails."""
    if not options.workers:
        return []
    from mixchat.experts.workers.sockets import ConnectionLostError

    offers = []
    for connect in _connectors(installed, options):
        link = connect()
        try:
            offers.append(_offer(link, installed))
        except ConnectionLostError as error:
            raise ServerError(f"{link.address}: the worker is lost: {error.reason}") from None
        finally:
            link.close()
    return offers


def divide_experts(
    installed: InstalledModel, placement: Placement, workers: Sequence[RemoteWorker]
) -> Share:
    """Let each worker hold its part. Return this machine's."""
    if not workers:
        return Share(placement)
    config = installed.config
    slots = [sum(placement.by_device), *(worker.slots for worker in workers)]
    uses = saved_uses(report_path_by_key(installed.directory.name))
    here, *there = divide(config.num_moe_layers, config.num_local_experts, slots, uses)
    for worker, keys in zip(workers, there, strict=True):
        worker.hold(keys)
    copies = frozenset(here).intersection(chain(*there))
    return Share(placement.at_most(len(here)), frozenset(here), copies, workers)


def _otherwise(worker: RemoteWorker, here: str) -> str:
    line = (
        f"worker {worker.name} computes otherwise ({worker.arithmetic}; here: {here}): answers may "
        "differ a little from those without it"
    )
    if {worker.arithmetic, here} == {"bytes", "words"}:
        line += "; --exact-prompts makes them the same"
    return line


def _connectors(installed: InstalledModel, options: LoadOptions) -> list[Callable[[], Link]]:
    from mixchat.experts.workers.link import Link
    from mixchat.experts.workers.messages import Hello

    addresses = resolve_workers(options.workers)
    key = read_key_file(options.key_file or default_key_file())
    hello = Hello(
        model_identity=identity_of(installed.manifest),
        model_name=installed.directory.name,
        dtype=str(installed.blueprint.quantization.dtype).removeprefix("torch."),
        hidden_size=installed.config.hidden_size,
        exact_prompts=options.exact_prompts,
    )
    return [partial(Link, address, key, hello) for address in addresses]


def _offer(link: Link, installed: InstalledModel) -> WorkerOffer:
    """Measure a worker. The time to load experts does not count."""
    experts = min(installed.config.num_local_experts, link.slots, _TRIED_EXPERTS)
    row = torch.zeros(1, installed.config.hidden_size, dtype=installed.blueprint.quantization.dtype)
    seconds, computing = [], []
    for turn in range((1 + _TRIES) * experts):
        start, before = time.perf_counter(), link.seconds_computing
        link.start(0, [(turn % experts, 1)], row)
        link.finish()
        seconds.append(time.perf_counter() - start)
        computing.append(link.seconds_computing - before)
    expert = median(computing[experts:])
    return WorkerOffer(str(link.address), link.slots, expert, median(seconds[experts:]) - expert)
