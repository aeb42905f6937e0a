"""Upkeep of installed models.

- verify.py: compares every byte with the manifest
- repair.py: rebuilds what is damaged
- convert.py: rewrites a model in another layout or with fewer bits, file by file
- half_converted.py: the form that each file has while a conversion is unfinished
- housekeeping.py: removes models and leftovers
"""
