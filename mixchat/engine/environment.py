"""What has to be said to torch before it is loaded."""

from __future__ import annotations

import os


def prepare_environment() -> None:
    """Ask for huge pages under large tensors, unless the user chose.

    Reading experts at the memory's limit, a CPU otherwise waits for page tables too: decoding
    Mixtral's layers goes 5 to 8% faster with pages of 2 MiB. Systems without them ignore it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
