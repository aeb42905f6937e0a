"""Measures a model's speed against the machine's limits.

- rounds.py: measures the most that the machine can do, and mixchat, round by round
- synthetic.py: writes a model with a known model's shapes and random weights
"""
