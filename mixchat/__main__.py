"""`mixchat` and `python -m mixchat` start here."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from mixchat.cli.app import run

    run()


if __name__ == "__main__":
    main()
