"""FSDP2: each process holds some rows of every weight, and centralizes the gradients of those.

The mean runs along a row, which one process has whole: GC communicates nothing.

    torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gcfunc.hooks import centralize_backward

STEPS = 100


def largest_row_mean(model: nn.Module) -> float:
    """Over the gradients of all weights, gathered; GC makes it zero."""
    grads = [p.grad for p in model.parameters() if isinstance(p.grad, DTensor) and p.ndim > 1]
    return max(g.full_tensor().flatten(1).mean(1).abs().max().item() for g in grads)


def main() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same data everywhere, of which each process takes its share
    x = torch.randn(512, 20)
    y = (x @ torch.randn(20, 4)).argmax(1)
    x, y = x[rank::size], y[rank::size]

    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    mesh = init_device_mesh("cpu", (size,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    F.cross_entropy(model(x), y).backward()
    without = largest_row_mean(model)

    # After the last fully_shard, which replaces parameters and so loses their hooks.
    handle = centralize_backward(model)
    for i in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if rank == 0 and (i % 20 == 0 or i == STEPS - 1):
            print(f"step {i:2}: loss {loss.item():.4f}")
    handle.check(model)  # raises if hooks were lost

    having = largest_row_mean(model)  # all processes take part
    if rank == 0:
        print(f"largest row mean of the gradient: {without:.1e} without GC, {having:.1e} with")


if __name__ == "__main__":
    dist.init_process_group("gloo")  # and a mesh of "cuda" with "nccl" on GPUs
    main()
    gc.collect()  # FSDP2's objects are cyclic, and must not outlive the process group
    dist.destroy_process_group()
