"""`mixchat worker`: holds experts and computes them, for a chat on another machine."""

from __future__ import annotations

from typing import Annotated

import typer

from mixchat.base.options import DEFAULT_POLICY
from mixchat.chat.printing import say
from mixchat.cli.flags import load_flags
from mixchat.cli.output.progress import TerminalReporter
from mixchat.sessions.servers import serve_experts


def worker(
    context: typer.Context,
    model: load_flags.Model = "instruct",
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST[:PORT]",
            help="The address of this machine at which it listens, port 7917 by default.",
        ),
    ] = "127.0.0.1",
    key_file: load_flags.KeyFile = None,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Make a new key in the key file, and do no more.")
    ] = False,
    host_memory: load_flags.HostMemory = None,
    device_memory: load_flags.DeviceMemory = None,
    device: load_flags.Device = None,
    cache_policy: load_flags.CachePolicy = DEFAULT_POLICY,
) -> None:
    """Hold experts for a chat on another machine, and compute them.

    The model has to be installed here, too. 'mixchat run --worker HOST' on the other machine then
    uses the memory and the cores of both. Only those who have the key are served, one chat at a
    time. What travels is encrypted with that key.
    'torchrun -m mixchat run' starts both: rank 0 chats, the others are its workers.
    """
    options = load_flags.load_options(context.params)
    if not new_key:
        serve_experts(model, options, listen, TerminalReporter(), say)
        return
    from mixchat.experts.workers.key_file import default_key_file, make_key_file

    path = options.key_file or default_key_file()
    make_key_file(path)
    say(f"wrote {path}: copy it to the other machines, and let nobody else read it")
