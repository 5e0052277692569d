"""Models that are PyTorch modules, over aiosgd's one flat vector of parameters."""

from __future__ import annotations

import contextlib
import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np

from aiosgd.errors import ConfigError
from aiosgd.plugins.code import Code, call
from aiosgd.plugins.models import Array, Labels, Model, Vector, check_batch
from aiosgd.plugins.registry import describe
from aiosgd.plugins.torch import load_torch

Tensor: TypeAlias = Any
Module: TypeAlias = Any

EVALUATION_ROWS = 256
"""Samples per forward pass of `evaluate`: a convolution's outputs take far more than its inputs."""
TRIAL_ROWS = 2
"""Samples of the forward pass that tries a new module out; one might be taken for no batch."""


@dataclass(frozen=True, kw_only=True)
class TorchParams:
    """Parameters of every `TorchModel`; those of a model of its own derive from it.

    Attributes:
        device: where it computes; `auto` is on a GPU if PyTorch finds one.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"


# Between the vectors and the device -------------------------------------------------------------


class Link(Protocol):
    """Brings numpy's vectors to where a module computes, and gradients back."""

    def weights(self, weights: Vector) -> Tensor:
        """Return the weights as one tensor there; a later call may overwrite it."""

    def batch(self, array: Array) -> Tensor:
        """Return samples or labels as a tensor there."""

    def gradients(self, parts: Sequence[Tensor], out: Vector) -> None:
        """Write gradients, vectors in the order of the parameters, into `out`."""


