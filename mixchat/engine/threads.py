"""How torch's threads wait for each other: to be said before torch is loaded."""

from __future__ import annotations

import os


def prepare_environment() -> None:
    """Let idle threads spin for some milliseconds before they sleep, unless the user chose.

    A decode step is some hundred short parallel regions with a little Python between them. Threads
    that go to sleep in each gap cost a quarter of the speed; ones that spin for ever (what
    OMP_WAIT_POLICY=active means) would keep a core busy while the person types.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000000")
