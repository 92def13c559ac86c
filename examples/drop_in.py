"""An ordinary loop with a scheduler, in which only the optimizer is another.

Schedulers, checkpoints and whatever else expects a torch.optim.Optimizer stay as they are.

    python examples/drop_in.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import gcfunc

STEPS = 100

torch.manual_seed(0)
x = torch.randn(512, 20)
y = (x @ torch.randn(20, 4)).argmax(1)
model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))

start = [p.detach().clone() for p in model.parameters()]

# gc= is one more option of a group. Of these two groups one has the weights, which decay, and the
# other the biases, which do not.
groups = gcfunc.no_decay_groups(model, weight_decay=5e-4)
optimizer = gcfunc.optim.SGD(groups, lr=0.3, momentum=0.9, gc="gc")
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=STEPS)

for i in range(STEPS):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    scheduler.step()
    if i % 20 == 0 or i == STEPS - 1:
        print(f"step {i:2}: loss {loss.item():.4f}")

# Centralized gradients move the weights, but not the means of their rows.
moved = [p.detach() - before for p, before in zip(model.parameters(), start, strict=True)]
rows = [m.mean(1) for m in moved if m.ndim > 1]
print(
    f"largest change: {max(m.abs().max().item() for m in moved):.1e} of a weight, "
    f"{max(r.abs().max().item() for r in rows):.1e} of a row's mean"
)
