"""The composition root: the only place that builds things out of other things.

- loader.py: builds an engine out of an installed model, a device and options
- tiers.py: builds the holder of the experts out of slots, RAM and the disk
"""
