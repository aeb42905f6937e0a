"""`mixchat` and `python -m mixchat` start here."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line."""
    try:
        from mixchat.cli.app import run
    except KeyboardInterrupt:  # run() answers for all that comes later
        sys.exit(130)
    try:
        run()
    except SystemExit as ending:
        if "torch" in sys.modules and isinstance(ending.code, int):
            # All is closed and flushed by now. Taking torch down in order takes another second,
            # in which somebody who pressed Ctrl-C waits.
            os._exit(ending.code)
        raise


if __name__ == "__main__":
    main()
