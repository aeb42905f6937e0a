"""Connects to workers, and divides the experts among them and this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mixchat.engine.prompt_cache import identity_of
from mixchat.experts.keys import ExpertKey
from mixchat.experts.placement import Placement
from mixchat.experts.sharing import divide
from mixchat.experts.workers.address import Address, resolve_workers
from mixchat.experts.workers.key_file import default_key_file, read_key_file
from mixchat.experts.workers.link import Link
from mixchat.experts.workers.messages import Hello
from mixchat.experts.workers.remote_worker import RemoteWorker
from mixchat.options import LoadOptions
from mixchat.progress import Note
from mixchat.weights.format.installed_model import InstalledModel


def connect_workers(
    installed: InstalledModel, options: LoadOptions, note: Note
) -> list[RemoteWorker]:
    """Connect to all workers that `options` name. Raises `MixchatError` where one fails."""
    if not options.workers:
        return []
    addresses = resolve_workers(options.workers)
    key = read_key_file(options.key_file or default_key_file())
    hello = Hello(
        model_identity=identity_of(installed.manifest),
        model_name=installed.directory.name,
        dtype=str(installed.blueprint.quantization.dtype).removeprefix("torch."),
        hidden_size=installed.config.hidden_size,
        exact_prompts=options.exact_prompts,
    )

    def worker(address: Address) -> RemoteWorker:
        return RemoteWorker(lambda: Link.open(address, key, hello), note)

    return [worker(address) for address in addresses]


def divide_experts(
    installed: InstalledModel, placement: Placement, workers: Sequence[RemoteWorker]
) -> tuple[Placement, frozenset[ExpertKey]]:
    """Let each worker hold its part; return this machine's slots, and the copies among them."""
    config = installed.config
    slots = [placement.slots, *(worker.slots for worker in workers)]
    here, *there = divide(config.num_hidden_layers, config.num_local_experts, slots)
    for worker, keys in zip(workers, there, strict=True):
        worker.hold(keys)
    copies = frozenset(here) & frozenset(key for keys in there for key in keys)
    return replace(placement, slots=min(placement.slots, len(here))), copies
