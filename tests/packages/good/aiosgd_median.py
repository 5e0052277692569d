"""A codec that forgives a worker whose gradients are far off."""

from dataclasses import dataclass

import numpy as np

from aiosgd import Block, Codec, Envelope, Message


class Median(Codec):
    """Every worker ends each step with the median over all blocks, element by element."""

    @dataclass(frozen=True)
    class Params:
        """The result is multiplied by `scale`."""

        scale: float = 1.0

    def start(self):
        """Begin without blocks."""
        self.blocks = {}

    async def update(self, block: Block):
        """Keep the block and send it to all who do not compute it."""
        self.add(block.id, block.value)
        content = {"block": block.id, "value": block.value}
        return Envelope(self.ctx.workers_without(block.id), content)

    async def receive(self, message: Message):
        """Keep another worker's block."""
        self.add(message.content["block"], message.content["value"])

    def add(self, block_id, value):
        """Publish the median once all blocks are there."""
        self.blocks[block_id] = value
        if len(self.blocks) == self.ctx.block_count:
            values = np.stack([self.blocks[i] for i in sorted(self.blocks)])
            self.set_result(np.float32(self.ctx.params.scale) * np.median(values, axis=0))
            self.blocks.clear()
