"""Upkeep of installed models.

- repair.py: compares every byte with the manifest, and rebuilds what is damaged
- convert.py: converts a model to another layout or to fewer bits
- housekeeping.py: removes models and leftovers
"""
