"""Models that are pure functions of JAX's, over aiosgd's one flat vector of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from aiosgd.errors import ConfigError
from aiosgd.plugins.code import Code, call
from aiosgd.plugins.models import Labels, Model, Vector, check_batch
from aiosgd.plugins.registry import describe

Tree: TypeAlias = Any

EVALUATION_ROWS = 256
"""Samples per forward pass of `evaluate`; each other number of rows is compiled for once more."""


class Functions(NamedTuple):
    """What a user's function returns, in this order.

    Attributes:
        init: a random key -> parameters, a pytree of float32 arrays.
        loss: (parameters, x, y) -> the mean loss of a batch, a scalar.
        predict: (parameters, x) -> logits, (n, classes).
    """

    init: Callable[..., Tree]
    loss: Callable[..., Any]
    predict: Callable[..., Any]


def load_jax() -> Any:
    """Import JAX; nobody else does.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import jax  # noqa: PLC0415 - it takes a second
        import jax.flatten_util  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError("the model 'jax' needs JAX: pip install 'aiosgd[jax]'") from error
    return jax


class Jax(Model):
    """A pure loss function that JAX differentiates and compiles; needs the extra `jax`.

    A function of the user's own returns (init, loss, predict): `init(key)` gives the parameters, a
    pytree of float32 arrays; `loss(parameters, x, y)` the mean loss; `predict(parameters, x)` the
    logits. x is float32, (n, *inputs); y int32, (n,). All three are pure: what they draw they draw in
    every step alike. Nodes take the function only if they were started with --allow-code.

    Gradients are compiled at the first block, which takes seconds for a large model.

    Raises:
        ConfigError: JAX is missing, or the functions do not fit the samples or aiosgd.
        PluginLoadError: the user's function failed.
    """

    @dataclass(frozen=True, kw_only=True)
    class Params:
        """Parameters of `Jax`.

        Attributes:
            factory: called with `args`; returns (init, loss, predict).
            args: the function's arguments, by name.
        """

        factory: Code
        args: dict[str, Any] = field(default_factory=dict)

    def __init__(self, params: Params, inputs: tuple[int, ...], classes: int) -> None:
        self._jax = load_jax()
        self._params, self._inputs, self._classes = params, inputs, classes
        self._functions = self._make()
        tree = self._tree(0)
        self.shapes = self._checked(tree)
        _, self._unravel = self._jax.flatten_util.ravel_pytree(tree)
        self._try(tree)
        self._compiled = self._jax.jit(self._differentiated)
        self._evaluated = self._jax.jit(self._measured)

    # making

    @property
    def _origin(self) -> str:
        return f"model.factory {self._params.factory.text!r}"

    def _wrong(self, text: str) -> ConfigError:
        return ConfigError(f"{self._origin} {' '.join(text.split())}")

    def _make(self) -> Functions:
        factory = self._params.factory.function("model.factory")
        made = call(self._origin, factory, **self._params.args)
        if not isinstance(made, Sequence) or len(made) != 3 or not all(map(callable, made)):
            raise self._wrong(f"returned {made!r:.80}; expected (init, loss, predict), functions")
        return Functions(*made)

    def _tree(self, seed: int) -> Tree:
        return call(f"{self._origin}: init", self._functions.init, self._jax.random.key(seed))

    def _checked(self, tree: Tree) -> dict[str, tuple[int, ...]]:
        """Return the parameters' names and shapes in the order of the flat vector."""
        leaves, _ = self._jax.tree_util.tree_flatten_with_path(tree)
        for path, leaf in leaves:
            if getattr(leaf, "dtype", None) != np.float32:
                found = getattr(leaf, "dtype", type(leaf).__name__)
                raise self._wrong(f"has parameter {_name(path)!r} of {found}; expected float32")
        shapes = {_name(path): tuple(leaf.shape) for path, leaf in leaves}
        if not sum(map(math.prod, shapes.values())):
            raise self._wrong("has no parameters; there is nothing to train")
        if len(shapes) != len(leaves):
            raise self._wrong(f"has parameters of the same name; there are {', '.join(shapes)}")
        return shapes

    def _try(self, tree: Tree) -> None:
        """Work out the shapes of what the functions give, without computing."""
        jax = self._jax
        x = jax.ShapeDtypeStruct((2, *self._inputs), np.float32)
        y = jax.ShapeDtypeStruct((2,), np.int32)
        for name, arguments, expected in (
            ("predict", (x,), (2, self._classes)),
            ("loss", (x, y), ()),
        ):
            try:
                found = jax.eval_shape(getattr(self._functions, name), tree, *arguments).shape
            except Exception as error:
                raise self._wrong(
                    f"has a {name} that fails for samples of shape {self._inputs}: "
                    f"{describe(error):.300}"
                ) from error
            if found != expected:
                raise self._wrong(
                    f"has a {name} that gives {found} for 2 samples; expected {expected}"
                )

    def initial(self, rng: np.random.Generator) -> Vector:
        """Return the weights that `init` gives for a key from `rng`."""
        vector, _ = self._jax.flatten_util.ravel_pytree(self._tree(int(rng.integers(1 << 31))))
        return np.array(vector, np.float32)

    # computing

    def _measured(self, vector: Any, x: Any, y: Any) -> tuple[Any, Any]:
        tree = self._unravel(vector)
        hits = (self._functions.predict(tree, x).argmax(-1) == y).sum()
        return self._functions.loss(tree, x, y), hits

    def _differentiated(self, vector: Any, x: Any, y: Any) -> tuple[tuple[Any, Any], Any]:
        # what predict computes that loss does, too, XLA computes once
        return self._jax.value_and_grad(self._measured, has_aux=True)(vector, x, y)  # type: ignore[no-any-return]

    def gradients(self, weights: Vector, x: Vector, y: Labels, out: Vector) -> tuple[float, float]:
        """Write the gradient of the batch's mean loss into `out`; return (mean loss, accuracy)."""
        check_batch(x, y, self._inputs, self._classes)
        (loss, hits), gradient = self._compiled(weights, x, y.astype(np.int32))
        np.copyto(out, np.asarray(gradient))
        return float(loss), int(hits) / len(y)

    def evaluate(self, weights: Vector, x: Vector, y: Labels) -> tuple[float, float]:
        """Return (mean loss, accuracy) without training."""
        check_batch(x, y, self._inputs, self._classes)
        total, right = 0.0, 0
        for start in range(0, len(y), EVALUATION_ROWS):
            part = slice(start, start + EVALUATION_ROWS)
            labels = y[part].astype(np.int32)
            loss, hits = self._evaluated(weights, x[part], labels)
            total, right = total + float(loss) * len(labels), right + int(hits)
        return total / len(y), right / len(y)


def _name(path: Sequence[Any]) -> str:
    """Return a leaf's place in the pytree as a name: `layers.0.weight`."""
    keys = (getattr(one, "key", getattr(one, "idx", getattr(one, "name", one))) for one in path)
    return ".".join(map(str, keys)) or "parameters"
