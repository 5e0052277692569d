"""A job's plugins, loaded and checked: what the submitter checks and every node builds from."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from aiosgd.codecs.base import Codec, Context, Exchange, Mode, Role, Vector
from aiosgd.errors import CodecError, ConfigError, PluginLoadError
from aiosgd.plugins.code import Code, is_file
from aiosgd.plugins.compressors import chain
from aiosgd.plugins.compressors.base import Compressor
from aiosgd.plugins.datasets import Data, DataFile, Dataset
from aiosgd.plugins.kinds import (
    ASSIGNMENTS,
    CODECS,
    COMPRESSORS,
    DATASETS,
    KINDS,
    MODELS,
    OPTIMIZERS,
    PARTITIONS,
    TOPOLOGIES,
)
from aiosgd.plugins.models import Model
from aiosgd.plugins.optimizers import Optimizer
from aiosgd.plugins.registry import Entry, describe, make_params
from aiosgd.plugins.topologies import Graph, Topology
from aiosgd.runtime.config import JobConfig

Group = Mapping[str, tuple[int, ...]]

FACTORY = "factory"
"""The parameter that names code, of models and data sets: of those, a model's is run on nodes."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything that a job's configuration names, checked against each other.

    Attributes:
        codec, server_codec: the codec classes of workers and servers.
        exchange: what blocks and results are.
        compressor: makes a node's compressor for a tensor group from its random generator.
        owners: for each block, the workers that compute it.
        shares: each worker's sample indices; None where all workers see all samples.
        steps_per_epoch, steps: per worker.
        groups: tensor groups in order; each maps its parameters to their shapes. One codec
            instance per group and node.
        topology: who exchanges with whom; None is everybody with everybody.
    """

    job: JobConfig
    codec: type[Codec]
    codec_params: Any
    server_codec: type[Codec] | None
    server_params: Any
    exchange: Exchange
    compressor: Callable[[np.random.Generator], Compressor]
    optimizer: type[Optimizer]
    optimizer_params: Any
    model: Model
    data: Data
    owners: tuple[tuple[int, ...], ...]
    shares: list[npt.NDArray[np.int64]] | None
    steps_per_epoch: int
    steps: int
    groups: tuple[Group, ...]
    topology: Graph | None = None

    @property
    def block_count(self) -> int:
        """Number of blocks in a global batch."""
        return len(self.owners)

    @functools.cached_property
    def _sample_counts(self) -> tuple[int, ...]:
        """How many training samples each worker has; all of them where they are shared."""
        if self.shares is not None:
            return tuple(map(len, self.shares))
        workers = 1 + max(owner for owners in self.owners for owner in owners)
        return (len(self.data.train_y),) * workers

    @functools.cached_property
    def _blocks_by_node(self) -> dict[int, tuple[int, ...]]:
        """The blocks that each worker computes, ascending."""
        blocks: defaultdict[int, list[int]] = defaultdict(list)
        for block, owners in enumerate(self.owners):
            for worker in owners:
                blocks[worker].append(block)
        return {worker: tuple(own) for worker, own in blocks.items()}

    @property
    def mixing(self) -> str:
        """What to say of how fast the topology mixes; nothing of a full one."""
        if self.topology is None:
            return ""
        gap = self.topology.spectral_gap
        words = "too small to be seen among so many workers" if gap is None else f"{gap:.3g}"
        return f"topology {self.job.topology}: spectral gap {words}"

    def banner(self, nodes: Collection[int]) -> str:
        """Return what is about to be trained, how, on how many nodes, as one line."""
        job, servers = self.job, sum(node < 0 for node in nodes)
        codec = job.codec if job.compressor == "none" else f"{job.codec} with {job.compressor}"
        epochs = -(-self.steps // self.steps_per_epoch)
        facts = [
            f"{codec} ({job.mode}, {self.exchange})",
            f"{job.model} of {self.model.size:,} parameters",
            f"{job.dataset} of {len(self.data.train_y):,} samples",
            _counted(len(nodes) - servers, "worker"),
            *([_counted(servers, "server")] if servers else []),
            f"{_counted(self.steps, 'step')} in {_counted(epochs, 'epoch')}",
            f"seed {job.seed}",
        ]
        return ", ".join(facts)

    def initial(self) -> Vector:
        """Return the weights that every node starts with."""
        return self.model.initial(np.random.default_rng([self.job.seed, 0]))

    def make_optimizer(self) -> Optimizer:
        """Return a fresh optimizer for the whole parameter vector."""
        return self.optimizer(
            self.optimizer_params, self.job.learning_rate, self.model.size, self.steps
        )

    def _rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        rate: float = self.optimizer_params.rate(self.job.learning_rate, step, self.steps)
        return rate

    def make_codec(
        self,
        node: int,
        group: int,
        workers: Sequence[int],
        servers: Sequence[int],
        initial: Vector,
        **tools: Any,
    ) -> Codec:
        """Return the codec of one node and tensor group, with its context; not started yet.

        Args:
            initial: the initial weights of this tensor group.
            tools: the context's `executor`, `logger` and `memory`.

        Raises:
            CodecError: it cannot be made.
        """
        seed = [self.job.seed, 2, node + 1_000_000, group]
        rng, compressor_rng = (np.random.default_rng([*seed, i]) for i in range(2))
        compressor = self.compressor(compressor_rng)
        compressor.shapes = self.groups[group]
        role: Role = "server" if node < 0 else "worker"
        kind = self.server_codec if role == "server" and self.server_codec else self.codec
        ctx = Context(
            node=node,
            role=role,
            workers=tuple(workers),
            servers=tuple(servers),
            server=servers[group % len(servers)] if servers else None,
            block_owners=self.owners,
            blocks_by_node=self._blocks_by_node,
            mode=self.job.mode,
            exchange=self.exchange,
            steps=self.steps,
            learning_rate=self.job.learning_rate,
            seed=self.job.seed,
            sample_counts=self._sample_counts,
            params=self.server_params if role == "server" else self.codec_params,
            rng=rng,
            initial=initial,
            shapes=self.groups[group],
            topology=self.topology,
            schedule=self._rate,
            compressor=compressor,
            **tools,
        )
        return _create(kind, ctx)


def _create(kind: type[Codec], ctx: Context) -> Codec:
    try:
        return kind.create(ctx)
    except CodecError:
        raise
    except (Exception, SystemExit) as error:
        # codecs in the older form are made in a way of their own, from a node's id
        ours = kind.create.__func__ is Codec.create.__func__  # type: ignore[attr-defined]
        hint = "; a codec takes no arguments: it prepares itself in start()" if ours else ""
        raise CodecError(
            f"codec {kind.__name__} cannot be made on node {ctx.node}: {describe(error)}{hint}"
        ) from error


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def group_size(group: Group) -> int:
    """Return the number of elements of a tensor group."""
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in group.values())


# Loading -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Codecs:
    """The codec classes of a job, before anything else is loaded."""

    codec: type[Codec]
    server_codec: type[Codec] | None


def load_codecs(job: JobConfig, sources: Mapping[str, Path] | None = None) -> Codecs:
    """Load the job's codec and its server half.

    Args:
        job: the job.
        sources: where the job's own code is on this machine, if not at its name.
    """
    codec = _load_codec(job.codec, sources)
    server = _load_codec(job.server_codec, sources) if job.server_codec else codec.server
    return Codecs(codec=codec, server_codec=server)


def named_code(job: JobConfig) -> list[str]:
    """Return the code of the user's own that nodes run for a job, each once.

    That is a codec given as FILE.py:CLASS, and whatever a model's parameter `factory` names.
    """
    codecs = [name for name in (job.codec, job.server_codec) if name and is_file(name)]
    factories = [str(job.model_params[FACTORY])] if FACTORY in job.model_params else []
    return list(dict.fromkeys([*codecs, *factories]))


def file_code(job: JobConfig) -> list[str]:
    """Return, of a job's own code, what is given as a file: its source travels with the job."""
    return [name for name in named_code(job) if is_file(name)]


