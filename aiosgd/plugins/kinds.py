"""The table of plugin kinds: one registry each."""

from __future__ import annotations

from typing import Any

from aiosgd.codecs.base import Codec
from aiosgd.plugins.assignments import Assignment
from aiosgd.plugins.compressors.base import Compressor
from aiosgd.plugins.datasets import Dataset
from aiosgd.plugins.launchers import Launcher
from aiosgd.plugins.models import Model
from aiosgd.plugins.optimizers import Optimizer
from aiosgd.plugins.partitions import Partition
from aiosgd.plugins.registry import Registry
from aiosgd.plugins.topologies import Topology
from aiosgd.plugins.trackers import Tracker

CODECS = Registry("codec", Codec)
COMPRESSORS = Registry("compressor", Compressor)
MODELS = Registry("model", Model)
DATASETS = Registry("dataset", Dataset)
OPTIMIZERS = Registry("optimizer", Optimizer)
ASSIGNMENTS = Registry("assignment", Assignment)
PARTITIONS = Registry("partition", Partition)
TOPOLOGIES = Registry("topology", Topology)
TRACKERS = Registry("tracker", Tracker)
LAUNCHERS = Registry("launcher", Launcher)

KINDS: dict[str, Registry[Any]] = {
    registry.kind: registry
    for registry in (
        CODECS,
        COMPRESSORS,
        MODELS,
        DATASETS,
        OPTIMIZERS,
        ASSIGNMENTS,
        PARTITIONS,
        TOPOLOGIES,
        TRACKERS,
        LAUNCHERS,
    )
}
