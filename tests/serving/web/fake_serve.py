"""`mixchat serve` as a program of its own, with a scripted service in place of a model."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # as pytest does for the modules of tests/

from mixchat.serving.requests.options import Defaults
from scripted_service import ScriptedService

from mixchat.base.options import SamplingOptions
from mixchat.cli import app
from mixchat.sessions import servers


def open_fake(model, load, queue, reporter, **options):
    service = ScriptedService(parallel=load.parallel, queue=queue)
    service.name = model
    return service, Defaults(SamplingOptions())


if __name__ == "__main__":
    servers.open_service = open_fake
    app.run(["serve", *sys.argv[1:]])
