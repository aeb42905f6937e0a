"""Upkeep of installed models.

- repair.py: compares every byte with the manifest, and rebuilds what is damaged
- convert.py: rounds a model's attention and head to fewer bits
- housekeeping.py: removes models and leftovers
"""
