"""Where a checkpoint comes from: a directory, the hub, the demo.

- origin.py: what every origin can do; a directory
- open_origin.py: from a name to an origin, opened
- checkpoint_files.py, index.py: a Hugging Face checkpoint: its files, its tensors
- hub.py, hub_origin.py, hub_errors.py: the hub: lists, fetches, checks
- hub_request.py, transfer.py: bytes from the hub, resumed where they were cut off
- demo.py, upcycle.py, gguf_tokenizer.py: the demo model
"""
