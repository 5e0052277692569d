"""What happened in a run, moment by moment: what charts are drawn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from aiosgd.check.case import Case

WIDTH = 40
"""Characters of a label's part at most."""

Kind: TypeAlias = Literal["send", "deliver", "update", "result", "wait", "crash", "drop", "fail"]


class Moment(NamedTuple):
    """One thing that happened at one node.

    Attributes:
        time: virtual seconds, or the number of the moment where there is no clock; ascending.
        kind: `send` and `deliver` are the two ends of a message; `drop` is a message that never
            arrives, or that its receiver does not handle; `update` a block that the node's codec
            was given; `result` a complete step; `wait` the last word on a node that is not done;
            `crash` the node's end; `fail` an error that it raised.
        node: where it happened: the sender of `send` and `drop`, the receiver of `deliver`.
        peer: the other end of a message; None for what concerns one node.
        step: the step that it belongs to.
        label: what was sent, or what the node waits for; one line.
        number: pairs a `send` with its `deliver` or `drop`; 0 for what is no message.
    """

    time: float
    kind: Kind
    node: int
    peer: int | None
    step: int
    label: str
    number: int = 0


Story: TypeAlias = list[Moment]


def described(content: object) -> str:
    """Return a message's content in short: keys and types, values where they are short."""
    if isinstance(content, np.ndarray):
        small = content.size <= 3 and content.dtype.kind in "iuf"
        values = "[" + " ".join(f"{one:.3g}" for one in content.reshape(-1)) + "]" if small else ""
        return f"{content.dtype}{list(content.shape)}{values and ' ' + values}"
    if isinstance(content, Mapping):
        return ", ".join(f"{key}: {described(value)}" for key, value in content.items())
    if isinstance(content, list | tuple):
        return f"({', '.join(map(described, content))})"
    text = repr(content)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def waits(story: Story, case: Case, time: float) -> Story:
    """Return a last moment for each node that is not done: what it waits for.

    Args:
        story: what happened so far.
        case: with `workers`, `nodes` and `steps`.
        time: of the moments.
    """
    results = Counter(moment.node for moment in story if moment.kind == "result")
    last = max((one.step for one in story), default=0)
    moments = []
    for node in case.nodes:
        step = results[node] if node >= 0 else last
        if node < 0 or step < case.steps:
            moments.append(Moment(time, "wait", node, None, step, _wait(story, case, node, step)))
    return moments


def _wait(story: Story, case: Case, node: int, step: int) -> str:
    own = [one for one in story if one.node == node and one.kind in ("update", "deliver")]
    senders = {one.peer for one in own if one.kind == "deliver" and one.step == step}
    others = [peer for peer in case.nodes if peer != node and max(node, peer) >= 0]
    heard = [peer for peer in others if peer in senders]
    silent = [peer for peer in others if peer not in senders]
    hook = f"last hook: {_hook(own[-1])}" if own else "no hook was called"
    missing = f", not from {_listed(silent)}" if silent else ""
    return f"waits in step {step}; {hook}; heard in this step from {_listed(heard)}{missing}"


def _hook(moment: Moment) -> str:
    if moment.kind == "update":
        return f"update({moment.label.partition(':')[0]})"
    return f"receive from {moment.peer} in step {moment.step}"


def _listed(nodes: Sequence[int]) -> str:
    return ", ".join(map(str, nodes)) or "nobody"
