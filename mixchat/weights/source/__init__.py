"""Checkpoints: in a directory, on the hub, or built for the demo.

- open_checkpoint.py: from a name and revision to an open checkpoint
- checkpoint.py: what all checkpoints have in common
- directory_checkpoint.py, hub_checkpoint.py, demo_checkpoint.py: the three of them
- checkpoint_files.py, checkpoint_index.py: a Hugging Face checkpoint: its files, its tensors
- hub.py, hub_errors.py: what the hub lists of a checkpoint; its errors
- hub_request.py, transfer.py: bytes from the hub, resumed where they were cut off
- demo.py, upcycle.py, gguf_tokenizer.py: builds the demo's checkpoint
"""
