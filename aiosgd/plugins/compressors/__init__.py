"""Compressors: base.py says what one is, chain.py how they are combined."""
