"""Builds engines, workers and plans out of the parts of all rooms below.

- loader.py: builds an engine out of an installed model, a device and options
- devices.py: chooses the devices that compute
- workers.py: connects to workers, and divides the experts among them and this machine
- served_experts.py: builds the experts that a worker serves
- calibrate.py: calibrates an installed model, in other bits if that is asked for
- sensitivity.py: measures how much a model loses by noise in a layer
- tiers.py: builds the holder of the experts out of slots, RAM and the disk
- plan.py: plans a model on a machine, and measures the machine
"""
