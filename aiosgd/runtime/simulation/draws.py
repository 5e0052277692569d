"""Randomness by counting: a draw depends on what it is for, and on nothing that happened before.

A message's jitter is a function of (seed, sender, receiver, its number, purpose). To add a node, a
fault or a message elsewhere leaves it as it was: a failing case stays one while it is made smaller.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def draw(*key: int) -> int:
    """Return 64 bits that look random, the same for the same key on every machine.

    Source: the mixing function of SplitMix64; Steele, Lea, Flood: Fast splittable pseudorandom
    number generators, OOPSLA 2014, figure 15.
    """
    state = _GOLDEN
    for part in key:
        state = ((state ^ part) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def uniform(*key: int) -> float:
    """Return a number from 0 up to 1, without 1."""
    return (draw(*key) >> 11) / (1 << 53)
