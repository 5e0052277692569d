"""Benchmarks of a user's own machines; tests/bench compares with other systems."""
