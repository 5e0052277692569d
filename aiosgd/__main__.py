"""`python -m aiosgd`: the command line."""

from aiosgd.cli import main

main()
