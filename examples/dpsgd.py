"""A codec in one file: D-PSGD, each worker on weights of its own, averaged with its neighbours'.

    aiosgd check examples/dpsgd.py:DPsgd
    aiosgd run --codec examples/dpsgd.py:DPsgd --workers 4 --topology ring --epochs 20

docs/codec.md builds it step by step. Lian et al., NIPS 2017, arXiv 1705.09056, Algorithm 1.
"""

from aiosgd import Codec, Envelope
from aiosgd.codecs.base import mean, mixture


class DPsgd(Codec):
    """x_i <- sum_j W_ij y_j, where y_j are worker j's weights after a step of its own."""

    exchange = "weights"
    exchanges = ("weights",)
    modes = ("sync",)
    uses_topology = True
    laws = frozenset({"single", "average"})

    def start(self):
        """Begin a step with nothing."""
        self.own, self.heard = {}, {}

    async def update(self, block):
        """Send one's own weights, once all own blocks of the step are there."""
        self.own[block.id] = block.value
        if len(self.own) < len(self.ctx.blocks):
            return None
        weights = mean(self.own)
        self.own.clear()
        self.hear(self.ctx.node, weights)
        return Envelope(self.ctx.neighbours, weights)

    async def receive(self, message):
        """Take a neighbour's weights in."""
        self.hear(message.sender, message.content)

    def hear(self, worker, weights):
        """Mix, once everybody was heard."""
        self.heard[worker] = weights
        if len(self.heard) == len(self.ctx.weights):
            self.set_result(mixture(self.heard, self.ctx.weights))  # in the order of the ids
            self.heard.clear()
