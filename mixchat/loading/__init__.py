"""The composition root: the only place that builds things out of other things.

- loader.py: builds an engine out of an installed model, a device and options
- workers.py: connects to workers, and divides the experts among them and this machine
- served_experts.py: builds the experts that a worker serves
- calibrate.py: calibrates an installed model
- tiers.py: builds the holder of the experts out of slots, RAM and the disk
"""
