"""The format on disk of an installed model.

- blueprint.py: the tensors of an installed model, by file
- file_layout.py: the place of each tensor's bytes in its file
- manifest.py: mixchat.json: source, quantization, sizes and SHA-256s
- replacement.py: replaces a file of weights of a model that stays usable
- journal.py: the finished tensors of an unfinished model
- installed_model.py: opens an installed model and rejects what is not exactly one
"""
