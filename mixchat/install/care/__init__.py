"""Upkeep of installed models.

- repair.py: compares every byte with the manifest, and rebuilds what is damaged
- housekeeping.py: removes models and leftovers
"""
