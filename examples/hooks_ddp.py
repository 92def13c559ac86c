"""DDP and the optimizer that you have, with gradients that are centralized by hooks.

    torchrun --nproc-per-node 2 examples/hooks_ddp.py

Any number of processes will do, one too.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gcfunc.hooks import centralize_backward

STEPS = 100


def largest_row_mean(model: nn.Module) -> float:
    """Over the gradients of all weights; GC makes it zero."""
    grads = [p.grad for p in model.parameters() if p.grad is not None and p.ndim > 1]
    return max(g.flatten(1).mean(1).abs().max().item() for g in grads)


def main() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same data everywhere, of which each process takes its share
    x = torch.randn(512, 20)
    y = (x @ torch.randn(20, 4)).argmax(1)
    x, y = x[rank::size], y[rank::size]

    model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    F.cross_entropy(model(x), y).backward()
    without = largest_row_mean(model)

    # The one line. Hooks run while backward and DDP's all-reduce go on.
    with centralize_backward(model) as handle:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            handle.check(model)  # raises if something replaced the hooked parameters
            if rank == 0 and (i % 20 == 0 or i == STEPS - 1):
                print(f"step {i:2}: loss {loss.item():.4f}")
    if rank == 0:
        print(
            f"largest row mean of the gradient: {without:.1e} without GC, "
            f"{largest_row_mean(model):.1e} with"
        )


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    main()
    dist.destroy_process_group()
