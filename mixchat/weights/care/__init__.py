"""Upkeep of installed models.

- verify.py: compares every byte with the manifest
- repair.py: rebuilds what is damaged
- convert.py: rewrites a model in another layout or with fewer bits, file by file
- recalibration.py: makes experts anew from the checkpoint, if it is still the same
- housekeeping.py: removes models and leftovers
"""
