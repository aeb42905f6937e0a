"""The composition root: the only place that builds things out of other things.

- loader.py: an engine out of an installed model, a device and a budget
- tiers.py: what holds, moves and computes the experts
"""
