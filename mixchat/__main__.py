"""`mixchat` and `python -m mixchat` start here."""

# First of all, and without the module `signal`, whose import takes milliseconds: at Ctrl-C Python's
# own handler prints a traceback.
import _signal  # type: ignore[import-not-found]

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import os
import sys


def main() -> None:
    """Run the command line."""
    if sys.platform == "win32":
        sys.exit("error: mixchat does not run on Windows: install it in WSL 2")
    import threading

    from mixchat.base import interrupts
    from mixchat.cli.app import run

    try:
        try:
            run()
        finally:
            interrupts.use_defaults()  # all work is done
    except KeyboardInterrupt:  # before `run` installs its handlers, or after it
        sys.exit(130)
    except SystemExit as ending:
        loads = "torch" in sys.modules or threading.active_count() > 1
        if loads and isinstance(ending.code, int):
            # All is closed and flushed by now. An orderly exit of torch takes another second, in
            # which a person who pressed Ctrl-C waits. While a thread imports torch, it may crash.
            os._exit(ending.code)
        raise


if __name__ == "__main__":
    main()
