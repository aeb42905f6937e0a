"""Speed, measured against the machine's limits.

- rounds.py: measures limits and mixchat, round by round
- machine_limits.py: the most that the machine can do, and the work of a token
- synthetic.py: a model of a known model's layer shapes with random weights
"""
