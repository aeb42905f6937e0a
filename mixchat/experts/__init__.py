"""Where experts live and who computes them."""
