"""`mixchat` and `python -m mixchat` start here."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from mixchat.cli.app import run
    except KeyboardInterrupt:  # run() answers for all that comes later
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
