"""The origins of a checkpoint: a directory, the hub, the demo.

- open_origin.py: from a source to its origin
- origin.py: what all origins have in common
- directory_origin.py, hub_origin.py, demo_origin.py: the three of them
- checkpoint_files.py, checkpoint_index.py: a Hugging Face checkpoint: its files, its tensors
- hub.py, hub_errors.py: what the hub lists of a checkpoint; its errors
- hub_request.py, transfer.py: bytes from the hub, resumed where they were cut off
- demo.py, upcycle.py, gguf_tokenizer.py: builds the demo's checkpoint
"""
