"""Weights at rest: download, quantization, the format on disk, repair.

- models.py: the models on this machine, by name
- download.py: from a name to an installed model: plan, then build, or resume
- plan.py: what it takes: bytes, disk, memory, time
- origins.py, origin.py: where a checkpoint comes from: a directory, the hub, the demo
- hub.py, hub_origin.py, hub_errors.py, transfer.py: the hub: lists, fetches, resumes, checks
- hub_request.py: one request for bytes, and whether the answer is one to it
- demo.py, upcycle.py, gguf_tokenizer.py: the demo model
- checkpoint_files.py, source.py: a Hugging Face checkpoint: its files, its tensors
- bnb_format.py: matrices that bitsandbytes has quantized already
- build.py: an installed model out of shards as they come, one fetched while one is quantized
- parts.py: which matrices make which part of an installed model
- journal.py: what is done of an unfinished model
- recheck.py: what is done, read back and compared with the journal before work continues
- aside.py: tensors spilled until a later shard comes
- verify.py: every byte checked, what is damaged made again
- convert.py: the codes of an installed model in their other layout, file by file
- housekeeping.py: removes models and leftovers
- quantize.py: what becomes 4 bits
- quantizer.py: NF4 codes and scales of a matrix, fast
- nf4.py: 4-bit codes, their two layouts, bitsandbytes' matmul
- linear.py: a matrix, dense or 4-bit: how it is stored and computed
- outline.py: what a model will be once it is installed
- blueprint.py: which tensors an installed model has, in which file
- kept_files.py: writes them to their places
- checkpoint.py: opens an installed model and rejects what is not exactly one
- manifest.py: mixchat.json
- safetensors.py: the file format
"""
