"""Upkeep of installed models.

- verify.py: compares every byte with the manifest
- repair.py: rebuilds what is damaged
- convert.py: rewrites the 4-bit codes in their other layout, file by file
- half_converted.py: which layout each file has while a conversion is unfinished
- housekeeping.py: removes models and leftovers
"""
