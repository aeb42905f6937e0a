"""`mixchat serve` as a program of its own, with a scripted model."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # as pytest does for the modules of tests/

from mixchat.cli import app
from mixchat.serving import serve


def open_scripted(name, load, reporter, *, waiting, **options):
    from scripted_model import scripted_model  # which imports torch

    return scripted_model(name, parallel=load.parallel, waiting=waiting)


if __name__ == "__main__":
    serve.open_model = open_scripted
    app.run(["serve", *sys.argv[1:]])
