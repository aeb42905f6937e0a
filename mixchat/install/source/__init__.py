"""Checkpoints in a directory, on the hub, or built for the demo.

- open_checkpoint.py: from a name and revision to an open checkpoint
- checkpoint.py: a checkpoint in a directory, and all that checkpoints have in common
- hub_checkpoint.py, demo.py: checkpoints that are fetched, and the demo's, which is built
- checkpoint_index.py: the files and tensors of a Hugging Face checkpoint
- gguf_checkpoint.py: a checkpoint in GGUF, here or on the hub
- gguf_file.py, gguf_text.py: the header of a GGUF file, and the tokenizer in it
- remote_file.py: a file of a commit on the hub, and its path in huggingface_hub's cache
- hub.py, hub_errors.py: looks up a checkpoint on the hub, and explains its errors
- hub_request.py: bytes from the hub, and how slow and how long an answer may be
- transfer.py: files from the hub, resumed after an interruption
"""
