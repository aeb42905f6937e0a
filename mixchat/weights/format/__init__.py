"""The format on disk of an installed model.

- blueprint.py: which tensors an installed model has, in which file
- file_layout.py: where each tensor's bytes lie
- manifest.py: mixchat.json
- journal.py: what is done of an unfinished model
- installed_model.py: opens an installed model and rejects what is not exactly one
"""
