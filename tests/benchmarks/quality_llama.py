"""Quality of llama.cpp's formats beside their size: the part of `quality.py` that runs llama.cpp.

    pip install llama-cpp-python==0.3.36 gguf                      (its own Python)
    python quality_llama.py MODEL.gguf IDS.json WORK

IDS.json has the windows of each text: lists of lists of token ids. MODEL.gguf is taken to F16, and
from there to the other formats. Prints a list of {"name", "bits" (a weight), "expert_bits" (of the
feed-forward blocks), "attention_bits", "losses" (the mean of each window), "divergences" (KL to
F16, the same), "agreements" (how often its first choice is F16's)} as JSON, with lists of lists as
in IDS.json. It imports nothing of mixchat.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from llama_formats import FORMATS, requantize


def bits(path: Path, pattern: str) -> float:
    """Bits a weight of the tensors whose names have `pattern` in them."""
    import gguf

    tensors = [one for one in gguf.GGUFReader(path).tensors if re.search(pattern, one.name)]
    weights = sum(int(one.n_elements) for one in tensors)
    return 8 * sum(int(one.n_bytes) for one in tensors) / weights


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
        params.n_threads = params.n_threads_batch = os.cpu_count() or 2
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


def main(source: Path, texts: list[list[list[int]]], work: Path) -> None:
    rows, models = [], {}
    for name in FORMATS:
        path = work / f"{name}.gguf"
        requantize(source if name == "F16" else work / "F16.gguf", path, name)
        models[name] = Llama(path, len(texts[0][0]))
        sizes = {
            "bits": bits(path, ""),
            "expert_bits": bits(path, r"\.ffn_(gate|up|down)\."),
            "attention_bits": bits(path, r"\.attn_(q|k|v|output)\."),
        }
        rows.append({"name": name, **sizes, "losses": [], "divergences": [], "agreements": []})
    for windows in texts:
        for row in rows:
            for key in ("losses", "divergences", "agreements"):
                row[key].append([])
        for ids in windows:
            scores = {name: model.log_probabilities(ids) for name, model in models.items()}
            best, expected = scores["F16"], np.exp(scores["F16"])
            for row in rows:
                mine = scores[row["name"]]
                apart = (expected * (best - mine)).sum(-1).mean(dtype=np.float64)
                same = (mine.argmax(-1) == best.argmax(-1)).mean()
                loss = -mine[np.arange(len(mine)), ids[1:]].mean(dtype=np.float64)
                row["losses"][-1].append(float(loss))
                row["divergences"][-1].append(float(apart))
                row["agreements"][-1].append(float(same))
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
