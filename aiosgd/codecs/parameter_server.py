"""Parameter server: one node keeps the weights, the workers send updates and get differences."""

from __future__ import annotations

from aiosgd.codecs.base import (
    SERVER,
    WORKERS,
    Array,
    Block,
    Codec,
    Envelope,
    Group,
    Message,
    Vector,
    mean,
)


class Server(Codec):
    """Keeps the weights and, for each receiver of differences, a mirror of what it holds.

    In sync mode all workers get the same differences, so one mirror stands for all of them.
    """

    compresses = True

    def start(self) -> None:
        """Begin with the initial weights, here and in the mirrors."""
        self.state: Vector = self.ctx.initial.copy()
        receivers = self.ctx.workers if self.ctx.mode == "async" else (WORKERS,)
        self.mirrors: dict[int | Group, Vector] = {to: self.state.copy() for to in receivers}
        self.updates: dict[int, Array] = {}  # sync: block id -> update of the current step
        self.step = 0  # sync: the step whose updates are awaited
        self.missing = sum(map(len, self.ctx.block_owners))  # async: last updates under way

    async def receive(self, message: Message) -> list[Envelope]:
        """Add an update to the weights and answer."""
        update = self.ctx.decompress(message.content["update"])
        if self.ctx.mode == "sync":
            return self.collect(message.step, message.content["block"], update)
        self.state += update
        self.missing -= message.step == self.ctx.steps - 1
        return [self.difference(worker) for worker in self.receivers(message.sender)]

    def collect(self, step: int, block_id: int, update: Array) -> list[Envelope]:
        """Keep a block's update; the last one of the step completes the mean."""
        if step < self.step or block_id in self.updates:
            return []  # another owner's copy
        self.updates[block_id] = update
        if len(self.updates) < self.ctx.block_count:
            return []
        self.state += mean(self.updates)
        self.updates.clear()
        self.step += 1
        return [self.difference(WORKERS)]

    def receivers(self, sender: int) -> tuple[int, ...]:
        """Return who gets an answer: the sender, and at the very end all workers."""
        return (sender,) if self.missing else self.ctx.workers

    def difference(self, to: int | Group) -> Envelope:
        """Return what `to` lacks, and count on its adding just that."""
        payload = self.ctx.compress(self.state - self.mirrors[to], None)  # the mirror is memory
        self.mirrors[to] += self.ctx.decompress(payload)
        return Envelope(to, {"difference": payload})

    def weights(self) -> Vector:
        """Return a copy of the weights."""
        return self.state.copy()


class ParameterServer(Codec):
    """A worker sends its updates to the server and adds the difference that comes back.

    Rule (sync): w ← w + 1/B · Σ_b u_b once per step, over the updates u_b of its B blocks, added
    in the order of the block ids. Rule (async): w ← w + u for every update that arrives, computed
    on weights as old as they may be.

    Async adds the updates of n workers where sync takes their mean: at the same learning rate it
    goes n times as far, on older weights. Momentum makes up for neither; take a smaller rate.

    The server knows bit for bit (async: up to rounding) what a worker holds, its mirror m, and
    answers with C(w - m). What the compressor C loses is still in the next difference: error
    feedback on the server's side. The workers' own updates have it only if C has.

    Source: Li et al.: Scaling Distributed Machine Learning with the Parameter Server, OSDI 2014;
    async: Downpour SGD, Dean et al.: Large Scale Distributed Deep Networks, NIPS 2012, section 4.1.

    Law: the server's weights are the initial ones plus what it got, whatever the order; in async
    mode every worker ends with them, unless the job stops before its last step, as at its
    `target_accuracy`: then the last exchange may be missing, and a worker ends with the newest
    weights that arrived.
    """

    exchange = "updates"
    exchanges = ("updates",)
    server = Server
    compresses = True
    laws = frozenset({"mean", "consensus"})

    async def update(self, block: Block) -> Envelope:
        """Send the update to the server."""
        payload = self.ctx.compress(block.value, f"block {block.id}")
        return Envelope(SERVER, {"block": block.id, "update": payload})

    async def receive(self, message: Message) -> None:
        """Take the difference between the server's weights and this node's."""
        self.set_result(self.ctx.decompress(message.content["difference"]))
