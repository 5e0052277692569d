"""Codecs written for the older synchronous framework: only their import lines are new."""

import numpy as np

from aiosgd.legacy import BlockWeight, Codec, GlobalSettings, Parameter_Server, netEncapsulation


class FedAvgServer(Codec):
    def __init__(self, node_id):
        super().__init__(node_id)
        self.weights = {}

    def update_blocks(self, block_weight: BlockWeight):
        return None

    def receive_blocks(self, content):
        self.weights[content[0]] = content[1]
        if len(self.weights) != GlobalSettings.get_default().node_count:
            return None
        mean = np.mean(list(self.weights.values()), axis=0)
        self.weights.clear()
        return netEncapsulation(GlobalSettings.get_default().nodes, (Parameter_Server, mean))

    def dispose(self):
        self.weights.clear()


class FedAvgClient(Codec):
    TURN = 150

    def __init__(self, node_id):
        super().__init__(node_id)
        self.turn = 0

    def update_blocks(self, block_weight: BlockWeight):
        self.turn += 1
        if self.turn < self.TURN:
            self.set_result(block_weight.content)
            return None
        return netEncapsulation(Parameter_Server, (self.node_id, block_weight.content))

    def receive_blocks(self, content):
        self.turn = 0
        self.set_result(content[1])

    def dispose(self):
        pass


class Plain(Codec):
    def __init__(self, node_id):
        super().__init__(node_id)
        self.blocks = {}

    def update_blocks(self, block_weight: BlockWeight):
        block_id, content = block_weight.block_id, block_weight.content
        self.blocks[block_id] = content
        self.check_for_combine()
        return netEncapsulation(
            GlobalSettings.get_default().get_adversary(block_id), (block_id, content)
        )

    def receive_blocks(self, content):
        self.blocks[content[0]] = content[1]
        self.check_for_combine()

    def check_for_combine(self):
        if len(self.blocks) == GlobalSettings.get_default().block_count:
            self.set_result(sum(self.blocks.values()) / len(self.blocks))
            self.blocks.clear()

    def dispose(self):
        self.blocks.clear()


class Relay(Codec):
    """Passes every block on along a ring: `update_blocks` and `receive_blocks` yield."""

    def __init__(self, node_id):
        super().__init__(node_id)
        self.weights = 0
        self.received = 0

    def dispose(self):
        self.record(f"{self.node_id} is disposed")

    def update_blocks(self, block_weight):
        self.accumulate(block_weight.content)
        yield netEncapsulation(self.next(), {"from": self.node_id, "data": block_weight.content})

    def receive_blocks(self, content):
        if content["from"] != self.next():
            yield netEncapsulation(self.next(), content)
        self.accumulate(content["data"])

    def next(self):
        return (self.node_id + 1) % GlobalSettings.get_default().node_count

    def accumulate(self, data):
        self.weights += data
        self.received += 1
        if self.received == GlobalSettings.get_default().node_count:
            self.set_result(self.weights / self.received)
            self.weights = 0
            self.received = 0
