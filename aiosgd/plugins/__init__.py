"""Plugins: every kind has its base class and its built-ins in one file."""