class SharedMemory:
    """Computes where numpy does: tensors are numpy's own memory.

    Each gradient is written once by the backward pass and once into its place in `out`. To have
    autograd accumulate into views of `out` takes a pass more, for they have to be zeros before.
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def weights(self, weights: Vector) -> Tensor:
        """Return the very memory of the weights."""
        return self._torch.from_numpy(_writable(weights))

    def batch(self, array: Array) -> Tensor:
        """Return the very memory of the samples."""
        return self._torch.from_numpy(_writable(array))

    def gradients(self, parts: Sequence[Tensor], out: Vector) -> None:
        """Copy each gradient to its place."""
        self._torch.cat(parts, out=self._torch.from_numpy(out))


class Staged:
    """Computes on a device with memory of its own, over staging vectors of this machine's.

    Args:
        torch: the library.
        device: where it computes.
        size: number of parameters.
        pin: whether the staging vectors are page-locked: then the device reads and writes them by
            itself, while this thread goes on.
    """

    def __init__(self, torch: Any, device: Any, size: int, *, pin: bool) -> None:
        self._torch = torch
        self._device = device
        self._pin = pin
        self._host = [torch.empty(size, pin_memory=pin) for _ in range(2)]
        self._there = [torch.empty(size, device=device) for _ in range(2)]

    def weights(self, weights: Vector) -> Tensor:
        """Copy the weights to the staging vector, and have the device fetch them.

        The vector is free by then: `gradients` and `evaluate` wait for all that was queued before.
        """
        np.copyto(self._host[0].numpy(), weights)
        return self._there[0].copy_(self._host[0], non_blocking=self._pin)

    def batch(self, array: Array) -> Tensor:
        """Copy samples or labels to the device."""
        tensor = self._torch.from_numpy(_writable(array))
        if self._pin:
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=self._pin)

    def gradients(self, parts: Sequence[Tensor], out: Vector) -> None:
        """Gather the gradients there, fetch them at once, and wait for them."""
        host, there = self._host[1], self._there[1]
        self._torch.cat(parts, out=there)
        host.copy_(there, non_blocking=self._pin)
        if self._pin:
            self._torch.cuda.synchronize(self._device)
        np.copyto(out, host.numpy())


def _writable(array: Array) -> Array:
    """Return an array that PyTorch shares without a warning: it knows no read-only memory."""
    return array if array.flags.writeable else array.copy()


# Models -----------------------------------------------------------------------------------------


class TorchModel(Model):
    """A model whose module is PyTorch's; needs the extra `torch`.

    Subclasses define `module`, and may have `Params` that derive from `TorchParams`. Parameters that
    require gradients are the model's, in the order of `named_parameters()`: a tied one counts once.
    While it computes they are views of the flat vector. All else in the module's `state_dict()` is
    the model's state: running statistics, and parameters that require no gradients.

    What a module draws (dropout) comes from PyTorch's global generator, which is seeded for each
    block and put back afterwards. An instance serves one thread at a time.

    Raises:
        ConfigError: PyTorch or a GPU is missing, or the module does not fit the samples or aiosgd.
        PluginLoadError: `module` failed.
    """

    Params: ClassVar[type] = TorchParams

    def __init__(self, params: Any, inputs: tuple[int, ...], classes: int) -> None:
        self._torch = load_torch(f"the {self._title}")
        self._params, self._inputs, self._classes = params, inputs, classes
        self._device = self._choose_device()
        self._seed: int | None = None
        self._is_taken = False
        self._adopt(*self._make(0))
        self.shapes = {name: tuple(one.shape) for name, one in _trainable(self._net).items()}
        self._sizes = [math.prod(shape) for shape in self.shapes.values()]
        self._link: Link
        if self._device.type == "cpu":
            self._link = SharedMemory(self._torch)
        else:
            self._link = Staged(self._torch, self._device, self.size, pin=True)

    @abstractmethod
    def module(self, params: Any, inputs: tuple[int, ...], classes: int) -> Any:
        """Return a new module, or a pair of a module and its loss function.

        Args:
            params: of the class's `Params`.
            inputs: the shape of one sample.
            classes: how many labels there are.

        The module takes float32 samples, (n, *inputs), and gives logits, (n, classes). The loss,
        cross-entropy where none is given, takes these and the labels, int64, (n,), and gives the
        mean over the samples.
        """

    # making

    def _choose_device(self) -> Any:
        wanted = getattr(self._params, "device", "auto")
        there = wanted != "cpu" and self._torch.cuda.is_available()
        if wanted == "cuda" and not there:
            raise ConfigError("model.device is 'cuda', but PyTorch finds no GPU; expected auto")
        if not there:
            return self._torch.device("cpu")
        return self._torch.device("cuda", self._torch.cuda.current_device())

    @property
    def _title(self) -> str:
        """What this is, for messages."""
        return f"model {type(self).__name__}"

    @property
    def _origin(self) -> str:
        """What made the module, for messages."""
        return self._title

    def _make(self, seed: int) -> tuple[Module, Callable[..., Tensor]]:
        """Return a new module and its loss, tried out; the same seed gives the same bits."""
        with self._drawing(seed):
            made = call(self._origin, self.module, self._params, self._inputs, self._classes)
            pair = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
            net, loss = pair
            if not isinstance(net, self._torch.nn.Module) or not (loss is None or callable(loss)):
                raise self._wrong(
                    f"returned {made!r:.80}; expected an nn.Module, or a pair of one and its loss "
                    "function"
                )
            loss = loss or self._torch.nn.functional.cross_entropy
            self._try(net, loss)
        self._check_tensors(net)
        return net, loss

    def _wrong(self, text: str) -> ConfigError:
        return ConfigError(f"{self._origin} {' '.join(text.split())}")

    def _try(self, net: Module, loss: Callable[..., Tensor]) -> None:
        """Pass a few samples through: this also gives lazy modules their parameters."""
        torch, shape = self._torch, (TRIAL_ROWS, self._classes)
        samples = torch.zeros(TRIAL_ROWS, *self._inputs)
        labels = torch.arange(TRIAL_ROWS) % self._classes
        try:
            with torch.no_grad():
                output = net.eval()(samples)
        except Exception as error:
            raise self._wrong(
                f"does not take samples of shape {self._inputs}: {describe(error)}"
            ) from error
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        if found != shape:
            raise self._wrong(
                f"gives {found} for {TRIAL_ROWS} samples; expected {shape}: a logit for each class"
            )
        try:
            with torch.no_grad():
                value = loss(output, labels)
        except Exception as error:
            raise self._wrong(f"has a loss that fails: {describe(error)}") from error
        if not isinstance(value, torch.Tensor) or value.shape != ():
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise self._wrong(f"has a loss that gives {found}; expected the mean, a scalar tensor")

    def _check_tensors(self, net: Module) -> None:
        """Refuse what the flat vector, or the files of a run, cannot hold."""
        torch = self._torch
        trainable = _trainable(net)
        if not sum(one.numel() for one in trainable.values()):
            raise self._wrong("has no parameters that require gradients; there is nothing to train")
        for name, one in net.named_parameters():
            if one.dtype != torch.float32:
                raise self._wrong(
                    f"has parameter {name!r} of {one.dtype}; expected float32: module.float()"
                )
        for name, one in _others(net, trainable).items():
            if one.dtype.is_complex or one.dtype == torch.bfloat16:
                raise self._wrong(f"has {name!r} of {one.dtype}, which no file of a run can hold")
        owners: dict[int, str] = {}
        for name, one in trainable.items():
            other = owners.setdefault(one.untyped_storage().data_ptr(), name)
            if other != name and one.numel():
                raise self._wrong(
                    f"has parameters {other!r} and {name!r} that share memory; tie them by using one "
                    "Parameter in both places"
                )

    def _adopt(self, net: Module, loss: Callable[..., Tensor]) -> None:
        """Compute with a new module from now on."""
        self._net, self._loss = net.to(self._device), loss
        self._weights = list(_trainable(net).values())
        self._bound: Vector | None = None

    def for_worker(self) -> Model:
        """Return itself, but another one for each further worker if it has running statistics."""
        is_free, self._is_taken = not self._is_taken, True
        if is_free or next(self._net.buffers(), None) is None:
            return self
        twin = copy.copy(self)
        twin._adopt(*twin._make(0))  # noqa: SLF001 - its own kind
        return twin

    def initial(self, rng: np.random.Generator) -> Vector:
        """Return the weights of a module that is made with a seed from `rng`."""
        net, _ = self._make(int(rng.integers(1 << 63)))
        parts = [one.detach().cpu().numpy().reshape(-1) for one in _trainable(net).values()]
        vector: Vector = np.concatenate(parts)
        return vector

    # randomness, state, threads

    def reseed(self, seed: Sequence[int]) -> None:
        """Have the next block draw from a generator with this seed."""
        self._seed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)

    @contextlib.contextmanager
    def _drawing(self, seed: int | None) -> Iterator[None]:
        """Draw from a seeded generator for a while: the process's own goes on where it was."""
        if seed is None:
            yield
            return
        generators = [self._torch.default_generator]
        if self._device.type == "cuda":
            generators.append(self._torch.cuda.default_generators[self._device.index])
        before = [one.get_state() for one in generators]
        for one in generators:
            one.manual_seed(seed)
        try:
            yield
        finally:
            for one, state in zip(generators, before, strict=True):
                one.set_state(state)

    @property
    def state(self) -> dict[str, Array]:
        """Copies of running statistics, and of parameters that require no gradients."""
        others = _others(self._net, _trainable(self._net))
        return {name: np.array(one.detach().cpu().numpy()) for name, one in others.items()}

    @state.setter
    def state(self, state: Mapping[str, Array]) -> None:
        others = _others(self._net, _trainable(self._net))
        shapes = {name: tuple(one.shape) for name, one in others.items()}
        found = {name: array.shape for name, array in state.items()}
        if found != shapes:
            raise ValueError(f"the model's state has {found}; expected {shapes}")
        for name, one in others.items():
            one.detach().copy_(self._torch.from_numpy(np.array(state[name])))

    def limit_threads(self, threads: int) -> int:
        """Have PyTorch compute with so many threads; return how many there were."""
        before: int = self._torch.get_num_threads()
        self._torch.set_num_threads(threads)
        return before

    # computing

    def gradients(self, weights: Vector, x: Vector, y: Labels, out: Vector) -> tuple[float, float]:
        """Write the gradient of the batch's mean loss into `out`; return (mean loss, accuracy)."""
        check_batch(x, y, self._inputs, self._classes)
        self._bind(weights)
        if not self._net.training:
            self._net.train()
        with self._drawing(self._seed):
            labels = self._link.batch(y)
            output = self._net(self._link.batch(x))
            loss = self._loss(output, labels)
            parts = self._torch.autograd.grad(loss, self._weights, materialize_grads=True)
        self._link.gradients([part.reshape(-1) for part in parts], out)
        return loss.item(), self._hits(output, labels) / len(y)

    def evaluate(self, weights: Vector, x: Vector, y: Labels) -> tuple[float, float]:
        """Return (mean loss, accuracy) in evaluation mode: with this worker's statistics."""
        check_batch(x, y, self._inputs, self._classes)
        self._bind(weights)
        if self._net.training:
            self._net.eval()
        loss, hits = 0.0, 0
        with self._torch.no_grad():
            for start in range(0, len(y), EVALUATION_ROWS):
                part = slice(start, start + EVALUATION_ROWS)
                labels = self._link.batch(y[part])
                output = self._net(self._link.batch(x[part]))
                loss += self._loss(output, labels).item() * len(labels)
                hits += self._hits(output, labels)
        return loss / len(y), hits / len(y)

    def _hits(self, output: Tensor, labels: Tensor) -> int:
        return int((output.detach().argmax(1) == labels).sum().item())

    def _bind(self, weights: Vector) -> None:
        """Make the parameters views of the weights, as they are now."""
        if weights.shape != (self.size,):
            raise ValueError(f"weights have shape {weights.shape}; expected ({self.size},)")
        if weights is self._bound and isinstance(self._link, SharedMemory):
            return
        vector = self._link.weights(weights)
        for one, part in zip(self._weights, vector.split(self._sizes), strict=True):
            one.data = part.view(one.shape)
        self._bound = weights if weights.flags.writeable else None  # else it is a copy


