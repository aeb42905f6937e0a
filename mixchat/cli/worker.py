"""`mixchat worker`: holds experts and computes them, for a chat on another machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from mixchat.base.options import DEFAULT_POLICY, LoadOptions
from mixchat.chat.printing import say
from mixchat.cli.flags import model_flags
from mixchat.cli.opening import find_or_build
from mixchat.cli.output.failure import note
from mixchat.engine.environment import prepare_environment

if TYPE_CHECKING:
    from mixchat.experts.workers.server import Server


def worker(
    model: model_flags.Model = "instruct",
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST[:PORT]",
            help="The address of this machine at which it listens, port 7917 by default.",
        ),
    ] = "127.0.0.1",
    key_file: model_flags.KeyFile = None,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Make a new key in the key file, and do no more.")
    ] = False,
    host_memory: model_flags.HostMemory = None,
    device_memory: model_flags.DeviceMemory = None,
    device: model_flags.Device = None,
    cache_policy: model_flags.CachePolicy = DEFAULT_POLICY,
) -> None:
    """Hold experts for a chat on another machine, and compute them.

    The model has to be installed here, too. 'mixchat run --worker HOST' on the other machine then
    uses the memory and the cores of both. Only those who have the key are served, one chat at a
    time. What travels is encrypted with that key.
    'torchrun -m mixchat run' starts both: rank 0 chats, the others are its workers.
    """
    options = LoadOptions(
        host_memory=model_flags.budget(host_memory),
        device_memory=model_flags.budgets(device_memory),
        device=device,
        cache_policy=cache_policy,
        key_file=model_flags.key_path(key_file),
    )
    if new_key:
        from mixchat.experts.workers.key_file import default_key_file, make_key_file

        path = options.key_file or default_key_file()
        make_key_file(path)
        say(f"wrote {path}: copy it to the other machines, and let nobody else read it")
        return
    with _server(model, options, listen) as (server, address):
        say(f"{address}: ready for a chat; Ctrl-C ends it")
        server.serve()


def serve_rank_0(model: str, options: LoadOptions) -> None:
    """Serve rank 0 until it ends, as another process that torchrun started."""
    from mixchat.experts.workers import torchrun

    with _server(model, options, torchrun.local_address()) as (server, address):
        server.serve(over=torchrun.publish(address))


@contextmanager
def _server(model: str, options: LoadOptions, listen: str) -> Iterator[tuple[Server, str]]:
    """Yield a server that listens, and its address."""
    from mixchat.experts.workers.address import resolve
    from mixchat.experts.workers.key_file import default_key_file, read_key_file

    key = read_key_file(options.key_file or default_key_file())
    address = resolve(listen, any_port=True)
    directory = find_or_build(model)
    prepare_environment()
    from mixchat.experts.workers.listener import Listener
    from mixchat.experts.workers.server import Server
    from mixchat.loading.served_experts import load_served_experts

    with closing(Listener(address, key, say)) as listener:
        served = load_served_experts(directory, options, note)
        say(f"{served.name}: room for {served.slots} of {served.placement.experts} experts")
        yield Server(listener, served, say), listener.address
