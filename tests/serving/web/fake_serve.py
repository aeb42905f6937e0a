"""`mixchat serve` as a program of its own, with a scripted model."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))  # as pytest does

from mixchat.serving import serve


def open_scripted(name, load, reporter, *, waiting, **options):
    from scripted_model import scripted_model  # which imports torch

    return scripted_model(name, parallel=load.parallel, waiting=waiting)


def main(arguments):
    import mixchat.__main__ as program  # which takes Ctrl-C away from the process of tests

    serve.open_model = open_scripted
    sys.argv[1:] = ["serve", *arguments]
    program.main()


if __name__ == "__main__":
    main(sys.argv[1:])
