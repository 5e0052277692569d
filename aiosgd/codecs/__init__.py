"""Codecs: who sends what to whom, and when a step is complete."""
