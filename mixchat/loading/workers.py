"""Connects to workers, and divides the experts among them and this machine."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from mixchat.base.options import LoadOptions
from mixchat.base.progress import Note
from mixchat.base.settings import report_path_by_key
from mixchat.engine.prompt_cache import identity_of
from mixchat.engine.report import saved_uses
from mixchat.experts.cache import ExpertKey
from mixchat.experts.placement import Placement
from mixchat.experts.sharing import divide
from mixchat.experts.workers.address import resolve_workers
from mixchat.experts.workers.key_file import default_key_file, read_key_file
from mixchat.weights.format.installed_model import InstalledModel

if TYPE_CHECKING:  # a chat without workers loads neither zmq nor pydantic
    from mixchat.experts.workers.remote_worker import RemoteWorker


@dataclass(frozen=True)
class ExpertShare:
    """This machine's part of a model's experts, and the workers that have the others."""

    placement: Placement
    here: Set[ExpertKey] | None = None  # the experts that are not left to workers, None for all
    copies: Set[ExpertKey] = frozenset()  # experts of `here` that a worker holds, too
    workers: Sequence[RemoteWorker] = ()


def connect_workers(
    installed: InstalledModel, options: LoadOptions, here: str, note: Note
) -> list[RemoteWorker]:
    """Connect to all workers that `options` name. Raises `MixchatError` if one fails.

    `here` is this machine's `LinearSpec.arithmetic`. `note` is called for workers with another
    arithmetic.
    """
    if not options.workers:
        return []
    from mixchat.experts.workers.link import Link
    from mixchat.experts.workers.messages import Hello
    from mixchat.experts.workers.remote_worker import RemoteWorker

    addresses = resolve_workers(options.workers)
    key = read_key_file(options.key_file or default_key_file())
    hello = Hello(
        model_identity=identity_of(installed.manifest),
        model_name=installed.directory.name,
        dtype=str(installed.blueprint.quantization.dtype).removeprefix("torch."),
        hidden_size=installed.config.hidden_size,
        exact_prompts=options.exact_prompts,
    )
    workers = [RemoteWorker(partial(Link, address, key, hello), note) for address in addresses]
    for worker in workers:
        if worker.arithmetic == here:
            continue
        line = (
            f"worker {worker.name} computes otherwise ({worker.arithmetic}; here: {here}): answers "
            "may differ a little from those without it"
        )
        # With exact prompts both machines compute each row alone, and these bits are alike.
        if {worker.arithmetic, here} == {"bytes", "words"}:
            line += "; --exact-prompts makes them the same"
        note(line)
    return workers


def divide_experts(
    installed: InstalledModel, placement: Placement, workers: Sequence[RemoteWorker]
) -> ExpertShare:
    """Let each worker hold its part. Return this machine's."""
    if not workers:
        return ExpertShare(placement)
    config = installed.config
    slots = [placement.held, *(worker.slots for worker in workers)]
    uses = saved_uses(report_path_by_key(installed.directory.name))
    here, *there = divide(config.num_moe_layers, config.num_local_experts, slots, uses)
    for worker, keys in zip(workers, there, strict=True):
        worker.hold(keys)
    copies = frozenset(here).intersection(chain(*there))
    return ExpertShare(placement.at_most(len(here)), frozenset(here), copies, workers)
