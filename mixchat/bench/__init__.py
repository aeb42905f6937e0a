"""Speed, measured beside the machine's limits and beside llama.cpp.

- rounds.py: round by round: limits, mixchat, llama.cpp
- machine_limits.py: what the machine could do at most
- work.py: what a token costs
- synthetic.py: random layers of Mixtral's shapes
- peer.py, peer_child.py: llama.cpp beside it
"""
