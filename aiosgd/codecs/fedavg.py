"""FedAvg: long local training, now and then the average of all models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from aiosgd.codecs.base import SERVER, WORKERS, Array, Block, Codec, Envelope, Message, mean


class FedAvgServer(Codec):
    """Averages the models of all workers and gives every worker the average.

    Rule: w = 1/n · Σ_i w_i, added in the order of the worker ids.
    """

    modes = ("sync",)

    def start(self) -> None:
        """Begin without models."""
        self.models: dict[int, Array] = {}

    async def receive(self, message: Message) -> Envelope | None:
        """Keep a worker's model; the last one of the round completes the average."""
        self.models[message.sender] = message.content
        if len(self.models) < self.ctx.worker_count:
            return None
        average = mean(self.models)
        self.models.clear()
        return Envelope(WORKERS, average)


@dataclass(frozen=True)
class FedAvgParams:
    """Parameters of `FedAvg`.

    Attributes:
        turn: local steps per round.
    """

    turn: int = 150

    def __post_init__(self) -> None:
        if self.turn < 1:
            raise ValueError(f"turn is {self.turn}; expected 1 or more local steps per round")


class FedAvg(Codec):
    """Trains locally for `turn` steps, then goes on from the average of all workers' models.

    Rule: w_i stays the worker's own below the turn; at step t with (t + 1) mod turn = 0, and at
    the job's last step, w_i = 1/n · Σ_j w_j. A worker with several blocks per step takes the mean
    over them as its own model.

    A job that stops before its last step, as at its `target_accuracy`, may end without the last
    average: each worker then ends with the newest that arrived and what it trained since.

    Source: McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of
    Deep Networks from Decentralized Data, AISTATS 2017, arXiv 1602.05629, Algorithm 1 with C = 1;
    its weights n_k/n are equal here, for all workers compute the same number of samples.

    Law: with turn 1, all models are the mean after each step, which is sync SGD.
    """

    exchange = "weights"
    exchanges = ("weights",)
    modes = ("sync",)
    server = FedAvgServer
    Params = FedAvgParams

    def start(self) -> None:
        """Begin without blocks; each step replaces those of the step before."""
        self.local: dict[int, Array] = {}

    async def update(self, block: Block) -> AsyncIterator[Envelope]:
        """Go on alone, or send the model to the server at the end of a round."""
        self.local[block.id] = block.value
        if block.id == self.ctx.blocks[-1]:
            self.set_result(mean(self.local))
            if block.step + 1 == self.ctx.steps or (block.step + 1) % self.ctx.params.turn == 0:
                yield Envelope(SERVER, self.take_result())

    async def receive(self, message: Message) -> None:
        """Go on from the average."""
        self.set_result(message.content)
