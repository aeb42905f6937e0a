"""Chat with a mixture-of-experts model that is larger than the machine's memory.

CONTRIBUTING shows the rooms, which are the folders here, and how data passes through them.
"""

__version__ = "0.1.0"
