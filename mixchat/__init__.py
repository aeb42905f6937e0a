"""Chat with a mixture-of-experts model that is larger than the machine's fast memory."""

__version__ = "0.1.0"
