"""A rank that does what a node does with a codec's step, and nothing else; orders on its input.

    python exchange_rank.py RANK OVER PORT,PORT,…

The codec `allreduce` in its actor, on the mesh, over real links (`tcp` or `unix`); only the training
around it is missing, so that all ranks can begin together, after a barrier, as gloo's do. An order
is `all_reduce BYTES TIMES`; the answer is a line of JSON, the seconds of each.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections import Counter

import numpy as np
import uvloop

from aiosgd.codecs.allreduce import AllReduce
from aiosgd.codecs.base import Block, Context, Message
from aiosgd.runtime.actor import Actor
from aiosgd.runtime.connection import Link
from aiosgd.runtime.frame import encode
from aiosgd.runtime.mesh import Mesh
from aiosgd.runtime.pool import Pool, keep_heap_warm


class Rank:
    def __init__(self, rank: int, over: str, ports: list[int]) -> None:
        self.rank, self.over, self.ports = rank, over, ports
        self.world = len(ports)
        self.pool = Pool()
        self.mesh = Mesh(rank, self.deliver, lambda *_: None, False, self.pool.take)
        self.arrived: Counter[int] = Counter()
        self.round = 0
        self.actor: Actor | None = None
        self.changed = asyncio.Event()

    def deliver(self, sender: int, content, size: int) -> None:
        if content[0] == "barrier":
            self.mesh.consumed(sender)
            self.arrived[content[1]] += 1
            self.changed.set()
        else:
            self.actor.post(Message(sender, content[0], content[1]))

    async def barrier(self) -> None:
        self.round += 1
        self.mesh.send([i for i in range(self.world) if i != self.rank], ["barrier", self.round])
        while self.arrived[self.round] < self.world - 1:
            self.changed.clear()
            await self.changed.wait()

    async def join(self) -> None:
        """Connect to the ranks below; those above connect to us, and say who they are."""
        loop, linked = asyncio.get_running_loop(), asyncio.Event()

        def hello(link: Link, kind, number: int, content, size: int) -> None:
            self.add(content, link, linked)

        def accept() -> Link:
            return Link(hello, lambda *_: None)

        listen = loop.create_unix_server if self.over == "unix" else loop.create_server
        server = await listen(accept, sock=self.socket(self.rank, listen=True))
        for peer in range(self.rank):
            while True:
                try:
                    sock = self.socket(peer, listen=False)
                    break
                except OSError:
                    await asyncio.sleep(0.01)
            connect = loop.create_unix_connection if self.over == "unix" else loop.create_connection
            _, link = await connect(lambda: Link(None, lambda *_: None), sock=sock)
            link.send(encode(self.rank))
            self.add(peer, link, linked)
        if len(self.mesh.peers) < self.world - 1:
            await linked.wait()
        server.close()

    def add(self, peer: int, link: Link, linked: asyncio.Event) -> None:
        self.mesh.add(peer, link)
        if len(self.mesh.peers) == self.world - 1:
            linked.set()

    def socket(self, rank: int, *, listen: bool) -> socket.socket:
        unix = self.over == "unix"
        made = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        port = self.ports[rank]
        address = f"\0aiosgd-exchange-{port}" if unix else ("127.0.0.1", port)
        try:
            if listen:
                made.bind(address)
            else:
                made.connect(address)
        except OSError:
            made.close()
            raise
        made.setblocking(False)
        return made

    async def all_reduce(self, size: int, times: int) -> list[float]:
        workers, value = tuple(range(self.world)), np.ones(size // 4, np.float32)
        ctx = Context(
            node=self.rank,
            role="worker",
            workers=workers,
            block_owners=tuple((i,) for i in workers),
            steps=times + 1,
            params=AllReduce.Params(),
            initial=value,
            memory=self.pool.take,
        )
        mesh = self.mesh
        self.actor = actor = Actor(
            AllReduce.create(ctx),
            len(value),
            lambda to, step, content: to and mesh.send(to, [step, content]),
            mesh.consumed,
        )
        actor.start()
        task = asyncio.ensure_future(actor.run())
        await self.barrier()  # nobody sends before every rank has its actor
        seconds = []
        for step in range(times + 1):
            await self.barrier()
            started = time.perf_counter()
            actor.post(Block(self.rank, step, value, 1))
            await actor.completed(step)
            seconds.append(time.perf_counter() - started)
            result = actor.result()
            assert result[0] == result[-1] == 1
            del result
        task.cancel()
        return seconds[1:]


async def main() -> None:
    rank = Rank(int(sys.argv[1]), sys.argv[2], [int(port) for port in sys.argv[3].split(",")])
    await rank.join()
    loop = asyncio.get_running_loop()
    print(json.dumps("ready"), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        _, size, times = line.split()
        print(json.dumps(await rank.all_reduce(int(size), int(times))), flush=True)


if __name__ == "__main__":
    keep_heap_warm()
    uvloop.run(main())