def with_code(job: JobConfig, names: Mapping[str, str]) -> JobConfig:
    """Return a job whose own code has other names.

    Args:
        job: the job.
        names: what it names -> what to put in its place; others stay.
    """
    params = dict(job.model_params)
    if FACTORY in params:
        params[FACTORY] = names.get(str(params[FACTORY]), params[FACTORY])
    return dataclasses.replace(
        job,
        codec=names.get(job.codec, job.codec),
        server_codec=names.get(job.server_codec or "", job.server_codec),
        model_params=params,
    )


def _load_codec(name: str, sources: Mapping[str, Path] | None) -> type[Codec]:
    if name.endswith(".py"):
        raise ConfigError(f"codec {name!r} names no class; expected FILE.py:CLASS")
    if not is_file(name):
        return CODECS.load(name)
    code = Code(name).allowed((sources or {}).get(name))
    return CODECS.check(code.load("codec"), f"codec {name!r}")


def _own_code(params: Any, sources: Mapping[str, Path] | None = None) -> Any:
    """Return a plugin's parameters with leave to run the code that they name."""
    code = getattr(params, FACTORY, None)
    if not isinstance(code, Code):
        return params
    return dataclasses.replace(params, factory=code.allowed((sources or {}).get(code.text)))


def make_dataset(job: JobConfig, data_dir: Path, *, own: bool = False) -> Dataset:
    """Return the job's data set, not loaded yet.

    Args:
        job: the job.
        data_dir: this machine's folder for data.
        own: whether the job is of this machine's user, so that code which it names may be run.
    """
    kind = DATASETS.load(job.dataset)
    params = make_params(kind, job.dataset_params, "dataset")
    return kind(_own_code(params) if own else params, data_dir)


