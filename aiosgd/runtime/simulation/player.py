"""What a node of a replay is given in the place of links, an executor and a mailbox.

The record says what happens next on each node. A message that comes early waits until it is its
turn, and so do blocks, the results of `ctx.run`, and the training loop before it looks at its
codecs. What happens between two turns is computed anew, and takes no virtual time.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import threadpoolctl

from aiosgd.errors import JobFailedError
from aiosgd.plugins.models import Model
from aiosgd.runtime.actor import Item, Mailbox, Rescue
from aiosgd.runtime.frame import encode
from aiosgd.runtime.job import node_name
from aiosgd.runtime.record import Kind, Row, Run, row_of

T = TypeVar("T")

# what an error lists at most of what is there instead
SHOWN = 4
_OF_LOOP = (Kind.LOOK, Kind.TAKE, Kind.CONCLUDE)
_WORDS = {
    Kind.BLOCK: "block {number} of step {step}",
    Kind.MESSAGE: "a message of step {step} from node {number}",
    Kind.KEPT: "the kept message of step {step} from node {number}",
    Kind.RESCUE: "a rescue of step {step}",
    Kind.RAN: "the end of call {number} of ctx.run",
    Kind.LOOK: "the training loop at step {step}",
    Kind.TAKE: "the training loop, to take what step {step} goes on with",
    Kind.CONCLUDE: "the training loop at its end, after step {step}",
}


class ReplayError(JobFailedError):
    """A replay does not go as the recorded run went."""


class Blas:
    """The number of threads that this process computes with, which stands in for all nodes.

    Args:
        model: what may have threads of its own.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._model_before = 0
        self._controller = threadpoolctl.ThreadpoolController()
        self._before = self._controller.limit(limits=None, user_api="blas")
        self._threads = 0

    def restore(self) -> None:
        """Compute with as many threads as before."""
        self._before.restore_original_limits()
        if self._model_before:
            self._model.limit_threads(self._model_before)

    def use(self, threads: int) -> None:
        """Compute with as many threads as the node had whose turn it is; sums depend on them."""
        if threads != self._threads:
            self._controller.limit(limits=threads, user_api="blas")
            before = self._model.limit_threads(threads)
            self._model_before = self._model_before or before
            self._threads = threads


class Player:
    """The journal that a node follows, and its executor.

    Args:
        node: its id.
        record: its rows.
        transport: its links.
        blas: what the nodes compute with.
        failed: told if something else comes than the record says.

    Attributes:
        over: set once all of the record has happened.
        deliver: hands a message to the session.
        taken: called with each step whose result the training loop takes.
    """

    dictates = True
    deliver: Callable[[int, Any], None]
    taken: Callable[[int], None]

    def __init__(
        self,
        node: int,
        record: Any,
        transport: ReplayTransport,
        blas: Blas,
        failed: Callable[[ReplayError], None],
    ) -> None:
        self.node = node
        self.transport = transport
        self.over = asyncio.Event()
        self._rows: list[Row] = record.tolist()
        self._place = 0
        self._blas = blas
        self._failed = failed
        self._mailboxes: dict[int, _Dictated] = {}
        self._inbox: defaultdict[tuple[int, int], deque[Any]] = defaultdict(deque)
        self._turns: dict[Row, asyncio.Future[None]] = {}  # who waits for a turn
        self._threads = self._begin()

    def _begin(self) -> int:
        """Return how many BLAS threads the node had."""
        kind, _, threads, _ = self._rows[0] if self._rows else (-1, 0, 0, 0)
        if kind != Kind.BEGIN or threads < 1:
            raise ReplayError(f"the record of {node_name(self.node)} has no beginning")
        self._place = 1
        return threads

    @property
    def last_step(self) -> int:
        """The last step whose result the training loop took; -1 without one."""
        return max((step for kind, _, _, step in self._rows if kind == Kind.TAKE), default=-1)

    @property
    def next(self) -> Row | None:
        """What happens next; None at the end."""
        return self._rows[self._place] if self._place < len(self._rows) else None

    @property
    def waits_for(self) -> int | None:
        """The node whose message comes next, if it is one that is not here."""
        row = self.next
        return row[2] if row is not None and row[0] == Kind.MESSAGE else None

    @property
    def is_stuck(self) -> bool:
        """Whether this node goes no further: its record does, or somebody waits for a turn."""
        return self.next is not None or bool(self._turns)

    # what the session calls

    def mailbox(self, group: int) -> Mailbox:
        """Return a mailbox that gives what the record says."""
        self._mailboxes[group] = _Dictated(self, group)
        return self._mailboxes[group]

    def runner(self, group: int, run: Run) -> Run:
        """Return a `ctx.run` whose results come when the record says."""
        calls = 0

        async def played(function: Callable[..., Any], *args: Any) -> Any:
            nonlocal calls
            number, calls = calls, calls + 1
            try:
                return await run(function, *args)
            finally:
                await self._turn((Kind.RAN, group, number, 0))

        return played

    async def reach(self, kind: Kind, step: int, received: int) -> None:
        """Let the training loop wait for its turn."""
        _, _, number, _ = await self._turn((kind, 0, 0, step))
        if kind is not Kind.LOOK:
            self.transport.bytes_received = number
        if kind is Kind.TAKE:
            self.taken(step)

    async def compute(self, function: Callable[..., T], *args: Any) -> T:
        """Run a training computation."""
        self._blas.use(self._threads)
        return function(*args)

    assist = compute

    # turns

    def arrive(self, sender: int, content: Any) -> None:
        """Take a message of another node; it waits here for its turn."""
        self._inbox[sender, content[0]].append(content)
        self.look()

    def advance(self) -> Row:
        """Note that what comes next happens now, and return it."""
        row = self._rows[self._place]
        self._place += 1
        self._blas.use(self._threads)
        self.look()
        return row

    async def _turn(self, caller: Row) -> Row:
        turn = self._turns[caller] = asyncio.get_running_loop().create_future()
        self.look()
        await turn
        del self._turns[caller]
        return self.advance()

    def look(self) -> None:
        """Let go ahead what comes next, if it is here."""
        row = self.next
        if row is None:
            self.over.set()
        elif row[0] in _OF_LOOP or row[0] == Kind.RAN:
            self._let_go(row)
        elif row[1] not in self._mailboxes:
            self._deviate("there is no such tensor group")
        elif self._mailboxes[row[1]].find(row) is not None:
            self._mailboxes[row[1]].rouse()
        elif row[0] == Kind.MESSAGE and self._inbox[row[2], row[1]]:
            self._hand_over(row)

    def _let_go(self, row: Row) -> None:
        caller = _caller(row)
        if (turn := self._turns.get(caller)) is not None:
            if not turn.done():
                turn.set_result(None)
        elif row[0] in _OF_LOOP and any(other[0] in _OF_LOOP for other in self._turns):
            self._deviate(self._instead())

    def _hand_over(self, row: Row) -> None:
        _, group, sender, step = row
        content = self._inbox[sender, group].popleft()
        if content[1] == step:
            self.deliver(sender, content)
        else:
            self._deviate(f"here comes {describe((Kind.MESSAGE, group, sender, content[1]))}")

    # what is wrong

    def _deviate(self, instead: str) -> None:
        self._failed(self.deviation(instead))

    def deviation(self, instead: str = "") -> ReplayError:
        """Return the error that something else is here than the record says."""
        row = self.next
        expected = "its end" if row is None else describe(row)
        place = f"{node_name(self.node)}, entry {self._place} of {len(self._rows)}"
        return ReplayError(f"{place}: the record has {expected}; {instead or self._instead()}")

    def _instead(self) -> str:
        items = [row_of(box.group, item) for box in self._mailboxes.values() for item in box]
        heads = [
            (Kind.MESSAGE, group, sender, queue[0][1])
            for (sender, group), queue in sorted(self._inbox.items())
            if queue
        ]
        here = [describe(row) for row in (*self._turns, *items, *heads)]
        return f"here are {', '.join(here[:SHOWN])}" if here else "here is nothing"

    @property
    def left(self) -> bool:
        """Whether messages are here whose turn has not come."""
        return any(self._inbox.values())


