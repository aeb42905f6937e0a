"""From a checkpoint to an installed model.

- download.py: from a name to an installed model: plan, then build or resume
- download_plan.py: the plan of a download: bytes, disk, memory, time
- outline.py: what a model will be once it is installed
- quantize_options.py: the options of quantization, fitted to a checkpoint
- parts.py: the matrices that each part of an installed model is made of
- build.py: an installed model out of shards as they come, one fetched while one is quantized
- writer.py: writes its files of weights
- recheck.py: checks finished parts against the journal before work continues
- expert_inputs.py: the inputs of experts, recorded for a calibration
- calibrator.py: makes experts anew, for their inputs, and judges them by inputs held out
- spill.py: tensors spilled to disk until a later shard comes
"""
