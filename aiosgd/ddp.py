"""PyTorch's DistributedDataParallel with aiosgd's compressors: a communication hook for its buckets.

    model = DistributedDataParallel(module)
    model.register_comm_hook(CompressorState("ef(topk(ratio=0.01))"), compressor_hook)

Each rank compresses its own gradients; payloads go to all ranks, and each adds up what it makes of
them in the order of the ranks, so that all have the same bits. Needs the extra `torch`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from aiosgd.codecs.base import Array
from aiosgd.plugins.compressors import chain
from aiosgd.plugins.compressors.base import Compressor
from aiosgd.plugins.kinds import COMPRESSORS
from aiosgd.runtime.frame import HEADER_SIZE, decode, decode_header, encode

# annotations are what DistributedDataParallel checks a hook by, so they are not postponed here

STREAM = "gradients"


class CompressorState:
    """What `compressor_hook` needs and remembers, on one rank.

    A bucket has a compressor of its own, with a memory of its own. A bucket's first gradients are sent
    as they are: DistributedDataParallel makes its buckets anew after the first step, and what a
    compressor had kept back for other buckets by then would be lost.

    Args:
        compressor: a compressor or a chain, as `--compressor` takes it.
        group: the processes that take part; None is all.
        seed: of compressors that draw; together with the rank.

    Attributes:
        bytes_sent: what this rank has sent of payloads, to each of the others.

    Raises:
        ConfigError, PluginError: there is no such compressor, or a parameter is wrong.
    """

    def __init__(self, compressor: str, group: Any = None, *, seed: int = 0) -> None:
        self.group = group
        self.bytes_sent = 0
        self._make = chain.factory(COMPRESSORS, compressor, {})
        self._seed = [seed, dist.get_rank(group)]
        self._compressors: dict[tuple[int, ...], Compressor] = {}
        self._parameters: list[torch.Tensor] = []  # so that their ids stay their own

    def compressor(self, parameters: Sequence[torch.Tensor]) -> tuple[Compressor, bool]:
        """Return the compressor of the bucket with these parameters, and whether it is new."""
        key = tuple(map(id, parameters))
        made = self._compressors.get(key)
        if made is not None:
            return made, False
        # of buckets that share a parameter with this one, there will be no gradients any more
        stale = [old for old in self._compressors if not set(old).isdisjoint(key)]
        for old in stale:
            del self._compressors[old]
        made = self._make(np.random.default_rng([*self._seed, len(self._parameters)]))
        made.shapes = {str(i): tuple(one.shape) for i, one in enumerate(parameters)}
        self._compressors[key] = made
        self._parameters += parameters
        return made, True


def compressor_hook(
    state: CompressorState, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Exchange a bucket's gradients in their compressed form; its value is the mean over all ranks.

    The size of the payload is exchanged first and waited for, then the payload itself, while the
    backward pass goes on.

    Raises:
        ValueError: a gradient is not finite, and the compressor cannot bear that.
    """
    buffer = bucket.buffer()
    compressor, is_new = state.compressor(bucket.parameters())
    gradients = buffer.detach().to("cpu", torch.float32).numpy()
    payload = gradients if is_new else compressor.compress(gradients, STREAM)
    mine = torch.from_numpy(_packed(payload)).to(buffer.device)
    sizes = _gathered_sizes(len(mine), state.group, buffer.device)
    state.bytes_sent += len(mine)
    parts = [torch.empty(max(sizes), dtype=torch.uint8, device=buffer.device) for _ in sizes]
    mine = torch.nn.functional.pad(mine, (0, max(sizes) - len(mine)))
    work = dist.all_gather(parts, mine, group=state.group, async_op=True)

    def finish(_: Any) -> torch.Tensor:
        arrays = [
            _unpacked(part[:size], None if is_new else compressor)
            for part, size in zip(parts, sizes, strict=True)
        ]
        total = arrays[0].copy()
        for array in arrays[1:]:
            total += array
        total /= len(arrays)
        return buffer.copy_(torch.from_numpy(total))

    return work.get_future().then(finish)


def _gathered_sizes(size: int, group: Any, device: Any) -> list[int]:
    """Return how large the payload of each rank is."""
    mine = torch.tensor([size], device=device)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    return [int(one) for one in sizes]


def _packed(payload: Any) -> Array:
    """Return a payload as bytes."""
    return np.frombuffer(b"".join(encode(payload).buffers), np.uint8).copy()


def _unpacked(part: torch.Tensor, compressor: Compressor | None) -> Array:
    """Return the array that a payload's bytes stand for; without a compressor it is that itself."""
    received = part.cpu().numpy()
    start = HEADER_SIZE + decode_header(received.data).metadata_size
    payload = decode(received[HEADER_SIZE:start].data, received[start:])
    array: Array = payload if compressor is None else compressor.decompress(payload)
    return array
