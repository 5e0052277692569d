"""One rank of test_ddp.py, in a process of its own.

python ddp_rank.py RANK WORLD FOLDER COMPRESSOR …   writes FOLDER/<which compressor>-RANK.npz
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from aiosgd.ddp import CompressorState, compressor_hook

STEPS, RATE = 12, 0.1


def train(rank: int, compressor: str) -> dict:
    """Take steps on data of the rank's own; return what came of it, a vector of all parameters each.

    Returns:
        start, end: the parameters; gradients: the sum of the rank's own; errors: what its compressor
        holds back at the end; layouts: how many parameters each bucket had; bytes_sent.
    """
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)
    )
    parameters = list(module.parameters())
    start = _vector(parameters)
    # several small buckets, which are made anew after the first step
    model = DistributedDataParallel(module, bucket_cap_mb=8 / 1024)
    own = {id(one): torch.zeros_like(one) for one in parameters}
    layouts: list[int] = []

    def watched(state: CompressorState, bucket):
        layouts.append(len(bucket.parameters()))
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            own[id(parameter)] += gradient.view_as(parameter)
        return compressor_hook(state, bucket)

    state = None
    if compressor:
        state = CompressorState(compressor, seed=3)
        model.register_comm_hook(state, watched)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    rng = torch.Generator().manual_seed(rank)
    x, y = torch.randn(64, 20, generator=rng), torch.randint(0, 3, (64,), generator=rng)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {
        "start": start,
        "end": _vector(parameters),
        "gradients": _vector([own[id(one)] for one in parameters]),
        "errors": _errors(state, parameters),
        "layouts": np.array(layouts),
        "bytes_sent": np.array(state.bytes_sent if state else 0),
    }


def _vector(tensors) -> np.ndarray:
    return np.concatenate([one.detach().numpy().ravel() for one in tensors])


def _errors(state: CompressorState | None, parameters) -> np.ndarray:
    """Return what the compressors of all buckets hold back, in the order of the parameters."""
    held = {id(one): np.zeros(one.numel(), np.float32) for one in parameters}
    sizes = {id(one): one.numel() for one in parameters}
    for key, compressor in state._compressors.items() if state else ():
        for error in compressor.memory.get("error", {}).values():
            parts = np.split(error, np.cumsum([sizes[one] for one in key])[:-1])
            held |= dict(zip(key, parts, strict=True))
    return np.concatenate([held[id(one)] for one in parameters])


def main() -> None:
    """Join the group, and train once with each compressor; an empty one is plain DDP."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    for i, compressor in enumerate(sys.argv[4:]):
        np.savez(folder / f"{i}-{rank}.npz", **train(rank, compressor))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
