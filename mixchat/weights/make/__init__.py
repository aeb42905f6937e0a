"""From a checkpoint to an installed model.

- download.py: from a name to an installed model: plan, then build, or resume
- download_plan.py: what it takes: bytes, disk, memory, time
- outline.py: what a model will be once it is installed
- quantize.py: what becomes 4 bits
- parts.py: which matrices make which part of an installed model
- build.py: an installed model out of shards as they come, one fetched while one is quantized
- writer.py: writes its files of weights
- recheck.py: what is done, read back and compared with the journal before work continues
- spill.py: tensors spilled until a later shard comes
"""
