"""Quality of llama.cpp's formats beside their size: the part of `quality.py` that runs llama.cpp.

    pip install llama-cpp-python==0.3.36 gguf                      (its own Python)
    python quality_llama.py MODEL.gguf IDS.json WORK

IDS.json has the windows of a text: lists of token ids. MODEL.gguf is taken to F16, and from there
to the other formats, once with all matrices and once with the feed-forward blocks alone; what WORK
has is used again. Prints a list of {"name", "rounded" ("experts" or "all"), "bits" (a weight of the
matrices that were rounded), "loss" (the mean of each window), "kl" (the divergence from F16, the
same)} as JSON. It imports nothing of mixchat.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from llama_formats import requantize

FORMATS = "Q4_0", "Q4_K_M", "Q3_K_M"
PARTS = "experts", "all"


def rounded_bits(path: Path) -> float:
    """Return the bits a weight of the matrices that were rounded; 16 if none was."""
    import gguf

    exact = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32
    tensors = [one for one in gguf.GGUFReader(path).tensors if one.tensor_type not in exact]
    weights = sum(int(one.n_elements) for one in tensors)
    return 8 * sum(int(one.n_bytes) for one in tensors) / weights if weights else 16


class Llama:
    """A model with a context for one window of tokens."""

    def __init__(self, path: Path, window: int) -> None:
        import llama_cpp

        self._llama = llama_cpp
        options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = window
        threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 2
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(window, 0, 1)

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """Of each next token [N, V], after each token but the last."""
        llama = self._llama
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        batch: Any = self._batch
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if llama.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        logits = llama.llama_get_logits(self._context)
        scores = np.ctypeslib.as_array(logits, (len(ids), self._vocab))[:-1].copy()
        scores -= scores.max(axis=-1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))

    def close(self) -> None:
        """Give the memory back."""
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)


def formats(source: Path, work: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield each format's file, F16 first, and what is known of it."""
    for name, rounded in (("F16", "all"), *((name, part) for part in PARTS for name in FORMATS)):
        path = work / f"{name}-{rounded}.gguf"
        if not path.exists():
            whole = source if name == "F16" else work / "F16-all.gguf"
            requantize(whole, path, name, feed_forward_only=rounded == "experts")
        yield path, {"name": name, "rounded": rounded, "bits": rounded_bits(path)}


def main(source: Path, windows: list[list[int]], work: Path) -> None:
    rows, expected = [], []
    for path, row in formats(source, work):
        model = Llama(path, len(windows[0]))
        row |= {"loss": [], "kl": []}
        for number, ids in enumerate(windows):
            mine = model.log_probabilities(ids)
            if len(expected) == number:
                expected.append(mine)
            best = expected[number]
            loss = -mine[np.arange(len(mine)), ids[1:]].mean(dtype=np.float64)
            row["loss"].append(float(loss))
            apart = (np.exp(best) * (best - mine)).sum(-1).mean(dtype=np.float64)
            row["kl"].append(float(apart))
        model.close()
        rows.append(row)
    print(json.dumps(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="MODEL.gguf")
    parser.add_argument("windows", type=Path, metavar="IDS.json")
    parser.add_argument("work", type=Path, metavar="WORK")
    given = parser.parse_args()
    main(given.source, json.loads(given.windows.read_text()), given.work)