def _trainable(net: Module) -> dict[str, Tensor]:
    """Return the parameters that are trained, each once."""
    return {name: one for name, one in net.named_parameters() if one.requires_grad}


def _others(net: Module, trainable: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all else that a module's `state_dict()` has."""
    known = set(map(id, trainable.values()))
    tensors = net.state_dict(keep_vars=True)
    return {
        name: one for name, one in tensors.items() if hasattr(one, "dtype") and id(one) not in known
    }


class Torch(TorchModel):
    """A PyTorch module that a function of the user's own makes; needs the extra `torch`.

    Nodes take it only if they were started with --allow-code. A subclass of `TorchModel` that a
    package registers as a model needs no such leave.
    """

    @dataclass(frozen=True, kw_only=True)
    class Params(TorchParams):
        """Parameters of `Torch`.

        Attributes:
            factory: called with `args`; returns an nn.Module, or a pair of one and its loss.
            args: the function's arguments, by name.
        """

        factory: Code
        args: dict[str, Any] = field(default_factory=dict)

    _factory: Any = None

    def module(self, params: Any, inputs: tuple[int, ...], classes: int) -> Any:
        """Return what the user's function makes."""
        if self._factory is None:
            self._factory = params.factory.function("model.factory")
        return self._factory(**params.args)

    @property
    def _title(self) -> str:
        return "model 'torch'"

    @property
    def _origin(self) -> str:
        return f"model.factory {self._params.factory.text!r}"
