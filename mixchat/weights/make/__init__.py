"""From a checkpoint to an installed model.

- download.py: from a name to an installed model
- download_plan.py: the plan of a download in bytes, disk, memory and time
- outline.py: a model before it is installed
- quantize_options.py: the options of quantization, fitted to a checkpoint
- parts.py: the matrices that each part of an installed model is made of
- mix.py: chooses the types of experts' matrices for each layer, under a budget
- build.py: makes an installed model out of shards as they come
- writer.py: writes its files of weights
- unfinished.py: spilled tensors, and the check of finished parts
- calibrator.py: records the inputs of experts, and makes experts anew for them
"""
