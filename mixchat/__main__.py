"""`mixchat` and `python -m mixchat` start here."""

from __future__ import annotations

import signal

# First of all, since all imports take a moment: Python's own handler would print a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import sys


def main() -> None:
    """Run the command line."""
    from mixchat import interrupts
    from mixchat.cli.app import run

    try:
        try:
            run()
        finally:
            interrupts.use_defaults()  # all is done and said
    except KeyboardInterrupt:  # before `run` listened, or after it
        sys.exit(130)
    except SystemExit as ending:
        if "torch" in sys.modules and isinstance(ending.code, int):
            # All is closed and flushed by now. Taking torch down in order takes another second,
            # in which somebody who pressed Ctrl-C waits.
            os._exit(ending.code)
        raise


if __name__ == "__main__":
    main()
