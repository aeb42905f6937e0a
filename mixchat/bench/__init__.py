"""Speed, measured beside the machine's limits.

- rounds.py: measures limits and mixchat, round by round
- machine_limits.py: the most that the machine can do
- work.py: the work of a token: bytes and operations
- random_context.py: a context of random keys and values
- synthetic.py: a model of Mixtral's layer shapes with random weights
"""