def dataset_files(job: JobConfig, data_dir: Path) -> list[DataFile]:
    """Return the files that the job's data set needs, as the submitter's machine has them."""
    return make_dataset(job, data_dir, own=True).files()


def plugins_of(job: JobConfig) -> list[Entry]:
    """Return the plugins that a job names: what nodes must have in the same version."""
    kinds = KINDS.keys() - {"tracker"}  # which run where the job was submitted
    names = {kind: getattr(job, kind) for kind in KINDS if kind in kinds and hasattr(job, kind)}
    links = [("compressor", link.name) for link in chain.parse(names.pop("compressor"))]
    chosen = [("codec", job.server_codec), *names.items(), *links]
    return [
        KINDS[kind].entry(name) for kind, name in chosen if name is not None and not is_file(name)
    ]


def load(
    job: JobConfig,
    workers: int,
    data_dir: Path,
    *,
    paths: Mapping[str, Path] | None = None,
    sources: Mapping[str, Path] | None = None,
) -> Workload:
    """Load and check everything that a job names.

    Args:
        job: the job.
        workers: how many workers it runs on.
        data_dir: this machine's folder for data.
        paths: where the data set's files are; None: where the data set finds them. Then it is the
            submitter's own job; on a node, nothing in it may name a file there.
        sources: as in `load_codecs`.

    Raises:
        ConfigError: values that do not fit together; the message says which and what would.
        PluginError: a plugin is missing or broken.
    """
    if paths is not None and job.topology_params.get("file"):
        raise ConfigError("topology.file names a file of the submitter's; expected its links")
    codecs = load_codecs(job, sources)
    _check_codec(job, codecs)
    compressor = chain.factory(COMPRESSORS, job.compressor, job.compressor_params)
    optimizer = OPTIMIZERS.load(job.optimizer)
    data = _load_data(job, data_dir, paths)
    model_class = MODELS.load(job.model)
    model_params = make_params(model_class, job.model_params, "model")
    model = model_class(_own_code(model_params, sources), data.inputs, data.classes)
    _check_target(job, data)
    owners = _owners(job, workers)
    per_epoch = _steps_per_epoch(job, len(owners), len(data.train_y))
    return Workload(
        job=job,
        codec=codecs.codec,
        codec_params=make_params(codecs.codec, job.codec_params, "codec"),
        server_codec=codecs.server_codec,
        server_params=_server_params(job, codecs),
        exchange=job.exchange or codecs.codec.exchange,
        compressor=compressor,
        optimizer=optimizer,
        optimizer_params=make_params(optimizer, job.optimizer_params, "optimizer"),
        model=model,
        data=data,
        owners=owners,
        shares=_shares(job, workers, data),
        steps_per_epoch=per_epoch,
        steps=min(job.epochs * per_epoch, job.max_steps or job.epochs * per_epoch),
        groups=_groups(model.shapes, job.granularity),
        topology=_graph(job, workers),
    )


