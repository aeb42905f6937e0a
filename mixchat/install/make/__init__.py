"""From a checkpoint, or from an installed model, to a new one.

Every command that makes a model is a `Build`. It makes parts in the model's workspace, notes them
in a journal, writes the manifest and lets the new model take the old one's place.

- download.py: from a name to an installed model
- download_plan.py: the plan of a download in bytes, disk, memory and time
- outline.py: a model before it is installed
- quantize_options.py: the options of quantization, fitted to a checkpoint
- parts.py: the matrices that each part of an installed model is made of
- mix.py: chooses the types of experts' matrices for each layer, under a budget
- build.py: the build, from parts to the swap
- from_checkpoint.py: a build of shards as they come, for a download
- rebuild.py: a build of the installed model: calibrated or repaired
- needs.py: the disk that a build needs
- unfinished.py: the files of an unfinished model, written and checked
- calibrator.py: records the inputs of experts, and makes experts anew for them
"""
