"""How fast a model runs, beside what this machine could do at most and beside llama.cpp."""