def _load_data(job: JobConfig, data_dir: Path, paths: Mapping[str, Path] | None) -> Data:
    dataset = make_dataset(job, data_dir, own=paths is None)
    if paths is None:
        return dataset.load({file.name: file.path for file in dataset.files()})
    return dataset.load(_Brought(paths))


class _Brought(dict[str, Path]):
    """The data files that came with a job: a node reads no others for it."""

    def __missing__(self, name: str) -> Path:
        raise ConfigError(f"data file {name!r} did not come with the job")


def _server_params(job: JobConfig, codecs: Codecs) -> Any:
    """Return the server half's parameters: its own, or the worker's where it declares none."""
    if codecs.server_codec is None:
        if job.server_codec_params:
            raise ConfigError(
                f"server_codec.{next(iter(job.server_codec_params))} has no effect: codec "
                f"{job.codec!r} has no server half"
            )
        return None
    if job.server_codec_params or hasattr(codecs.server_codec, "Params"):
        return make_params(codecs.server_codec, job.server_codec_params, "server_codec")
    return make_params(codecs.codec, job.codec_params, "codec")


def _check_class(codec: type[Codec], name: str) -> None:
    """Refuse class attributes that no job could honour: a slip there would train wrongly."""
    if codec.exchange not in get_args(Exchange):
        raise PluginLoadError(
            f"codec {name!r}: exchange is {codec.exchange!r}; expected "
            f"{' or '.join(map(repr, get_args(Exchange)))}"
        )
    modes: object = codec.modes
    known = isinstance(modes, Collection) and all(mode in get_args(Mode) for mode in modes)
    if not modes or not known:
        raise PluginLoadError(
            f"codec {name!r}: modes is {modes!r}; expected a tuple of "
            f"{' and '.join(map(repr, get_args(Mode)))}"
        )


def _check_codec(job: JobConfig, codecs: Codecs) -> None:
    codec, server = codecs.codec, codecs.server_codec
    _check_class(codec, job.codec)
    if server is not None:
        _check_class(server, job.server_codec or server.__name__)
    _check_mode(job, f"codec {job.codec!r}", codec)
    if server is not None:
        _check_mode(job, f"server codec {job.server_codec or server.__name__!r}", server)
    if job.exchange and job.exchange not in codec.exchanges:
        raise ConfigError(
            f"codec {job.codec!r} cannot exchange {job.exchange!r}; it exchanges "
            f"{' or '.join(map(repr, codec.exchanges))}"
        )
    compresses = codec.compresses or (server is not None and server.compresses)
    if job.compressor != "none" and not compresses:
        raise ConfigError(
            f"compressor {job.compressor!r} has no effect: codec {job.codec!r} compresses nothing"
        )
    if job.topology != JobConfig.topology and not codec.uses_topology:
        raise ConfigError(f"topology {job.topology!r} has no effect: codec {job.codec!r} uses none")
    _check_loss(job, codec)
    if job.overlap and job.mode == "async":
        raise ConfigError("overlap is for mode 'sync'; async workers never wait for an exchange")
    if job.overlap and (job.exchange or codec.exchange) == "weights":
        raise ConfigError(
            "overlap cannot be used with exchange 'weights': a step's weights would be lost; "
            "use gradients or updates"
        )


