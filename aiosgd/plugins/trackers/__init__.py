"""Trackers: base.py says what one is; each runs where the job was submitted, never on a node."""

from aiosgd.plugins.trackers.base import Job, Rows, Tracker
from aiosgd.plugins.trackers.files import Csv, Jsonl

__all__ = ["Csv", "Job", "Jsonl", "Rows", "Tracker"]
