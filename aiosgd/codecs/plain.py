"""Plain: the mean over all blocks, every worker to every other."""

from __future__ import annotations

from aiosgd.codecs.base import Array, Block, Codec, Envelope, Message, mean


class Plain(Codec):
    """Every worker ends each step with the mean over all blocks.

    Rule: result = 1/B · Σ_b C(value_b) over the B blocks of the global batch, added in the order
    of their ids; C is what the job's compressor keeps (the identity without one). A worker adds
    its own blocks as the others decode them, so that all have the same bits.

    Traffic: each block goes to every worker that did not compute it, (n - r) · B payloads per
    step for n workers and redundancy r.

    With redundancy the first copy of a block counts, and nobody waits for another worker's. Copies
    are equal unless the compressor has memory or draws random numbers, or, in async mode, because
    each owner computes a block on weights of its own; then take redundancy 1.

    In async mode the mean of a step is published when its last block arrives, however late; a
    worker applies the sum of what was published since its last step. No block is lost or counted
    twice. Of weights it takes the newest mean instead of the sum.

    Law: with plain SGD it equals one worker that computes the whole batch.
    """

    compresses = True
    laws = frozenset({"mean", "consensus"})

    def start(self) -> None:
        """Begin without blocks."""
        self.incomplete: dict[int, dict[int, Array]] = {}  # step -> block id -> value
        self.newest: dict[int, int] = {}  # block id -> the last step it was counted in

    async def update(self, block: Block) -> Envelope:
        """Count the block and send it to the workers that do not compute it."""
        payload = self.ctx.compress(block.value, f"block {block.id}")
        self.add(block.step, block.id, payload)
        content = {"block": block.id, "value": payload}
        return Envelope(self.ctx.workers_without(block.id), content)

    async def receive(self, message: Message) -> None:
        """Count another worker's block."""
        self.add(message.step, message.content["block"], message.content["value"])

    def add(self, step: int, block_id: int, payload: object) -> None:
        """Count a block once, and publish its step's mean if it is the last one."""
        if step <= self.newest.get(block_id, -1):
            return  # another owner's copy
        self.newest[block_id] = step
        blocks = self.incomplete.setdefault(step, {})
        blocks[block_id] = self.ctx.decompress(payload)
        if len(blocks) == self.ctx.block_count:
            operation = newest if self.ctx.exchange == "weights" else None
            out = self.ctx.empty(blocks[block_id].size)
            self.set_result(mean(self.incomplete.pop(step), out), operation)


def newest(_old: Array, new: Array) -> Array:
    """Return the later of two results: means of the same block owners come in their order."""
    return new