def _check_loss(job: JobConfig, codec: type[Codec]) -> None:
    if job.on_loss == "stop":
        return
    if job.mode == "sync" and job.checkpoint_every is None:
        raise ConfigError(
            "on_loss is 'continue', which in mode 'sync' goes back to the last checkpoint; give "
            "checkpoint_every, too"
        )
    if job.mode == "async" and not codec.bears_loss:
        raise ConfigError(f"codec {job.codec!r} cannot go on without a worker; on_loss is 'stop'")
    if job.record:
        raise ConfigError(
            "a record cannot hold the loss of a worker; on_loss is 'stop', or no record"
        )


def _check_mode(job: JobConfig, name: str, codec: type[Codec]) -> None:
    if job.mode not in codec.modes:
        raise ConfigError(
            f"{name} is not made for mode {job.mode!r}; it has: {', '.join(codec.modes)}"
        )


def _check_target(job: JobConfig, data: Data) -> None:
    if job.target_accuracy is not None and not len(data.test_y):
        raise ConfigError(
            f"target_accuracy is {job.target_accuracy:g}, but data set {job.dataset!r} has no test "
            "samples to measure it on"
        )


def _owners(job: JobConfig, workers: int) -> tuple[tuple[int, ...], ...]:
    kind = ASSIGNMENTS.load(job.assignment)
    assignment = kind(make_params(kind, job.assignment_params, "assignment"))
    return assignment.owners(workers, job.redundancy)


def _make_topology(job: JobConfig) -> Topology:
    kind = TOPOLOGIES.load(job.topology)
    return kind(make_params(kind, job.topology_params, "topology"))


def _graph(job: JobConfig, workers: int) -> Graph | None:
    """Return who exchanges with whom; the full graph, which codecs have anyway, is left out."""
    if job.topology == JobConfig.topology and not job.topology_params:
        return None
    return _make_topology(job).graph(workers, job.seed)


def portable(job: JobConfig) -> JobConfig:
    """Return the job without what only this machine has: the links instead of a file of them.

    Raises:
        ConfigError: the file is missing or wrong.
        PluginError: there is no such topology.
    """
    if job.topology == JobConfig.topology:
        return job
    topology = _make_topology(job)
    params = topology.portable()
    if params is topology.params:
        return job
    return dataclasses.replace(job, topology_params=dataclasses.asdict(params))


def _shares(job: JobConfig, workers: int, data: Data) -> list[npt.NDArray[np.int64]] | None:
    kind = PARTITIONS.load(job.partition)
    partition = kind(make_params(kind, job.partition_params, "partition"))
    if kind.shared:
        return None
    if job.redundancy > 1:
        raise ConfigError(
            f"redundancy {job.redundancy} needs partition 'shared': with {job.partition!r} a "
            "worker does not see the samples of another's block"
        )
    return partition.split(data.train_y, workers, np.random.default_rng([job.seed, 3]))


def _steps_per_epoch(job: JobConfig, blocks: int, samples: int) -> int:
    batch = blocks * job.batch_size
    if blocks > samples:
        raise ConfigError(
            f"{blocks} blocks per step need as many samples, but the data set has {samples}; use "
            "fewer workers"
        )
    if batch > samples:
        raise ConfigError(
            f"batch_size {job.batch_size} x {blocks} blocks = {batch} samples per step, but the "
            f"data set has {samples}; use a batch_size of at most {samples // blocks}"
        )
    return samples // batch


def _groups(shapes: Group, granularity: str | int) -> tuple[Group, ...]:
    """Cut the parameters into tensor groups, in order."""
    if granularity == "model":
        return (dict(shapes),)
    limit = 0 if granularity == "tensor" else int(granularity)
    groups: list[dict[str, tuple[int, ...]]] = []
    for name, shape in shapes.items():
        if groups and 4 * (group_size(groups[-1]) + group_size({name: shape})) <= limit:
            groups[-1][name] = shape
        else:
            groups.append({name: shape})
    return tuple(groups)
