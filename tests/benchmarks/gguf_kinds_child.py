"""llama.cpp's part of `gguf_kinds.py`, in a Python that has llama-cpp-python.

quantize SOURCE TARGET KIND    writes a GGUF file of another kind
logits FILE OUT.npy            reads windows as a line of JSON, and writes logits window by
                               window: a line for each, and then it waits for a line
tokens FILE CHARACTERS TEXT... prints the ids of each text's beginning, as JSON
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def quantize(source: str, target: str, kind: str) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot make {kind}")


def _model(file: str, *, vocabulary_alone: bool = False) -> Any:
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocabulary_alone
    model = llama_cpp.llama_model_load_from_file(file.encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {file}")
    return model


def logits(file: str, out: str) -> None:
    import llama_cpp

    windows = json.loads(sys.stdin.readline())
    model = _model(file)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(windows[0])
    # The cache of keys and values rounds nothing.
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    for window in windows:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(len(window), 0, 1)
        batch.n_tokens = len(window)
        for place, token in enumerate(window):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        found = llama_cpp.llama_get_logits(context)
        np.save(out, np.ctypeslib.as_array(found, (len(window), words)))
        llama_cpp.llama_batch_free(batch)
        print("written", flush=True)
        sys.stdin.readline()


def tokens(file: str, characters: str, *texts: str) -> None:
    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(_model(file, vocabulary_alone=True))
    found = []
    for path in texts:
        text = Path(path).read_text(encoding="utf-8")[: int(characters)].encode()
        ids = (llama_cpp.llama_token * len(text))()
        count = llama_cpp.llama_tokenize(vocabulary, text, len(text), ids, len(text), False, True)
        found.append(ids[:count])
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = {task.__name__: task for task in (quantize, logits, tokens)}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("arguments", nargs="+")
    given = parser.parse_args()
    tasks[given.task](*given.arguments)


if __name__ == "__main__":
    main()