class _Dictated(Mailbox):
    """Has an item only when it is its turn; until then it is kept."""

    def __init__(self, player: Player, group: int) -> None:
        super().__init__()
        self.group = group
        self._player = player

    def __bool__(self) -> bool:
        row = self._player.next
        return row is not None and self.find(row) is not None

    def popleft(self) -> Item:
        """Return the item whose turn it is; a rescue needs nobody who asks for it."""
        row = self._player.next
        assert row is not None
        item = self._take(row)
        self._player.advance()  # afterwards: the next row may be one like this
        return item

    def _take(self, row: Row) -> Item:
        if row[0] == Kind.RESCUE:
            return Rescue(row[3], asyncio.get_running_loop().create_future())
        place = self.find(row)
        assert place is not None
        item = self[place]
        del self[place]
        return item

    def find(self, row: Row) -> int | None:
        """Return where the item of a row is."""
        if row[1] != self.group:
            return None
        if row[0] == Kind.RESCUE:
            return 0
        rows = (row_of(self.group, item) for item in self)
        return next((i for i, one in enumerate(rows) if one == row), None)


class ReplayTransport:
    """One node's links: what is sent is at its receiver at once.

    Args:
        node: its id.
        players: of all nodes, by their ids.

    Attributes:
        bytes_received: what the record says, for when they came has no part in the order.
    """

    def __init__(self, node: int, players: Mapping[int, Player]) -> None:
        self.bytes_sent = self.bytes_received = 0
        self.messages_sent = self.messages_consumed = 0
        self._node = node
        self._players = players

    def send(self, to: Sequence[int], content: Any, channel: int) -> int:
        """Send to each node."""
        node, frame = self._node, encode(content, number=channel)
        received = frame.received()
        for peer in to:
            self._players[peer].arrive(node, received)
        size = frame.size * sum(peer != node for peer in to)
        self.messages_sent += len(to)
        self.bytes_sent += size
        return size

    def consumed(self, sender: int) -> None:
        """Count a message that was handled."""
        self.messages_consumed += 1

    async def room(self, window: int) -> None:
        """Go on: whoever had to wait has waited in the run."""

    async def watch(self) -> None:
        """Wait for ever."""
        await asyncio.get_running_loop().create_future()


def _caller(row: Row) -> Row:
    """Return what a task knows of its row when it waits for its turn."""
    kind, group, number, step = row
    return (kind, 0, 0, step) if kind in _OF_LOOP else (kind, group, number, 0)


def describe(row: Row) -> str:
    """Return what a row is about."""
    kind, group, number, step = row
    text = _WORDS.get(Kind(kind), "?") if kind in set(Kind) else f"kind {kind}"
    where = f" for tensor group {group}" if group else ""
    return text.format(number=number, step=step) + where
