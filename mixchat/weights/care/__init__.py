"""Installed models, looked after.

- verify.py: every byte checked, what is damaged made again
- convert.py: the codes of an installed model in their other layout, file by file
- housekeeping.py: removes models and leftovers
"""
