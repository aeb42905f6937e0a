"""Measures a model's speed against the machine's limits.

- rounds.py: measures limits and mixchat, round by round
- machine_limits.py: the most that the machine can do, and the work of a token
- synthetic.py: writes a model with a known model's shapes and random weights
"""
